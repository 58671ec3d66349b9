"""Switti at toy size, with and without memory of earlier scales: batches, policies, costs, conditions, weights."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import cos, sin

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from foveate.core.composition import Composed
from foveate.core.conditions import PooledText
from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import ScaleSchedule
from foveate.engine.forecast import forecast, full_cost
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request
from foveate.models.infinity import Infinity
from foveate.models.switti import Switti, SwittiConfig
from foveate.policies.registry import REGISTRY, load_policy
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.vq import VQTokenizer
from foveate.weights.switti import infer_switti_config, load_switti
from tests.randomness import few
from tests.toys import LENGTHS, SEEDS, Toy, run, same_bits, toy

CONFIG = SwittiConfig(
    depth=3, width=64, heads=4, codebook_size=48, latent_channels=8, num_levels=5, text_width=24, pooled_width=12
)
SIDES = (1, 2, 4, 5, 7)
NEGATIVE_LENGTH = 3
PUBLISHED = SwittiConfig(depth=30, width=1920, heads=30, codebook_size=4096, latent_channels=32, num_levels=14)
PUBLISHED_SIDES = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)

ACTIVE = (
    "ld-pruning",
    "ld-pruning:energy_from=last_computed,fill=zero,skip_last=1,sats_threshold=1000",
    "depthvar:reference_scale=2",
    "skip-scales:count=2",
    "drop-branch:count=3",
    "random-tokens:keep_ratio=0.3,num_scales=2",
    "uniform-depth:fill=identity,keep_ratio=0.7",
    "skip-scales|random-tokens:keep_ratio=0.6|uniform-depth:num_scales=2|drop-branch:count=3",
    "fastvar:skip_last=1,reference_scale=-4",
    "cached-guidance:count=2,keep_ratio=0.3",
    "sparsevar:threshold=0.995,stride=3",
    "skipvar|attention-entropy:num_scales=1",
    "feature-magnitude",
    "token-variance",
    "fovea:shares=[],guided_shares=[0.5]",
    "blocks-per-scale:keep_ratios=[0.6],fill=identity",
    'step-down:steps=["random-tokens","drop-branch"],taken=[0,1]',
)
variants = pytest.mark.parametrize("use_ar", [False, True], ids=["window", "ar"])


def random_state(module: torch.nn.Module, seed: int = 5) -> dict[str, Tensor]:
    """Every weight is drawn, biases and norms too, so that none of them can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, tensor in module.state_dict().items():
        draw = torch.randn(tensor.shape, generator=generator)
        if key == "crop_embed.weight":
            state[key] = draw
        elif tensor.dim() == 1:
            state[key] = 0.2 * draw + key.endswith("weight")
        else:
            state[key] = draw * (tensor.numel() // tensor.shape[0]) ** -0.5
    state.update({key: 3 * tensor for key, tensor in state.items() if key.startswith(("head.", "text_pooler."))})
    return state


@cache
def subject_of(use_ar: bool, dtype: torch.dtype = torch.float32, ff_width: int | None = None) -> Toy:
    model = Switti(replace(CONFIG, use_ar=use_ar, ff_width=ff_width)).requires_grad_(requires_grad=False).eval()
    load_switti(model, random_state(model), dtype=dtype)
    config = AutoencoderConfig(
        latent_channels=8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=48
    )
    autoencoder = Autoencoder(config).requires_grad_(requires_grad=False).eval()
    autoencoder.load_state_dict(random_state(autoencoder))
    schedule = ScaleSchedule.from_grids([(n, n) for n in SIDES])
    return Toy(name="switti", model=model, tokenizer=VQTokenizer(autoencoder), schedule=schedule)


def prompt(seed: int, length: int, config: SwittiConfig = CONFIG) -> PooledText:
    generator = torch.Generator().manual_seed(100 + seed)
    tokens_TE = torch.randn(length, config.text_width, generator=generator)
    return PooledText(tokens_TE=tokens_TE, pooled_F=torch.randn(config.pooled_width, generator=generator))


def request_of(
    subject: Toy, seeds: Sequence[int] = SEEDS, lengths: Sequence[int] = LENGTHS, end: int | None = None
) -> Request:
    """Guided with the features of an empty prompt, up to scale `end` without it."""
    num_scales, negative = len(subject.schedule), prompt(99, NEGATIVE_LENGTH, subject.model.config)
    texts = [prompt(seed, length, subject.model.config) for seed, length in zip(seeds, lengths, strict=True)]
    return Request(
        schedule=subject.schedule,
        guidance=GuidanceSchedule.from_var(3.0, num_scales, end=end),
        temperatures=(1.0,) * num_scales,
        filters=(Filter(top_k=20, top_p=0.95),) * num_scales,
        sampler=KeyedSampler(seeds=tuple(seeds)),
        conditions=(*texts, *[negative] * len(texts)),
        num_images=len(texts),
        wants_maps=True,
    )


@cache
def full_run(use_ar: bool):
    subject = subject_of(use_ar)
    return run(subject, load_policy("full"), request_of(subject))


# Running


@variants
def test_batch_gives_the_codes_of_each_image_alone(use_ar: bool):
    subject, batch = subject_of(use_ar), full_run(use_ar)
    for image, (seed, length) in enumerate(zip(SEEDS, LENGTHS, strict=True)):
        alone = run(subject, load_policy("full"), request_of(subject, [seed], [length]))
        for scale in range(len(SIDES)):
            assert torch.equal(alone.choices[scale].symbols[0], batch.choices[scale].symbols[image])
        assert torch.allclose(alone.f_hat[0], batch.f_hat[image], atol=1e-5)


def test_variants_agree_up_to_the_first_scale_that_could_look_back():
    window, ar = full_run(False), full_run(True)
    assert torch.equal(window.f_hats[0], ar.f_hats[0])
    assert not torch.allclose(torch.cat(window.choices[1].logits), torch.cat(ar.choices[1].logits), atol=1e-2)


@variants
@pytest.mark.parametrize("change", ["tokens", "pooled", "length", "negative"])
def test_every_part_of_the_text_reaches_the_logits(use_ar: bool, change: str):
    subject = subject_of(use_ar)
    request = request_of(subject, [3], [5])
    text, negative = request.conditions
    other = prompt(4, 5)
    conditions = {
        "tokens": (PooledText(tokens_TE=other.tokens_TE, pooled_F=text.pooled_F), negative),
        "pooled": (PooledText(tokens_TE=text.tokens_TE, pooled_F=other.pooled_F), negative),
        "length": (PooledText(tokens_TE=text.tokens_TE[:4], pooled_F=text.pooled_F), negative),
        "negative": (text, other),
    }[change]
    base, result = (
        run(subject, load_policy("full"), replace(request, conditions=c)) for c in (request.conditions, conditions)
    )
    scale = 0 if change != "negative" else len(SIDES) - 1
    assert not torch.allclose(base.choices[scale].logits[0], result.choices[scale].logits[0], atol=1e-2)


@variants
def test_unconditional_rows_end_with_the_window_of_guidance(use_ar: bool):
    subject = subject_of(use_ar)
    request = request_of(subject, end=3)
    result = run(subject, load_policy("full"), request)
    assert [len(scale.work.rows) for scale in result.trace.scales] == [6, 6, 6, 3, 3]
    assert result.trace.cost == full_cost(request, subject.model.shape)
    assert torch.equal(result.f_hats[2], full_run(use_ar).f_hats[2])
    assert not torch.equal(result.f_hats[3], full_run(use_ar).f_hats[3])


@variants
def test_runs_in_bfloat16_close_to_float32(use_ar: bool):
    """Of the logits of scale 0, which have no sampled past: the stream, the modulation and the head are float32."""
    subject = subject_of(use_ar, torch.bfloat16)
    result = run(subject, load_policy("full"), request_of(subject))
    exact, rounded = (torch.cat(r.choices[0].logits) for r in (full_run(use_ar), result))
    assert subject.model.compute_dtype == torch.bfloat16
    assert rounded.dtype == torch.float32
    assert float((exact - rounded).std() / exact.std()) < 0.05
    assert result.f_hat.isfinite().all()


# Policies and costs


@variants
def test_neutral_equals_full(use_ar: bool):
    """All at once; that each neutral policy plans what `full` does is part of the contract tests."""
    subject = subject_of(use_ar)
    neutral = Composed(parts=tuple(policy.neutral() for policy in REGISTRY.values()))
    assert same_bits(run(subject, neutral, request_of(subject)), full_run(use_ar))


def test_every_registered_policy_is_among_the_active_ones():
    names = {part.name for spec in ACTIVE for part in load_policy(spec).parts_of()}
    assert names == set(REGISTRY) - {"full", "late-bfloat16", "kv-eviction"}


@variants
@pytest.mark.parametrize("spec", few(ACTIVE, *ACTIVE[:3], "fastvar:skip_last=1,reference_scale=-4", more=2))
def test_policies_run_and_cost_what_was_forecast(spec: str, use_ar: bool):
    subject = subject_of(use_ar)
    request, shape = request_of(subject), subject.model.shape
    bound = load_policy(spec).bind(subject.schedule, shape)
    result, before = run(subject, bound, request), forecast(bound, request, shape)
    assert result.trace.cost.flops < full_run(use_ar).trace.cost.flops
    assert not same_bits(result, full_run(use_ar))
    assert before == result.trace.cost or not bound.is_static
    assert before.flops >= result.trace.cost.flops
    assert (result.trace.cost.kv_bytes > 0) == use_ar


@pytest.mark.usefixtures("plain_torch")
@variants
@pytest.mark.parametrize("spec", ["full", "random-tokens:keep_ratio=0.3", "drop-branch:count=2"])
def test_flops_agree_with_those_that_torch_counts(spec: str, use_ar: bool):
    subject = subject_of(use_ar)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={flash: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)})
    with counter:
        trace = run(subject, load_policy(spec), request_of(subject)).trace
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    assert counter.get_total_flops() - convolutions == trace.cost.flops


