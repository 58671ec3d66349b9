"""HART at toy size: the text in front, the savings and their slow twins, the residual, policies, costs, weights."""

import json
import math
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from foveate.core.composition import Composed
from foveate.core.conditions import PlacedText
from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.protocols import RefineInput
from foveate.core.rows import Rows
from foveate.core.trace import Trace
from foveate.engine.executor import Engine
from foveate.engine.forecast import forecast, full_cost
from foveate.engine.sample import (
    Filter,
    KeyedSampler,
    ReferenceSampler,
    SmoothSampler,
    keyed_exponential,
    keyed_uniform,
)
from foveate.engine.state import Request
from foveate.families.hart import FAMILY, hart_guidance
from foveate.families.published import published_model
from foveate.kernels.linear import LEAST_ROWS
from foveate.models.hart import HART, HARTConfig, placed, turned
from foveate.models.residual_diffusion import ResidualDiffusion, StepEmbedding, spaced_steps
from foveate.policies.registry import REGISTRY, load_policy
from foveate.testing.toys import TEXT_TOKENS, TEXT_WIDTH, placed_text, tiny_engine
from foveate.tokenizers.vq import refiner_index
from foveate.weights.hart import infer_hart_config, load_hart
from tests.randomness import few
from tests.toys import Result, Toy, run, same_bits

SEEDS, LENGTHS = (3, 7), (4, 9)
CPU = torch.device("cpu")
ACTIVE = (
    "ld-pruning:skip_last=0",
    "depthvar:reference_scale=2",
    "random-tokens:keep_ratio=0.3,num_scales=2",
    "fastvar:skip_last=1,reference_scale=-4",
    "cached-guidance:count=2,keep_ratio=0.3",
    "skip-scales:count=2",
    "drop-branch:count=3",
    "uniform-depth:fill=identity,keep_ratio=0.7",
    "kv-eviction:keep_first=1,window=1",
    "skip-scales|random-tokens:keep_ratio=0.6|uniform-depth:num_scales=2|drop-branch:count=3",
    "sparsevar:threshold=0.9,stride=2",
    "skipvar|attention-entropy:num_scales=1",
    "feature-magnitude",
    "token-variance",
    "fovea:shares=[],guided_shares=[0.5]",
    "blocks-per-scale:keep_ratios=[0.6],fill=identity",
    'step-down:steps=["random-tokens","drop-branch"],taken=[0,1]',
)


@cache
def subject(dtype: torch.dtype = torch.float32) -> Toy:
    engine, schedule = tiny_engine("text", dtype)
    return Toy(name="text", model=engine.model, tokenizer=engine.tokenizer, schedule=schedule, refiner=engine.refiner)


def nothing() -> PlacedText:
    return PlacedText.nothing(TEXT_TOKENS, TEXT_WIDTH, CPU)


def request_of(images: tuple[int, ...] = (0, 1), negative: PlacedText | None = None) -> Request:
    """Guided as published, mixed codes too."""
    schedule = subject().schedule
    sampler = SmoothSampler(
        inner=KeyedSampler(seeds=tuple(SEEDS[i] for i in images)), num_scales=5, first=0, end=5, is_after_draw=True,
        holds_last=True,
    )  # fmt: skip
    return Request(
        schedule=schedule,
        guidance=hart_guidance((3.0,) * len(schedule), (0, None)),
        temperatures=(1.0,) * len(schedule),
        filters=(Filter(top_k=20, top_p=0.0),) * len(schedule),
        sampler=sampler,
        conditions=(*(placed_text(SEEDS[i], LENGTHS[i]) for i in images), *[negative or nothing()] * len(images)),
        num_images=len(images),
    )


@cache
def full_run() -> Result:
    return run(subject(), load_policy("full"), request_of())


# Running


