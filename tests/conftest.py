"""Toys for all tests: the real classes at tiny sizes, with random weights, as a model folder and as a pipeline."""
# ruff: noqa: E402

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tests import randomness, shape_checks

shape_checks.install()  # Before the first module of the package, so that the checks of all of them are these.

from foveate.conditioning.minilm import MiniLM, MiniLMConfig, TextEncoder
from foveate.eval import measure
from foveate.families.spec import Defaults, ModelSpec
from foveate.kernels import native
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.pipeline.pipeline import Pipeline
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.weights.folder import save_folder
from foveate.weights.random_weights import fill_randomly
from tests.report import write_report

# The first example of a test pays for imports and shape checks, so none has a deadline.
settings.register_profile("foveate", deadline=None)
settings.load_profile("foveate")

TOY_WORDS = "[PAD] [UNK] [CLS] [SEP] a red green blue cat dog apple rocket on left right of big small two the house"

TOY_TEXT = MiniLMConfig(vocab_size=64, max_positions=64, width=24, num_heads=3, num_blocks=2, hidden_width=48)

TOY_SPEC = ModelSpec(
    name="toy",
    family="infinity",
    transformer=InfinityConfig(
        depth=3, width=64, heads=4, bits=8, text_width=24, pool_heads=4, text_tokens=64, ff_width=128
    ),
    autoencoder=AutoencoderConfig(
        latent_channels=8, base_channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=1, patch=4
    ),
    budgets=("0.06M",),
    ratios=("1:1",),
    defaults=Defaults(guidance_scale=2.5, temperature=0.5),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--report FILE`."""
    parser.addoption("--report", type=Path, help="write a page about the run: what ran, for how long, and where")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Writes the page, once for all workers."""
    if (path := config.getoption("report")) is not None and not hasattr(config, "workerinput"):
        arguments = [word for word in config.invocation_params.args if not word.startswith("--report")]
        write_report(path, terminalreporter.stats, [word for word in arguments if word != str(path)])


def pytest_configure(config: pytest.Config) -> None:
    """Examples of hypothesis follow from the seed of the suite, unless they have one of their own."""
    config.addinivalue_line("markers", "in_turn(one, other): values of two parameters meet in turn; other pairs soak")
    if config.getoption("--hypothesis-seed") is None:
        hypothesis.core.global_force_seed = randomness.BASE


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks pairs that `in_turn` leaves to `make soak`: every value still runs, with one of the other's."""
    tests: dict[tuple[Path, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("in_turn") is not None:
            tests.setdefault((item.path, item.originalname), []).append(item)
    for cases in tests.values():
        places = [_places(cases, name) for name in cases[0].get_closest_marker("in_turn").args]  # type: ignore[union-attr]
        turn = 1 + min(map(max, places))
        for case, *pair in zip(cases, *places, strict=True):
            if (pair[0] - pair[1]) % turn:
                case.add_marker(pytest.mark.soak)


def _places(cases: list[pytest.Function], name: str) -> list[int]:
    """Which of the values of a parameter each case has, in the order in which they first occur."""
    values = [id(case.callspec.params[name]) for case in cases]
    return [list(dict.fromkeys(values)).index(value) for value in values]


def pytest_report_header() -> str:
    """Says how to have the same random inputs again."""
    return f"random inputs: FOVEATE_TEST_SEED={randomness.BASE}"


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Numbers of the global generators depend on the test and the seed of the suite, not on the tests before."""
    torch.manual_seed(randomness.seed_of(request.node.nodeid))


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes all kernels away, so that every product is one that torch counts."""
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "allows_onednn", lambda: False)


@pytest.fixture
def on_a_machine_with_c_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere every report says that plain torch runs (`kernels_plain`), which is another test's matter.

    Programs that a test starts are told that it was wanted, which says nothing either.
    """
    if native.library() is None:
        monkeypatch.setattr(native, "warnings", lambda: ())
        monkeypatch.setenv("FOVEATE_NATIVE", "0")


def toy_tokenizer() -> Tokenizer:
    """A word-piece tokenizer of two dozen words."""
    vocab = {word: index for index, word in enumerate([*TOY_WORDS.split(), "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return tokenizer


def toy_text_encoder() -> TextEncoder:
    """The text encoder at toy size."""
    model = MiniLM(TOY_TEXT)
    fill_randomly(model, seed=1)
    return TextEncoder(model=model, tokenizer=toy_tokenizer())


def toy_transformer() -> Infinity:
    """The transformer at toy size; its head is loud enough that codes depend on the prompt."""
    model = Infinity(TOY_SPEC.transformer)
    fill_randomly(model, seed=2)
    model.head.weight.data *= 2
    return model.requires_grad_(requires_grad=False).eval()


def toy_autoencoder() -> Autoencoder:
    """The autoencoder at toy size."""
    model = Autoencoder(TOY_SPEC.autoencoder)
    fill_randomly(model, seed=3)
    return model.requires_grad_(requires_grad=False).eval()


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    save_folder(
        folder,
        config=TOY_SPEC.to_json(),
        transformer=toy_transformer(),
        autoencoder=toy_autoencoder(),
        text_encoder=toy_text_encoder(),
        notice="A toy.\n",
        model_card="# toy\n",
        dtype=torch.float32,
    )
    return folder


@pytest.fixture(scope="session")
def toy_pipe(toy_folder: Path) -> Pipeline:
    """The toy as a pipeline; calls do not change it."""
    return Pipeline.from_pretrained(toy_folder)


@pytest.fixture(scope="session")
def compared() -> dict[tuple[object, ...], Any]:
    """What comparisons on the toy generated and how it was scored; `calls` fills it."""
    return {}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, compared: dict[tuple[object, ...], Any]) -> list[str]:
    """Keys of the sides that a comparison ran, warm-up included; what ran in an earlier test is not run again."""
    made: list[str] = []
    real_generate, real_score = measure._Runner.generate, measure.score_pairs

    def generate(runner: measure._Runner, side: measure.Side, prompts: Sequence[str]) -> Any:
        made.append(side.key)
        setup = runner.setup
        key = (side.policy.spec, side.seed_offset, *prompts, setup.seeds, setup.first_seed, str(setup.options))
        if key not in compared:
            compared[key] = real_generate(runner, side, prompts)
        return compared[key]

    def score(images: Any, references: Any, prompts: Sequence[str], judges: Sequence[Any]) -> Any:
        key = (images.tobytes(), references.tobytes(), tuple(prompts), tuple(judge.name for judge in judges))
        if key not in compared:
            compared[key] = real_score(images, references, prompts, judges)
        return compared[key]

    monkeypatch.setattr(measure._Runner, "generate", generate)
    monkeypatch.setattr(measure, "score_pairs", score)
    return made
