"""Names, folders and shapes: what loads, what is refused, and that dtypes and random weights behave."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from foveate.core.errors import CheckpointError, FoveateError
from foveate.families.memory import count_parameters
from foveate.families.published import PUBLISHED
from foveate.families.spec import ModelSpec
from foveate.pipeline.pipeline import Pipeline
from foveate.weights.folder import folder_sha256, save_folder
from tests.conftest import TOY_SPEC, toy_autoencoder, toy_text_encoder, toy_transformer


def test_unknown_names_are_listed() -> None:
    with pytest.raises(
        FoveateError, match=r"no model 'infinity-3b'; did you mean infinity-8b. there are emoji, .*infinity-8b"
    ):
        Pipeline.from_pretrained("infinity-3b")


def test_published_sizes() -> None:
    sizes = {}
    for name, entry in PUBLISHED.items():
        schedule = entry.spec.default_schedule
        sizes[name] = (schedule.grids[-1][1] * entry.spec.stride, schedule.num_tokens)
    assert sizes == {
        "infinity-125m": (256, 521), "infinity-2b": (1024, 10521), "infinity-8b": (1024, 10521),
        "infinity-8b-512": (512, 2521), "var-d16": (256, 680), "var-d20": (256, 680), "var-d24": (256, 680),
        "var-d30": (256, 680), "var-d36-512": (512, 2240), "switti-512": (512, 2240), "switti-512-ar": (512, 2240),
        "switti-1024": (1024, 9451), "switti-1024-ar": (1024, 9451), "hart-0.7b-1024px": (1024, 9451),
    }  # fmt: skip


def test_published_parameters() -> None:
    """Millions, as the model cards and the reference code have them."""
    wanted = {
        "infinity-125m": 125.1, "infinity-2b": 2204.6, "infinity-8b": 8375.8, "var-d16": 310.3, "var-d20": 600.9,
        "var-d24": 1033.4, "var-d30": 2010.0, "var-d36-512": 2353.9, "switti-512": 2470.5,
    }  # fmt: skip
    counted = {name: count_parameters(PUBLISHED[name].spec)["transformer"] / 1e6 for name in wanted}
    assert counted == pytest.approx(wanted, abs=0.06)


def test_config_survives_json() -> None:
    assert ModelSpec.from_json(json.loads(json.dumps(TOY_SPEC.to_json()))) == TOY_SPEC
    with pytest.raises(CheckpointError, match="names no format"):
        ModelSpec.from_json({name: value for name, value in TOY_SPEC.to_json().items() if name != "format"})
    with pytest.raises(CheckpointError, match="colour"):
        ModelSpec.from_json({**TOY_SPEC.to_json(), "colour": 2})
    for name, value in (("autoencoder", [1]), ("transformer", 3), ("defaults", None), ("ratios", 5)):
        with pytest.raises(CheckpointError, match="does not describe a model"):
            ModelSpec.from_json({**TOY_SPEC.to_json(), name: value})


def test_folder_keeps_weights(toy_folder: Path, toy_pipe: Pipeline) -> None:
    for key, value in toy_transformer().state_dict().items():
        assert torch.equal(value, toy_pipe.model.transformer.state_dict()[key]), key
    assert toy_pipe.model.sha256 == folder_sha256(toy_folder)
    assert {stat.S_IMODE(path.stat().st_mode) for path in toy_folder.iterdir()} == {0o644}
    assert not [path for path in toy_folder.iterdir() if path.name.startswith(".")]


def test_folder_is_float16_by_default(tmp_path: Path) -> None:
    save_folder(
        tmp_path, config=TOY_SPEC.to_json(), transformer=toy_transformer(), autoencoder=toy_autoencoder(),
        text_encoder=toy_text_encoder(), notice="n", model_card="c",
    )  # fmt: skip
    stored = load_file(tmp_path / "transformer.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    pipe = Pipeline.from_pretrained(tmp_path, dtype="bfloat16")
    assert pipe.model.transformer.compute_dtype is torch.bfloat16
    latents = pipe("a red cat", seed=1, output_type="latent").images
    assert isinstance(latents, torch.Tensor)
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("missing", ["config.json", "transformer.safetensors", "tokenizer.json"])
def test_missing_files_are_named(toy_folder: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(toy_folder, tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    with pytest.raises(CheckpointError, match=Path(missing).stem):
        Pipeline.from_pretrained(tmp_path / "m")


def test_random_weights_are_the_same_every_time(toy_folder: Path) -> None:
    a, b = (Pipeline.from_pretrained(toy_folder, weights="random") for _ in range(2))
    one, two = (p("a red cat", seed=1, output_type="latent").images for p in (a, b))
    assert isinstance(one, torch.Tensor)
    assert torch.equal(one, two)  # type: ignore[arg-type]
    assert a.model.text.encode(["four words in here"])[0].shape == (6, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "tpu9"}, "device must be"),
        ({"device": "mps"}, "device must be"),
        ({"device": "cuda:7"}, "device cuda:7 does not exist; there are cuda:0, cuda:1$"),
        ({"weights": "some"}, "weights must be"),
        ({"revision": "main"}, "revision needs a model on the hub"),
    ],
)
def test_loading_refusals(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(FoveateError, match=message):
        Pipeline.from_pretrained(toy_folder, **options)  # type: ignore[arg-type]


def test_hub_models_are_fetched(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def fetch(repo_id: str, *, revision: str | None, local_files_only: bool, allow_patterns: object) -> str:
        asked.append((repo_id, revision, local_files_only))
        if revision is None:
            raise OSError("not in the cache\nand more")
        return str(toy_folder if revision == "v1" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert Pipeline.from_pretrained("someone/toy", revision="v1", local_files_only=True).model.spec == TOY_SPEC
    with pytest.raises(FoveateError, match="no folder someone/toy, and no such model from the hub: not in the cache$"):
        Pipeline.from_pretrained("someone/toy")
    with pytest.raises(CheckpointError, match=r"needs config\.json"):
        Pipeline.from_pretrained("someone/toy", revision="empty")
    assert asked == [("someone/toy", "v1", True), ("someone/toy", None, False), ("someone/toy", "empty", False)]


def test_neither_importing_foveate_nor_generating_imports_more_than_it_needs() -> None:
    """Importing leaves torch out, loading and generating leave torch's compiler out, which takes a second to import."""
    code = """
import sys, foveate
foveate.FoveateError; dir(foveate)
assert 'torch' not in sys.modules
def compilers():
    return {'torch._dynamo', 'torch._inductor', 'sympy', 'transformers', 'huggingface_hub'} & set(sys.modules)
pipe = foveate.Pipeline.from_pretrained('emoji-tiny')
assert not compilers(), f'loading imports {compilers()}'
pipe('a red cat', seed=1)
assert not compilers(), f'generating imports {compilers()}'
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