def test_published_shape_has_the_published_size_and_cost():
    """2470.5 M parameters; at 1024 pixels 70.6 TFLOP, or 41.0 without guidance from scale 11 on, for 40 text tokens."""
    with torch.device("meta"):
        model = Switti(PUBLISHED)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(2470.5e6, abs=5e4)
    subject = Toy(
        name="published",
        model=model,
        tokenizer=None,
        schedule=ScaleSchedule.from_grids([(n, n) for n in PUBLISHED_SIDES]),
    )
    for end, expected in ((None, 70.6e12), (11, 41.0e12)):
        request = request_of(subject, [3], [40], end)
        assert full_cost(request, model.shape).flops == pytest.approx(expected, rel=0.03)


# Conditions and positions


def test_guidance_needs_negative_conditions():
    subject = subject_of(False)
    request = request_of(subject, [3], [5])
    with pytest.raises(TypeError, match="give negative conditions"):
        run(subject, load_policy("full"), replace(request, conditions=request.conditions[:1]))


def test_other_conditions_are_refused():
    subject = subject_of(False)
    with pytest.raises(TypeError, match="reads PooledText.*got Tensor"):
        subject.model.prepare([torch.zeros(3, 24)], False)


def test_positions_against_a_loop():
    """First half of the angles by column, second half by row; the last row and column stand at 128 on every grid."""
    subject = subject_of(False)
    for scale, side in enumerate(SIDES):
        table = subject.model.positions(subject.schedule, scale)
        assert table.shape == (side * side, 16)
        for r, c in {(0, 0), (side // 2, side - 1), (side - 1, side // 3)}:
            places = [128.0 * x / max(side - 1, 1) for x in (c, r)]
            angles = [place * 10000 ** (-4 * i / 16) for place in places for i in range(4)]
            expected = [cos(a) for a in angles] + [sin(a) for a in angles]
            assert table[r * side + c].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("field", "value", "match"), [("heads", 5, "multiple of 4"), ("width", 68, "multiple of 8")])
def test_shapes_that_cannot_be_built_are_refused(field: str, value: int, match: str):
    with pytest.raises(FoveateError, match=match):
        replace(CONFIG, **{"heads": 1, field: value})


# Weights


def test_shape_is_read_off_the_weights():
    state = random_state(Switti(CONFIG))
    found = infer_switti_config(state, use_ar=True, heads=4)
    assert found == replace(CONFIG, use_ar=True, ff_width=CONFIG.hidden)
    assert infer_switti_config(state, use_ar=False).heads == 1


def test_constant_buffers_may_be_there_and_everything_else_has_to_fit():
    model = Switti(CONFIG)
    state = random_state(model)
    load_switti(model, {**state, "lvl_1L": torch.zeros(1, 9), "attn_bias_for_masking": torch.zeros(1, 1, 9, 9)})
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    lacking = {key: tensor for key, tensor in state.items() if key != "blocks.1.ffn_norm2.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.ffn_norm2\.weight"):
        load_switti(model, lacking)
    with pytest.raises(CheckpointError, match="1 unknown: pos_1LC"):
        load_switti(model, {**state, "pos_1LC": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="Infinity transformer, expected a Switti transformer"):
        load_switti(model, Infinity(toy("square").model.config).state_dict())


def test_crop_frequencies_stay_exact_in_bfloat16():
    """Rounded to bfloat16 they would turn the angles, 512 times as large, by whole circles."""
    model, exact = Switti(CONFIG), subject_of(False).model
    load_switti(model, random_state(model), dtype=torch.bfloat16)
    assert model.compute_dtype == torch.bfloat16
    assert torch.equal(model.crop_embed((512.0, 512.0, 0.0, 0.0)), exact.crop_embed((512.0, 512.0, 0.0, 0.0)))
    rounded = model.bfloat16().crop_embed((512.0, 512.0, 0.0, 0.0))
    assert not torch.allclose(rounded, exact.crop_embed((512.0, 512.0, 0.0, 0.0)), atol=0.1)
