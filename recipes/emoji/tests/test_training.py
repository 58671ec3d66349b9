"""The trainers on toy sizes: teacher forcing agrees with the engine, runs resume bit for bit, losses fall."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.layers import init_weights
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, ForcedSampler
from foveate.engine.state import Request
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.policies.full import Full
from foveate.tokenizers.accumulate import resize
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer, bits_to_codes, quantise
from recipes.emoji import loop
from recipes.emoji.captions import Drawing
from recipes.emoji.colours import BACKGROUNDS
from recipes.emoji.loop import MAX_STEP_S, Limits, Optimisation, Run, steps
from recipes.emoji.recipe import Route, load_recipe
from recipes.emoji.scenes import SceneConfig
from recipes.emoji.teacher import Teacher, draw_paths, pad_texts
from recipes.emoji.tokenizer import TokenizerRecipe, composite, pixel_loss, train_tokenizer
from recipes.emoji.transformer import Length, TransformerRecipe, alter_text, bit_loss, small_start, train_transformer
from recipes.emoji.window import BLOCK, SceneSequence, Window

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))
SHAPE = InfinityConfig(depth=3, width=32, heads=2, bits=8, text_width=12, pool_heads=2, text_tokens=8, ff_width=64)
LENGTHS = (Length(scales=3, share=0.5, times=2), Length(scales=4, share=0.5))
AUTOENCODER = AutoencoderConfig(
    latent_channels=8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, patch=4
)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is half a second after the one before."""
    now = iter(np.arange(0, 1e6, 0.5).tolist())
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(now))


def _model() -> Infinity:
    torch.manual_seed(3)
    model = Infinity(SHAPE)
    init_weights(model)
    small_start(model)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _logits_of_engine(model: Infinity, texts: list[Tensor], bits: list[Tensor], schedule: ScaleSchedule) -> Tensor:
    """Logits of all scales with forced codes, without guidance, (B, L, V)."""
    seen: list[Tensor] = []

    class Spy(ForcedSampler):
        def choose(self, scale, grid, logits, kept, rule):
            seen.append(torch.stack(list(logits)).flatten(2))
            return super().choose(scale, grid, logits, kept, rule)

    sampler = Spy(symbols=tuple(b.flatten(1, 2).long() for b in bits))
    request = Request(
        schedule=schedule,
        guidance=GuidanceSchedule(weights=(1.0,) * len(schedule)),
        temperatures=(1.0,) * len(schedule),
        filters=(Filter(top_k=1, top_p=0.0),) * len(schedule),
        sampler=sampler,
        conditions=tuple(texts),
        num_images=len(texts),
    )
    tokenizer = BSQTokenizer(Autoencoder(AUTOENCODER))
    list(Engine(model, tokenizer).run(Full().bind(schedule, model.shape), request))
    return torch.cat(seen, dim=1)


def _teacher(model: Infinity, masked_tokens: int = 6, dtype: torch.dtype = torch.float32) -> Teacher:
    return Teacher(model=model, schedule=ScaleSchedule.from_grids(GRIDS), masked_tokens=masked_tokens, dtype=dtype)


@pytest.mark.parametrize("masked_tokens", [0, 6, 100])
def test_teacher_forcing_agrees_with_the_engine(masked_tokens: int) -> None:
    model, schedule = _model(), ScaleSchedule.from_grids(GRIDS)
    texts = [torch.randn(5, 12), torch.randn(3, 12)]
    quantised = quantise(torch.randn(2, 8, 4, 4), GRIDS)
    with torch.no_grad():
        taught = _teacher(model, masked_tokens).logits(pad_texts(texts, 7), quantised.inputs)
    generated = _logits_of_engine(model, texts, list(quantised.bits), schedule)
    assert generated.std() > 0.1
    torch.testing.assert_close(taught, generated, rtol=1e-4, atol=1e-4)