def test_an_image_alone_has_the_bits_that_it_has_in_company():
    """With mixed codes and the residual; the second image starts a scale later."""
    toy = subject()
    engine, bound = (
        Engine(toy.model, toy.tokenizer, refiner=toy.refiner),
        load_policy("full").bind(toy.schedule, toy.model.shape),
    )
    requests = [request_of((image,)) for image in range(2)]
    alone = [list(engine.run(bound, request))[-1].f_hat_BZHW for request in requests]
    states = [engine.open(bound, request) for request in requests]
    engine.step(states[:1])
    while not states[1].is_done:
        outcomes = engine.step([state for state in states if not state.is_done])
        assert not any(isinstance(outcome, Exception) for outcome in outcomes)
    for state, latent in zip(states, alone, strict=True):
        assert torch.equal(state.f_hat_BZHW, latent)


def test_one_key_stands_for_all_unconditional_ones():
    """The slow twin gives every zero of the unconditional text a row of keys and values of its own."""
    zeros = PlacedText(tokens_TE=torch.zeros(TEXT_TOKENS, TEXT_WIDTH), positions=(0,) * TEXT_TOKENS)
    twin = run(subject(), load_policy("full"), request_of(negative=zeros))
    for scale in range(5):
        pairs = zip(full_run().choices[scale].logits, twin.choices[scale].logits, strict=True)
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in pairs)
    assert torch.allclose(full_run().f_hat, twin.f_hat, atol=1e-4)
    tokens = [result.trace.scales[0].work.rows[(0, False)].block_tokens[0] for result in (full_run(), twin)]
    assert tokens == [2, TEXT_TOKENS]
    lone = replace(nothing(), first_copies=1)
    assert not torch.allclose(
        run(subject(), load_policy("full"), request_of(negative=lone)).f_hat, twin.f_hat, atol=1e-2
    )


@torch.inference_mode()
def test_equals_the_plain_loop():
    """All text tokens of both branches, modulation and levels anew at every scale, nothing left out of the cache."""
    latents = PlainLoop(model=subject().model, sides=(1, 2, 4, 6, 8)).generate(placed_text(SEEDS[0], LENGTHS[0]), 3)
    found = run(subject(), load_policy("full"), request_of((0,))).f_hats
    for plain, ours in zip(latents, found, strict=True):
        assert torch.allclose(plain, ours[0], atol=1e-4)


def test_left_padding_counts_from_minus_one():
    text = placed_text(3, 4)
    left = PlacedText(tokens_TE=text.tokens_TE, positions=(-1,) * 5 + (0, 1, 2, 3))
    request = request_of((0,))
    result = run(subject(), load_policy("full"), replace(request, conditions=(left, nothing())))
    plain = PlainLoop(model=subject().model, sides=(1, 2, 4, 6, 8))
    with torch.inference_mode():
        assert torch.allclose(plain.generate(left, 3)[-1], result.f_hat[0], atol=1e-4)
    assert not torch.allclose(result.f_hat[0], full_run().f_hat[0], atol=1e-2)


def test_runs_in_bfloat16_close_to_float32():
    result = run(subject(torch.bfloat16), load_policy("full"), request_of())
    exact, rounded = (torch.cat(r.choices[0].logits) for r in (full_run(), result))
    assert subject(torch.bfloat16).model.compute_dtype == torch.bfloat16
    assert float((exact - rounded).std() / exact.std()) < 0.05
    assert result.f_hat.isfinite().all()


