"""The trainers on toy sizes: teacher forcing agrees with the engine, runs resume bit for bit, losses fall."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, ForcedSampler
from foveate.engine.state import Request
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.policies.full import Full
from foveate.tokenizers.accumulate import resize
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer, bits_to_codes, quantise
from foveate.train import loop
from foveate.train.loop import MAX_STEP_S, Optimisation, Run, steps
from foveate.train.recipe import load_recipe
from foveate.train.tokenizer import TokenizerRecipe, composite, pixel_loss, train_tokenizer
from foveate.train.transformer import (
    Examples,
    TeacherSlot,
    TransformerRecipe,
    alter_text,
    bit_loss,
    small_start,
    teacher_logits,
    train_transformer,
)

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))
SHAPE = InfinityConfig(depth=3, width=32, heads=2, bits=8, text_width=12, pool_heads=2, text_tokens=8, ff_width=64)
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


@pytest.mark.parametrize("masked_tokens", [0, 6, 100])
def test_teacher_forcing_agrees_with_the_engine(masked_tokens: int) -> None:
    model, schedule = _model(), ScaleSchedule.from_grids(GRIDS)
    texts = [torch.randn(5, 12), torch.randn(3, 12)]
    quantised = quantise(torch.randn(2, 8, 4, 4), GRIDS)
    with torch.no_grad():
        taught = teacher_logits(model, texts, quantised, schedule, masked_tokens)
    generated = _logits_of_engine(model, texts, list(quantised.bits), schedule)
    assert generated.std() > 0.1
    torch.testing.assert_close(taught, generated, rtol=1e-4, atol=1e-4)


def test_teacher_slot_matches_one_masked_call() -> None:
    q, k, v = (torch.randn(2 * 30, 2, 8) for _ in range(3))
    ends = [1, 5, 14, 30]
    mask = torch.zeros(30, 30, dtype=torch.bool)
    for begin, end in zip([0, *ends], ends, strict=False):
        mask[begin:end, :end] = True
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.view(2, 30, 2, 8).transpose(1, 2) for t in (q, k, v)), attn_mask=mask, scale=0.7
    )
    got = TeacherSlot(GRIDS, 2, 6, "cpu").attend(q, k, v, 0.7)
    torch.testing.assert_close(got, want.transpose(1, 2).reshape(60, 2, 8), rtol=1e-5, atol=1e-5)


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


def _drawings() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (4, 32, 32, 4), dtype=np.uint8)


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
    whole = train_tokenizer(recipe, _drawings(), tmp_path / "a.ckpt", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(recipe, _drawings(), tmp_path / "b.ckpt", _stop_after(1))
    resumed = train_tokenizer(recipe, _drawings(), tmp_path / "b.ckpt", lambda _: None)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_pause_does_not_eat_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 1.0, 5000.0, 5000.0, 5001.0, 5001.0, 5002.0, 5002.0, 5003.0, 5003.0, 5004.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(now))
    o = Optimisation(minutes=8 / 60, batch=1, rate=0.1)
    run = Run.start(torch.nn.Linear(2, 2), o)
    for _ in steps(run, o, tmp_path / "c.ckpt", lambda _: None):
        pass
    assert run.clock_s == pytest.approx(MAX_STEP_S + 4)
    assert run.step == 5


def test_training_lowers_both_losses(tmp_path: Path) -> None:
    pixels = composite(_drawings())
    assert pixel_loss(pixels, pixels) == 0
    lines: list[str] = []
    recipe = TransformerRecipe(
        shape=SHAPE,
        schedule=ScaleSchedule.from_grids(GRIDS),
        optimisation=Optimisation(minutes=4 / 60, batch=4, rate=3e-3, warmup_steps=5),
        flip_rate=0.0,
        short_scales=3,
        dtype="float32",
    )
    texts = tuple((torch.randn(3, 12),) for _ in range(2))
    examples = Examples(latents=torch.randn(2, 8, 4, 4), captions=texts)
    weights = train_transformer(recipe, examples, tmp_path / "t.ckpt", lines.append)
    trained = Infinity(SHAPE)
    trained.load_state_dict(weights)
    quantised = quantise(examples.latents, GRIDS)
    with torch.no_grad():
        logits = teacher_logits(trained, [t[0] for t in texts], quantised, recipe.schedule)
    assert float(bit_loss(logits, quantised, 0.0)[0]) < 0.6, "0.69 is a coin"


def test_training_can_start_from_given_weights(tmp_path: Path) -> None:
    recipe = TransformerRecipe(
        shape=SHAPE,
        schedule=ScaleSchedule.from_grids(GRIDS),
        optimisation=Optimisation(minutes=0.0, batch=4, rate=3e-3),
        dtype="float32",
    )
    given = _model().state_dict()
    examples = Examples(latents=torch.randn(2, 8, 4, 4), captions=((torch.randn(3, 12),),) * 2)
    weights = train_transformer(recipe, examples, tmp_path / "w.ckpt", lambda _: None, initial=given)
    assert all(torch.equal(weights[name], given[name]) for name in given)


def test_the_shipped_recipe_is_read() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "configs" / "emoji_tiny.yaml", minutes_scale=0.5)
    assert recipe.transformer.optimisation.minutes * 2 == pytest.approx(
        load_recipe(Path(__file__).parents[2] / "configs" / "emoji_tiny.yaml").transformer.optimisation.minutes
    )
    assert recipe.tokenizer.grids == recipe.transformer.schedule.grids
    assert "Microsoft" in recipe.notice


def test_head_stays_float32_under_autocast() -> None:
    model, schedule = _model(), ScaleSchedule.from_grids(GRIDS)
    quantised = quantise(torch.randn(1, 8, 4, 4), GRIDS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = teacher_logits(model, [torch.randn(3, 12)], quantised, schedule)
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