def test_fewer_scales_give_the_same_first_logits() -> None:
    quantised = quantise(torch.randn(2, 8, 4, 4), GRIDS)
    texts, teacher = pad_texts([torch.randn(5, 12), torch.randn(3, 12)], 8), _teacher(_model())
    with torch.no_grad():
        torch.testing.assert_close(
            teacher.logits(texts, quantised.inputs[:2]), teacher.logits(texts, quantised.inputs)[:, :14]
        )


def test_paths_are_dropped_more_often_in_later_blocks_and_have_mean_one() -> None:
    path_PB2 = draw_paths(0.5, 3, 4000, np.random.default_rng())
    assert path_PB2[0].unique().tolist() == [1.0]
    for block, stays in ((1, 0.75), (2, 0.5)):
        assert path_PB2[block].unique().tolist() == pytest.approx([0.0, 1 / stays])
        assert (path_PB2[block] > 0).float().mean(0).tolist() == pytest.approx([stays, stays], abs=0.04)
    both = (path_PB2[2] > 0).all(1).float().mean()
    assert float(both) == pytest.approx(0.25, abs=0.04), "the two sublayers are drawn apart"


def test_a_dropped_sublayer_is_one_with_a_closed_gate() -> None:
    quantised, texts = quantise(torch.randn(2, 8, 4, 4), GRIDS), pad_texts([torch.randn(5, 12), torch.randn(3, 12)], 8)
    model = _model()
    path_PB2 = torch.ones(3, 2, 2)
    path_PB2[1, 1, 0] = path_PB2[2, 1, 1] = 0.0
    with torch.no_grad():
        whole = _teacher(model).logits(texts, quantised.inputs)
        dropped = _teacher(model).logits(texts, quantised.inputs, path_PB2)
        for output in (model.block(1).sa.proj, model.block(2).ffn.fc2):
            output.weight.zero_()
            output.bias.zero_()
        closed = _teacher(model).logits(texts, quantised.inputs)
    assert torch.equal(dropped[0], whole[0])
    torch.testing.assert_close(dropped[1], closed[1])
    assert not torch.allclose(dropped[1], whole[1])


def test_texts_are_padded_and_cut() -> None:
    texts = pad_texts([torch.ones(2, 3), torch.full((9, 3), 2.0)], 4)
    assert texts.features_BTE.sum((1, 2)).tolist() == [6.0, 24.0]
    assert texts.is_real_BT.sum(1).tolist() == [2, 4]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch needs g++ on a CPU")
@pytest.mark.soak
def test_compiled_blocks_have_the_same_gradients() -> None:
    # In a process of its own: the compiler cannot look through the checks of shapes that tests put around functions.
    command = [sys.executable, str(Path(__file__).with_name("compiled_case.py"))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "equal\n"


def test_quantise_adds_up_and_learns_to_correct_flips() -> None:
    latent = torch.randn(2, 8, 4, 4)
    plain = quantise(latent, GRIDS)
    again = sum(resize(bits_to_codes(bits), (4, 4)) for bits in plain.bits)
    torch.testing.assert_close(plain.f_hat_BZHW, again)
    assert (latent - plain.f_hat_BZHW).square().mean() < latent.square().mean()
    flipped = quantise(latent, GRIDS, torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0))
    for a, b in zip(plain.bits, flipped.bits, strict=True):
        assert torch.equal(a[0], b[0])
    assert torch.equal(plain.bits[0], flipped.bits[0]), "labels of the first scale come before any flip"
    torch.testing.assert_close(flipped.inputs[0][1], -plain.inputs[0][1])


def test_bit_loss_against_a_loop() -> None:
    quantised = quantise(torch.randn(2, 8, 4, 4), GRIDS)
    logits = torch.randn(2, 30, 16)
    total, weight_sum, token = 0.0, 0.0, 0
    for bits in quantised.bits:
        n = bits.shape[1] * bits.shape[2]
        for label in bits.flatten(1, 2).unbind(1):
            pair = logits[:, token].view(2, 8, 2)
            loss = -pair.log_softmax(-1).gather(-1, label.long()[..., None]).mean()
            total, weight_sum, token = total + float(loss) * n**-0.5, weight_sum + n**-0.5, token + 1
    assert float(bit_loss(logits, quantised, 0.5)[0]) == pytest.approx(total / weight_sum, rel=1e-5)