def test_draws_of_the_published_order_come_again():
    def once(seed: int) -> Tensor:
        inner = ReferenceSampler(generator=torch.Generator().manual_seed(seed))
        return run(subject(), load_policy("full"), replace(request_of((0,)), sampler=inner)).f_hat

    first, again, other = once(4), once(4), once(5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Policies and costs


def test_neutral_equals_full():
    neutral = Composed(parts=tuple(policy.neutral() for policy in REGISTRY.values()))
    assert same_bits(run(subject(), neutral, request_of()), full_run())


def test_every_registered_policy_is_among_the_active_ones():
    names = {part.name for spec in ACTIVE for part in load_policy(spec).parts_of()}
    assert names == set(REGISTRY) - {"full", "late-bfloat16"}


@pytest.mark.parametrize("spec", few(ACTIVE, *ACTIVE[:5], more=1))
def test_policies_run_and_cost_what_was_forecast(spec: str):
    request, shape = request_of(), subject().model.shape
    bound = load_policy(spec).bind(subject().schedule, shape)
    result, before = run(subject(), bound, request), forecast(bound, request, shape)
    assert result.f_hat.isfinite().all()
    assert result.trace.cost.flops < full_run().trace.cost.flops
    assert not same_bits(result, full_run())
    assert before == result.trace.cost or not bound.is_static
    assert before.flops >= result.trace.cost.flops


STEPS = 8 * LEAST_ROWS * 2 * (256 + 32) * 32
"""FLOPs of the embedded steps of one refinement: products of one vector, padded, which costs leave out."""


@pytest.mark.usefixtures("plain_torch")
def test_flops_agree_with_those_that_torch_counts():
    """Without levels and steps of the diffusion, which are products of one vector each."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={flash: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)})
    with counter:
        trace = run(subject(), load_policy("full"), request_of()).trace
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(n for op, n in counts.items() if "convolution" in str(op))
    mixtures = 2 * 48 * 8 * 2 * sum(side**2 for side in (1, 2, 4, 6, 8))
    levels = 5 * LEAST_ROWS * 2 * (256 + 64) * 64
    assert counter.get_total_flops() - convolutions - mixtures - levels - 2 * STEPS == trace.cost.flops
    assert trace.cost.refiner_flops == 2 * 2 * 64 * subject().model.shape.refined_token_flops


@pytest.mark.usefixtures("plain_torch")
def test_each_token_of_a_branch_is_refined_once():
    """Nine tokens, two of them guided: eleven rows in two refinements."""
    with FlopCounterMode(display=False) as counter:
        refined(input_of(uncond_uC=input_of().uncond_uC[[0, 7]], uncond_index_u=torch.tensor([0, 7])))
    assert counter.get_total_flops() == 11 * subject().model.shape.refined_token_flops + 2 * STEPS


@pytest.mark.parametrize(
    ("spec", "tokens"), [("fovea:shares=[],guided_shares=[0.5]", (64, 32)), ("cached-guidance:count=1", (64, None))]
)
def test_refined_tokens_are_counted_by_branch(spec: str, tokens: tuple[int, int | None]):
    rows = run(subject(), load_policy(spec), request_of((0,))).trace.scales[4].work.rows
    found = tuple(rows[(0, c)].refined_tokens if (0, c) in rows else None for c in (True, False))
    assert found == tokens


def test_without_guidance_at_the_last_scale_one_branch_is_refined():
    guidance = GuidanceSchedule(weights=(3.0, 3.0, 1.0, 3.0, 1.0))
    request, shape = replace(request_of((0,)), guidance=guidance), subject().model.shape
    cost = run(subject(), load_policy("full"), request).trace.cost
    assert cost.refiner_flops == 64 * shape.refined_token_flops
    assert cost == full_cost(request, shape)


def test_time_of_the_refiner_is_a_part_of_the_last_scale():
    trace = full_run().trace
    last = trace.scales[-1]
    assert 0 < last.refiner_ms < last.ms
    assert trace.refiner_ms == last.refiner_ms == sum(scale.ms for scale in trace.scales) - trace.transformer_ms
    data = json.loads(trace.dumps())
    assert data["ms"]["refiner"] == trace.refiner_ms
    again = Trace.from_json(data)
    assert (again.cost, again.refiner_ms, again.shape) == (trace.cost, trace.refiner_ms, trace.shape)
    for row in (row for scale in data["scales"] for row in scale["rows"]):
        del row["refined_tokens"]
    del data["scales"][-1]["refiner_ms"], data["shape"]["refined_token_flops"]
    assert Trace.from_json(data).cost.flops == trace.cost.flops - trace.cost.refiner_flops
    assert run(replace(subject(), refiner=None), load_policy("full"), request_of()).trace.refiner_ms == 0


def test_the_published_shape_has_the_published_size_and_cost():
    """0.73 billion parameters; 48.0 TFLOP for an image of 1024 pixels, 4.4 of them for the residual's head."""
    entry = published_model("hart-0.7b")
    assert entry.spec.name == "hart-0.7b-1024px"
    with torch.device("meta"):
        model = HART(entry.spec.transformer)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.73e9, abs=5e6)
    assert sum(p.numel() for p in model.diffloss.parameters()) == pytest.approx(36.6e6, abs=1e5)
    schedule = entry.spec.default_schedule
    text = PlacedText(tokens_TE=torch.zeros(300, 1536), positions=(0,) * 300)
    request = replace(
        request_of((0,)),
        schedule=schedule,
        guidance=hart_guidance((4.5,) * 14, (0, None)),
        conditions=(text, PlacedText.nothing(300, 1536, CPU)),
        filters=(Filter(top_k=0, top_p=0.0),) * 14,
        temperatures=(1.0,) * 14,
    )
    cost = full_cost(request, model.shape)
    assert cost.flops - cost.refiner_flops == pytest.approx(43.6e12, rel=0.01)
    assert cost.refiner_flops == pytest.approx(4.44e12, rel=0.01)