def test_rate_is_constant_then_falls() -> None:
    o = Optimisation(minutes=10.0, batch=1, rate=1.0, constant_share=0.5, final_rate=0.1, warmup_steps=10)
    assert o.rate_at(0.0, 0) == pytest.approx(0.1)
    assert o.rate_at(0.5, 99) == 1.0
    assert 0.1 < o.rate_at(0.9, 99) < o.rate_at(0.6, 99) < 1.0
    assert o.rate_at(1.0, 99) == pytest.approx(0.1)


def _tokenizer_recipe(minutes: float) -> TokenizerRecipe:
    grids: tuple[Grid, ...] = GRIDS
    optimisation = Optimisation(minutes=minutes, batch=2, rate=1e-3, warmup_steps=2, checkpoint_s=2.0)
    return TokenizerRecipe(shape=AUTOENCODER, grids=grids, optimisation=optimisation, dtype="float32")


def _pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (4, 32, 32, 4), dtype=np.uint8)


def _sequence(config: SceneConfig | None = None) -> SceneSequence:
    drawings = tuple(
        Drawing(
            index=index,
            code_point=f"1f60{index}",
            label=label,
            style="fluent-3d",
            group="food-drink",
            subgroup="food-fruit",
            synonyms=(),
            keywords=(),
            split="train",
        )
        for index, label in enumerate(("apple", "pear", "plum", "fig"))
    )
    return SceneSequence(
        drawings=drawings,
        images_NYXc=torch.from_numpy(_pixels()),
        config=SceneConfig() if config is None else config,
        weights=np.ones(4),
        contrast_NK=np.full((4, len(BACKGROUNDS)), 99.0),
        size=(32, 32),
    )


def _encode_pixels(pixels: Tensor) -> Tensor:
    latents = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).repeat(1, 3, 1, 1)[:, :8]
    return latents / latents.std()


def _encode_texts(texts: list[str]) -> list[Tensor]:
    return [torch.randn(3, 12, generator=torch.Generator().manual_seed(len(text))) for text in texts]


def _window(size: int = 64) -> Window:
    return Window(_sequence(), _encode_pixels, _encode_texts, size=size)


def _windows(recipe: TransformerRecipe) -> dict[ScaleSchedule, Window]:
    return {recipe.schedule: _window()}


def _stop_after(count: int) -> Callable[[str], None]:
    """A log that stops the run at its n-th line, right after a checkpoint."""
    lines: list[str] = []

    def log(text: str) -> None:
        lines.append(text)
        if len(lines) == count:
            raise KeyboardInterrupt

    return log


@pytest.mark.usefixtures("fake_clock")
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe = _tokenizer_recipe(minutes=0.1)
    whole = train_tokenizer(recipe, _sequence(), tmp_path / "a.ckpt", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(recipe, _sequence(), tmp_path / "b.ckpt", _stop_after(1))
    resumed = train_tokenizer(recipe, _sequence(), tmp_path / "b.ckpt", lambda _: None)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_pause_does_not_eat_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 1.0, 5000.0, 5000.0, 5001.0, 5001.0, 5002.0, 5002.0, 5003.0, 5003.0, 5004.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(now))
    o = Optimisation(minutes=8 / 60, batch=1, rate=0.1)
    run = Run.start(torch.nn.Linear(2, 2), o)
    for _ in steps(run, o, tmp_path / "c.ckpt", lambda _: None, Limits()):
        pass
    assert run.clock_s == pytest.approx(MAX_STEP_S + 4)
    assert run.step == 5