# Guidance and the residual


def test_the_last_scale_is_guided_as_the_one_before():
    weights = hart_guidance((4.5,) * 14, (0, None)).weights
    assert weights[:13] == tuple(1 + 4.5 * k / 13 for k in range(13))
    assert weights[13] == weights[12] == 1 + 4.5 * 12 / 13
    assert hart_guidance((4.5,), (0, None)).weights == (1.0,)


def test_steps_are_those_of_the_published_schedule():
    steps = spaced_steps()
    assert [step.step for step in steps] == [999, 856, 714, 571, 428, 285, 143, 0]
    kept = [0.99996, 0.94508, 0.80451, 0.60374, 0.38273, 0.18464, 0.04885, 2e-9]
    assert [step.kept for step in reversed(steps)] == pytest.approx(kept, rel=1e-4, abs=1e-9)
    assert [step.is_last for step in steps] == [False] * 7 + [True]


def test_the_way_back_ends_where_the_network_points():
    """A network that always says which noise leads from a point to the state brings every start to that point."""
    point, head = torch.tensor([[0.3, -0.7]]), ResidualDiffusion(2, 4, 8, 1)

    class Oracle(torch.nn.Module):
        cond_embed = head.net.cond_embed

        def forward(self, x: Tensor, step: int, condition: Tensor) -> tuple[Tensor, Tensor]:
            kept = next(s.kept for s in spaced_steps() if s.step == step)
            return (x - kept**0.5 * point) / (1 - kept) ** 0.5, torch.full_like(x, -1.0)

    head.net = Oracle()
    noise = torch.randn(8, 5, 2, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = head(torch.zeros(5, 4), None, 1.0, noise)
    assert torch.allclose(found, 0.6 * point.expand(5, 2), atol=1e-5)


def refined(image: RefineInput) -> Tensor:
    with torch.inference_mode():
        return subject().refiner.refine(image)


def input_of(kept: list[int] | None = None, **changes: object) -> RefineInput:
    """What the refiner is given of a 3x3 grid."""
    generator = torch.Generator().manual_seed(2)
    cond, uncond = torch.randn(9, 64, generator=generator), torch.randn(9, 64, generator=generator)
    places = list(range(9)) if kept is None else kept
    values = {
        "scale": 4, "grid": (3, 3), "seed": 5, "cond_kC": cond[places], "uncond_uC": uncond[places],
        "symbols_kd": torch.arange(9)[places][:, None], "weight": 2.5,
        "index_k": None if kept is None else torch.tensor(kept),
    }  # fmt: skip
    return RefineInput(**(values | changes))


def test_a_token_has_its_residual_whatever_runs_beside_it():
    whole = refined(input_of())
    assert torch.allclose(refined(input_of([1, 4, 8])), whole[[1, 4, 8]], atol=1e-5)
    assert not torch.allclose(refined(input_of(seed=6)), whole, atol=1e-2)
    assert not torch.allclose(refined(input_of(weight=1.5)), whole, atol=1e-2)
    assert not torch.allclose(refined(input_of(symbols_kd=torch.zeros(9, 1, dtype=torch.long))), whole, atol=1e-2)


def test_tokens_without_an_unconditional_branch_are_refined_without_guidance():
    whole, alone = refined(input_of()), refined(input_of(uncond_uC=None))
    some = refined(input_of(uncond_uC=input_of().uncond_uC[[0, 7]], uncond_index_u=torch.tensor([0, 7])))
    assert torch.allclose(some[[0, 7]], whole[[0, 7]], atol=1e-5)
    assert torch.allclose(some[1:7], alone[1:7], atol=1e-5)
    assert not torch.allclose(whole, alone, atol=1e-2)
    assert torch.equal(refined(input_of(weight=1.0)), alone)


def test_noise_is_keyed_by_the_stream_of_the_contract():
    """C order over steps, rows, columns and channels, through the inverse of the normal distribution."""
    noise = subject().refiner.noise(input_of())
    u = torch.from_numpy(keyed_uniform(5, 4, (8, 3, 3, 8), 2)).double()
    assert torch.allclose(0.5 * torch.erfc(-noise.double() / math.sqrt(2)), u.flatten(1, 2), atol=1e-6)
    generator = torch.Generator().manual_seed(9)
    drawn = subject().refiner.noise(input_of(seed=None, generator=generator))
    again = torch.Generator().manual_seed(9)
    assert torch.equal(drawn[0], torch.randn(9, 8, generator=again))
    assert torch.equal(drawn[1], torch.randn(18, 8, generator=again)[:9])
    with pytest.raises(FoveateError, match="needs noise"):
        subject().refiner.noise(input_of(seed=None))


def test_dropped_tokens_get_no_residual():
    policy = load_policy("random-tokens:keep_ratio=0.3,num_scales=1")
    with_it, without = (run(toy, policy, request_of()) for toy in (subject(), replace(subject(), refiner=None)))
    added = (with_it.f_hat - without.f_hat).flatten(2)
    for image, kept in enumerate(with_it.choices[4].kept):
        is_kept = torch.zeros(64, dtype=torch.bool).index_fill(0, kept, True)
        assert not added[image][:, ~is_kept].any()
        assert added[image][:, is_kept].abs().amin() > 0


# Positions


def test_positions_against_a_loop():
    """Text turns both halves by its place; an image token its first half by row and its second by column."""
    model, half = subject().model, 8
    text, image = (model.positions(subject().schedule, scale) for scale in (0, 2))
    turn = torch.stack([model._turn(p) for p in (3, 0)])
    x = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(3))
    packed = torch.stack((text[0], image[6]))
    found = turned(x, placed(packed, turn, Rows((1, 1))))
    by_text = [3.0 * 10000 ** (-2 * j / 16) for j in range(half)]
    by_row, by_column = ([place * 10000 ** (-4 * (j % 4) / 16) for j in range(half)] for place in (2.0, 4.0))
    for token, (first, second) in enumerate(((by_text, by_text), (by_row, by_column))):
        for j in range(half):
            a, b = x[token, 0, j].item(), x[token, 0, j + half].item()
            assert found[token, 0, j].item() == pytest.approx(a * math.cos(first[j]) - b * math.sin(first[j]), abs=1e-5)
            expected = b * math.cos(second[j]) + a * math.sin(second[j])
            assert found[token, 0, j + half].item() == pytest.approx(expected, abs=1e-5)