def test_a_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    o = Optimisation(minutes=1.0, batch=1, rate=0.1)
    run = Run.start(torch.nn.Linear(2, 2), o)
    for name in (".c.1234.part", ".other.1234.part"):
        (tmp_path / name).write_bytes(b"half")
    run.save(tmp_path / "c.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"c.ckpt", ".other.1234.part"}
    again = Run.start(torch.nn.Linear(2, 2), o)
    again.load(tmp_path / "c.ckpt")
    assert torch.equal(again.model.weight, run.model.weight)


def test_training_lowers_both_losses(tmp_path: Path) -> None:
    pixels = composite(_pixels())
    assert pixel_loss(pixels, pixels) == 0
    lines: list[str] = []
    recipe = TransformerRecipe(
        shape=SHAPE,
        schedule=ScaleSchedule.from_grids(GRIDS),
        optimisation=Optimisation(minutes=4 / 60, batch=4, rate=3e-3, warmup_steps=5),
        flip_rate=0.0,
        lengths=LENGTHS,
        text_length=8,
        altered_share=0.0,
        unconditional_share=0.0,
        dtype="float32",
        compiles=False,
        uses=1e9,
    )
    window = _window(size=32)
    weights = train_transformer(recipe, {recipe.schedule: window}, tmp_path / "t.ckpt", lines.append)
    trained = Infinity(SHAPE)
    trained.load_state_dict(weights)
    latents, texts = window.batch(0.0, 32, np.random.default_rng(0))
    quantised = quantise(latents, GRIDS)
    with torch.no_grad():
        logits = _teacher(trained).logits(pad_texts(texts, 8), quantised.inputs)
    assert float(bit_loss(logits, quantised, 0.0)[0]) < 0.6, "0.69 is a coin"


def test_a_window_holds_consecutive_scenes_and_moves_on() -> None:
    window, sequence = _window(size=64), _sequence()
    for step in (0, 40):
        first = step * 4 // BLOCK * BLOCK
        scenes = sequence.scenes(first, 64)
        latents = torch.cat([_encode_pixels(sequence.pixels(scenes[i : i + BLOCK])) for i in (0, BLOCK)])
        texts = _encode_texts([scene.caption for scene in scenes])
        order = [(number - first) for number in sorted(range(first, first + 64), key=lambda number: number % 64)]
        got, said = window.batch(step * 4.0, 8, np.random.default_rng(step))
        chosen = np.random.default_rng(step).integers(0, 64, 8)
        assert torch.equal(got, latents[[order[i] for i in chosen]])
        assert all(torch.equal(a, texts[order[i]]) for a, i in zip(said, chosen, strict=True))


def test_a_new_window_gives_what_the_old_one_would_have() -> None:
    old, new = _window(), _window()
    for step in range(0, 60, 7):
        old.batch(4.0 * step, 4, np.random.default_rng(step))
    for step in (60, 200):
        (a, texts_a), (b, texts_b) = (w.batch(4.0 * step, 4, np.random.default_rng(step)) for w in (old, new))
        assert torch.equal(a, b)
        assert all(torch.equal(x, y) for x, y in zip(texts_a, texts_b, strict=True))


OBLONG = ScaleSchedule.from_grids(((1, 1), (2, 2), (3, 2), (5, 4)))


def _varied_recipe(**changes: object) -> TransformerRecipe:
    """Coarse scales first, then all, some in another aspect ratio, with stochastic depth."""
    recipe = TransformerRecipe(
        shape=SHAPE,
        schedule=ScaleSchedule.from_grids(GRIDS),
        optimisation=Optimisation(minutes=0.1, batch=4, rate=1e-3, warmup_steps=2, checkpoint_s=2.0),
        lengths=(*LENGTHS[:1], Length(scales=4, share=0.2), Length(scales=4, share=0.3, schedule=OBLONG)),
        path_rate=0.5,
        coarse_share=0.4,
        dtype="float32",
        compiles=False,
    )
    return replace(recipe, **changes)


def _varied_windows(recipe: TransformerRecipe) -> dict[ScaleSchedule, Window]:
    def encode(pixels: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(_encode_pixels(pixels), (5, 4))

    oblong = replace(_sequence(), size=(40, 32), seed=1)
    return _windows(recipe) | {OBLONG: Window(oblong, encode, _encode_texts, size=32)}


@pytest.mark.usefixtures("fake_clock")
def test_a_stopped_transformer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe = _varied_recipe()
    whole = train_transformer(recipe, _varied_windows(recipe), tmp_path / "a.ckpt", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        train_transformer(recipe, _varied_windows(recipe), tmp_path / "b.ckpt", _stop_after(1))
    resumed = train_transformer(recipe, _varied_windows(recipe), tmp_path / "b.ckpt", lambda _: None)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    plain = replace(recipe, path_rate=0.0)
    other = train_transformer(plain, _varied_windows(plain), tmp_path / "c.ckpt", lambda _: None)
    assert not all(torch.equal(whole[name], other[name]) for name in whole), "stochastic depth had no effect"


def test_coarse_scales_come_first_and_every_schedule_gets_its_share() -> None:
    recipe, rng = _varied_recipe(), np.random.default_rng()
    assert recipe.schedules == (ScaleSchedule.from_grids(GRIDS), OBLONG)
    assert {recipe.length_of(rng, 0.39) for _ in range(50)} == set(LENGTHS[:1])
    drawn = [recipe.length_of(rng, 0.41) for _ in range(2000)]
    for length in recipe.lengths:
        assert drawn.count(length) / 2000 == pytest.approx(length.share, abs=0.05)
    assert recipe.share_of(OBLONG) == pytest.approx(0.3 / 1.5)
    with pytest.raises(FoveateError, match="coarse_share needs a length"):
        _varied_recipe(lengths=(Length(scales=4, share=1.0),))
    with pytest.raises(FoveateError, match="path_rate in"):
        _varied_recipe(path_rate=1.0)


@pytest.mark.parametrize(
    "lengths", [(Length(scales=3, share=1.0),), (Length(scales=3, share=0.9), Length(scales=4, share=0.2)), ()]
)
def test_lengths_must_end_with_all_scales_and_add_up(lengths: tuple[Length, ...]) -> None:
    with pytest.raises(FoveateError, match="lengths"):
        TransformerRecipe(
            shape=SHAPE,
            schedule=ScaleSchedule.from_grids(GRIDS),
            lengths=lengths,
            optimisation=Optimisation(minutes=0.0, batch=4, rate=3e-3),
        )


def test_training_can_start_from_given_weights(tmp_path: Path) -> None:
    recipe = TransformerRecipe(
        shape=SHAPE,
        schedule=ScaleSchedule.from_grids(GRIDS),
        lengths=LENGTHS,
        optimisation=Optimisation(minutes=0.0, batch=4, rate=3e-3),
        dtype="float32",
        compiles=False,
    )
    given = _model().state_dict()
    weights = train_transformer(recipe, _windows(recipe), tmp_path / "w.ckpt", lambda _: None, initial=given)
    assert all(torch.equal(weights[name], given[name]) for name in given)


def test_the_shipped_recipe_is_read() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "configs" / "emoji_tiny.yaml", Route(minutes_scale=0.5))
    assert recipe.transformer.optimisation.minutes * 2 == pytest.approx(
        load_recipe(Path(__file__).parents[1] / "configs" / "emoji_tiny.yaml").transformer.optimisation.minutes
    )
    assert recipe.tokenizer.grids == recipe.transformer.schedule.grids
    assert "Microsoft" in recipe.notice


def test_head_stays_float32_in_bfloat16() -> None:
    quantised = quantise(torch.randn(1, 8, 4, 4), GRIDS)
    teacher = _teacher(_model(), dtype=torch.bfloat16)
    with torch.no_grad():
        logits = teacher.logits(pad_texts([torch.randn(3, 12)], 4), quantised.inputs)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float()), "a head in bfloat16 leaves nothing behind its 8 bits"


def test_altered_texts_keep_their_sentence_and_stay_near_it() -> None:
    text_TE = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    lengths = set()
    for seed in range(40):
        altered_TE = alter_text(text_TE, 0.7, np.random.default_rng(seed))
        lengths.add(altered_TE.shape[0])
        assert not torch.equal(altered_TE[0], text_TE[0])
        assert float((altered_TE[0] - text_TE[0]).square().mean().sqrt() / text_TE[0].square().mean().sqrt()) < 1.2
    assert len(lengths) > 4
    assert min(lengths) >= 1