def test_levels_are_cosines_before_sines():
    level = StepEmbedding(4)
    level.mlp[0].weight.data[:, 1] = 1.0
    level.mlp[0].weight.data[:, 129] = -2.0
    level.mlp[2].weight.data.copy_(torch.eye(4))
    angle = 3 * 10000 ** (-1 / 128)
    expected = F.silu(torch.tensor(math.cos(angle) - 2 * math.sin(angle)))
    assert torch.allclose(level(3), expected.expand(4), atol=1e-5)


# Conditions and weights


def test_other_conditions_are_refused():
    with pytest.raises(TypeError, match="reads PlacedText.*got Tensor"):
        subject().model.prepare([torch.zeros(3, TEXT_WIDTH)])
    with pytest.raises(TypeError, match="give negatives"):
        run(subject(), load_policy("full"), replace(request_of((0,)), conditions=(placed_text(3, 4),)))
    with pytest.raises(FoveateError, match="multiple of 4"):
        HARTConfig(depth=1, width=20, heads=2)


def test_shape_is_read_off_the_weights_and_heads_beside_them():
    config = subject().model.config
    state = subject().model.state_dict()
    buffers = {"lvl_1L": torch.zeros(1, 9), "attn_bias_for_masking": torch.zeros(1, 1, 9, 9)}
    buffers |= {"blocks.0.attn.zero_k_bias": torch.zeros(64)}
    assert infer_hart_config(state | buffers, heads=4, text_tokens=TEXT_TOKENS) == config
    facts = {"num_heads": 4, "context_token": TEXT_TOKENS}
    assert FAMILY.transformer.infer(state, facts) == config
    with pytest.raises(CheckpointError, match="do not say how many heads.*config.json with `num_heads` beside them"):
        FAMILY.transformer.infer(state, {})
    model = HART(config)
    load_hart(model, {f"ema_model.{key}": tensor for key, tensor in (state | buffers).items()})
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.ln_wo_grad\.weight"):
        load_hart(model, {key: tensor for key, tensor in state.items() if key != "blocks.1.ln_wo_grad.weight"})


# The plain loop


@dataclass(frozen=True, kw_only=True)
class PlainLoop:
    """The slow twin: every row has all of its tokens, everything is computed where it is used, nothing is packed."""

    model: HART
    sides: tuple[int, ...]

    def generate(self, text: PlacedText, seed: int) -> list[Tensor]:
        """The latent after every scale, of one image with mixed codes."""
        codebook = subject().tokenizer.autoencoder.quantize.embedding.weight
        rows = [
            (text.tokens_TE, [float(p) for p in text.positions]),
            (torch.zeros_like(text.tokens_TE), [0.0] * len(text.positions)),
        ]
        caches = [[([], []) for _ in range(5)] for _ in rows]
        f_hat, latents = torch.zeros(8, 8, 8), []
        for scale, side in enumerate(self.sides):
            weight = 1 + 3.0 * min(scale, 3) / 4
            hidden = [self.hidden(scale, side, f_hat, row, cache) for row, cache in zip(rows, caches, strict=True)]
            cond, uncond = (self.logits(x, row[0]) for x, row in zip(hidden, rows, strict=True))
            logits = weight * cond + (1 - weight) * uncond
            kept = logits.masked_fill(logits < logits.topk(20).values[:, -1:], -torch.inf)
            e, e_smooth = (torch.from_numpy(keyed_exponential(seed, scale, (side**2, 48), s)) for s in (0, 1))
            drawn = (kept.softmax(-1) / e).argmax(-1)
            rho = min(scale, 3) / 4
            weights = ((kept * (1 + rho) - e_smooth.log()) / (0.27 * (1 - 0.95 * rho))).softmax(-1)
            codes = weights @ codebook
            if scale == 4:
                codes = codes + self.residual(hidden, codebook[drawn], weight, seed)
                f_hat = f_hat + codes.T.reshape(8, side, side)
            else:
                f_hat = f_hat + self.enlarged(codes.T.reshape(8, side, side), scale)
            latents.append(f_hat)
        return latents

    def hidden(self, scale: int, side: int, f_hat: Tensor, row: tuple[Tensor, list[float]], cache: list) -> Tensor:
        model, (features, positions) = self.model, row
        if scale == 0:
            x, places = self.embedded(features), [(p, p, True) for p in positions]
        else:
            small = F.interpolate(f_hat[None], size=(side, side), mode="area")[0]
            x = model.word_embed(small.flatten(1).T)
            last = positions[-1]
            places = [(r / side * 8 + last, c / side * 8 + last, False) for r in range(side) for c in range(side)]
        x = x + model.lvl_embed(scale)
        for index in range(5):
            block = model.block(index)
            x = x + self.attention(block, rms(x, block.ln_wo_grad.weight), places, cache[index])
            y = rms(x, block.ln_wo_grad.weight)
            x = x + block.ffn.down_proj(F.silu(block.ffn.gate_proj(y)) * block.ffn.up_proj(y))
        return x[-1:] if scale == 0 else x

    def embedded(self, features: Tensor) -> Tensor:
        return self.model.context_embed(rms(features, self.model.context_norm.weight))

    def attention(self, block: torch.nn.Module, x: Tensor, places: list, held: tuple[list, list]) -> Tensor:
        attn = block.attn
        q, k, v = (x @ attn.qkv_proj.weight.T).chunk(3, dim=-1)
        q, v = q + attn.q_bias, v + attn.v_bias
        q, k, v = (part.unflatten(-1, (4, 16)) for part in (q, k, v))
        held[0].append(turn_plainly(k, places))
        held[1].append(v)
        keys, values = torch.cat(held[0]), torch.cat(held[1])
        scores = torch.einsum("qnd,knd->nqk", turn_plainly(q, places), keys) * 0.25 / 4
        return attn.proj(torch.einsum("nqk,knd->qnd", scores.softmax(-1), values).flatten(1))

    def logits(self, x: Tensor, features: Tensor) -> Tensor:
        norm = self.model.head_nm
        scale, shift = norm.ada_lin[1](F.silu(self.embedded(features).amax(0))).chunk(2)
        return self.model.head(rms(x, norm.ln_wo_grad.weight) * (1 + scale) + shift)

    def residual(self, hidden: list[Tensor], codes: Tensor, weight: float, seed: int) -> Tensor:
        model = self.model
        both = [rms(x + model.word_embed(codes), model.decoder_norm.weight) for x in hidden]
        noise = subject().refiner.noise(input_of(seed=seed, grid=(8, 8)))
        return model.diffloss(*both, weight, noise)

    def enlarged(self, codes: Tensor, scale: int) -> Tensor:
        large = F.interpolate(codes[None], size=(8, 8), mode="bicubic")
        weight, bias = subject().tokenizer.autoencoder.quantize.refiner(refiner_index(scale, 5, 4))
        return (0.5 * large + 0.5 * F.conv2d(large, weight, bias, padding=1))[0]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn_plainly(x: Tensor, places: list[tuple[float, float, bool]]) -> Tensor:
    """Channel pairs (j, j + 8), one token after the other."""
    out = torch.empty_like(x)
    for token, (row, column, is_text) in enumerate(places):
        for j in range(8):
            f = 10000 ** (-2 * j / 16) if is_text else 10000 ** (-4 * (j % 4) / 16)
            a, b = x[token, :, j], x[token, :, j + 8]
            out[token, :, j] = a * math.cos(row * f) - b * math.sin(row * f)
            out[token, :, j + 8] = b * math.cos(column * f) + a * math.sin(column * f)
    return out
