"""The VAR transformer against a slow twin without packing or cache, and what the engine promises on a toy of it."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from foveate.core.composition import Composed
from foveate.core.conditions import ClassLabel
from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import ScaleSchedule
from foveate.engine.forecast import forecast, full_cost
from foveate.engine.sample import Filter, ForcedSampler, KeyedSampler, Sampler
from foveate.models.var import VARConfig
from foveate.policies.registry import REGISTRY, load_policy
from tests.randomness import few, generator
from tests.toys import SEEDS, VAR_GRIDS, VAR_LABELS, Result, Toy, label_request, run, same_bits, text_features, toy_var

ACTIVE = (
    "full",
    "ld-pruning:sats_threshold=0.1",
    "depthvar:fill=identity",
    "skip-scales",
    "drop-branch:count=2",
    "random-tokens:keep_ratio=0.5",
    "uniform-depth:fill=identity",
    "kv-eviction:keep_first=1,window=1",
    "sparsevar:threshold=0.995,stride=3",
    "attention-entropy:num_scales=1",
    "feature-magnitude",
    "token-variance",
    "fovea:shares=[],guided_shares=[0.5]",
    "blocks-per-scale:keep_ratios=[0.6],fill=identity",
    'step-down:steps=["random-tokens","drop-branch"],taken=[0,1]',
)
"""Policies whose fills need no resizing of what was kept, and that decode nothing: torch counts those as products."""


def test_every_registered_policy_is_among_the_active_ones():
    names = {part.name for spec in ACTIVE for part in load_policy(spec).parts_of()}
    assert names == set(REGISTRY) - {"fastvar", "cached-guidance", "late-bfloat16", "skipvar"}


# 1. The slow twin


def dense_logits(toy: Toy, label: int, ids: list[Tensor]) -> Tensor:
    """Logits (L, V) of all scales at once under a block-causal mask, written out in float64; `ids` are given."""
    w = {name: tensor.double() for name, tensor in toy.model.state_dict().items()}
    config, num_scales = toy.model.config, len(toy.schedule)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x_LC: Tensor) -> Tensor:
        centred = x_LC - x_LC.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    class_C = w["class_emb.weight"][label]
    active_C = class_C * class_C.sigmoid()
    inputs = [(class_C + w["pos_start"][0, 0])[None]]
    f_hat = torch.zeros(1, config.latent_channels, *toy.schedule.grids[-1])
    for scale in range(1, num_scales):
        before, grid = toy.schedule.grids[scale - 1], toy.schedule.grids[scale]
        f_hat = toy.tokenizer.add(f_hat, toy.tokenizer.residual(ids[scale - 1][None], before), scale - 1, num_scales)
        tokens = F.interpolate(f_hat.double(), size=grid, mode="area")[0].flatten(1).T
        inputs.append(linear(tokens, "word_embed"))
    level_L = torch.cat([torch.full((h * w,), scale) for scale, (h, w) in enumerate(toy.schedule.grids)])
    x_LC = torch.cat(inputs) + w["lvl_embed.weight"][level_L] + w["pos_1LC"][0]
    is_hidden = level_L[:, None] < level_L[None]
    for i in range(config.depth):
        block = f"blocks.{i}"
        if config.shared_aln:
            six = linear(active_C, "shared_ada_lin.1") + w[f"{block}.ada_gss"].flatten()
        else:
            six = linear(active_C, f"{block}.ada_lin.1")
        gate1, gate2, scale1, scale2, shift1, shift2 = six.view(6, -1)
        h = norm(x_LC) * (1 + scale1) + shift1
        q, k, v = (h @ part.T for part in w[f"{block}.attn.mat_qkv.weight"].chunk(3))
        q, v = q + w[f"{block}.attn.q_bias"], v + w[f"{block}.attn.v_bias"]
        q, k, v = (part.unflatten(-1, (config.heads, -1)) for part in (q, k, v))
        gain = w[f"{block}.attn.scale_mul_1H11"].flatten().exp().clamp(max=100)[:, None]
        q, k = gain * q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        weights = torch.einsum("qnd,knd->nqk", q, k).masked_fill(is_hidden, -torch.inf).softmax(-1)
        mixed = torch.einsum("nqk,knd->qnd", weights, v).flatten(1)
        x_LC = x_LC + gate1 * linear(mixed, f"{block}.attn.proj")
        h = norm(x_LC) * (1 + scale2) + shift2
        h = linear(h, f"{block}.ffn.fc1")
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x_LC = x_LC + gate2 * linear(h, f"{block}.ffn.fc2")
    scale, shift = linear(active_C, "head_nm.ada_lin.1").view(2, -1)
    return linear(norm(x_LC) * (1 + scale) + shift, "head")


@pytest.mark.parametrize("shared_aln", [False, True])
def test_scale_by_scale_equals_all_scales_at_once(shared_aln: bool):
    """Guided logits of every scale and image, on codes that are given; one head's temperature is beyond its limit."""
    toy = toy_var(shared_aln=shared_aln)
    toy = replace(toy, model=copy.deepcopy(toy.model))
    toy.model.block(1).attn.scale_mul_1H11.data[0, 2] = 5.0
    source = generator(1)
    ids = [torch.randint(48, (3, h * w, 1), generator=source) for h, w in VAR_GRIDS]
    request = replace(label_request(toy.schedule), sampler=ForcedSampler(symbols=tuple(ids)))
    choices = run(toy, load_policy("full"), request).choices
    for image, label in enumerate(VAR_LABELS):
        cond, uncond = (dense_logits(toy, index, [part[image] for part in ids]) for index in (label, 10))
        parts = zip(*(x.split([h * w for h, w in VAR_GRIDS]) for x in (cond, uncond)), strict=True)
        for scale, (cond_lV, uncond_lV) in enumerate(parts):
            guide, temperature = 1 + 1.5 * scale / 4, request.temperatures[scale]
            wanted = (guide * cond_lV + (1 - guide) * uncond_lV) / temperature
            found = choices[scale].logits[image][:, 0]
            assert found.dtype == torch.float32
            assert torch.allclose(found.double(), wanted, atol=2e-4 * float(wanted.std()), rtol=0)


def test_codes_depend_on_class_and_seed():
    """Otherwise the tests below would prove little."""
    toy = toy_var()
    first = run(toy, load_policy("full"), label_request(toy.schedule, SEEDS[:1], [1]))
    for seed, label in ((3, 2), (7, 1)):
        other = run(toy, load_policy("full"), label_request(toy.schedule, [seed], [label]))
        assert not torch.equal(first.choices[2].symbols[0], other.choices[2].symbols[0])
    assert len(first.choices[4].symbols[0].unique()) > 5


def test_shared_modulation_equals_one_projection_per_block():
    shared = toy_var(shared_aln=True)
    separate = toy_var()
    state = dict(shared.model.state_dict())
    weight, bias = state.pop("shared_ada_lin.1.weight"), state.pop("shared_ada_lin.1.bias")
    for i in range(5):
        state[f"blocks.{i}.ada_lin.1.weight"] = weight
        state[f"blocks.{i}.ada_lin.1.bias"] = bias + state.pop(f"blocks.{i}.ada_gss").flatten()
    model = type(separate.model)(separate.model.config)
    model.load_state_dict(state)
    labels = [ClassLabel(index=index) for index in (0, 9)]
    one, many = (m.prepare(labels, True) for m in (shared.model, model.requires_grad_(requires_grad=False)))
    assert torch.allclose(one.modulation_PR6C, many.modulation_PR6C, atol=1e-5)
    assert torch.equal(one.head_R2C, many.head_R2C)
    assert shared.model.shape.row_flops < separate.model.shape.row_flops


def test_bfloat16_keeps_logits_in_float32_and_stays_near():
    exact, rough = toy_var(), toy_var(torch.bfloat16)
    ids = tuple(choice for choice in ids_of(run(exact, load_policy("full"), label_request(exact.schedule))))
    request = replace(label_request(exact.schedule), sampler=ForcedSampler(symbols=ids))
    results = [run(toy, load_policy("full"), request).choices for toy in (exact, rough)]
    for scale in range(5):
        fine, coarse = (result[scale].logits[0] for result in results)
        assert coarse.dtype == torch.float32
        assert 0 < float((fine - coarse).abs().max()) < 0.2 * float(fine.std())


def ids_of(result: Result) -> list[Tensor]:
    return [torch.stack(choice.symbols) for choice in result.choices.values()]


# 2. The engine's promises


@pytest.mark.parametrize("rule", [Filter(top_k=1, top_p=0.0), Filter(top_k=20, top_p=0.9)])
def test_neutral_equals_full(rule: Filter):
    """All at once; that each neutral policy plans what `full` does is part of the contract tests."""
    toy = toy_var()
    request = replace(label_request(toy.schedule), filters=(rule,) * 5)
    neutral = Composed(parts=tuple(policy.neutral() for policy in REGISTRY.values()))
    assert same_bits(run(toy, neutral, request), run(toy, load_policy("full"), request))


@pytest.mark.parametrize("spec", few(ACTIVE, "full", "ld-pruning:sats_threshold=0.1", "depthvar:fill=identity", more=2))
def test_batch_gives_the_codes_of_each_image_alone(spec: str):
    toy, policy = toy_var(), load_policy(spec)
    batch = run(toy, policy, label_request(toy.schedule))
    for image, (seed, label) in enumerate(zip(SEEDS, VAR_LABELS, strict=True)):
        alone = run(toy, policy, label_request(toy.schedule, [seed], [label]))
        assert alone.choices.keys() == batch.choices.keys()
        for scale, choice in alone.choices.items():
            assert torch.allclose(choice.logits[0], batch.choices[scale].logits[image], atol=1e-3)
            assert torch.equal(choice.symbols[0], batch.choices[scale].symbols[image])
        assert torch.allclose(alone.f_hat[0], batch.f_hat[image], atol=1e-4)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    "spec",
    few(ACTIVE, "full", "depthvar:fill=identity", "drop-branch:count=2", "attention-entropy:num_scales=1", more=2),
)
def test_flops_agree_with_those_that_torch_counts(spec: str):
    """Every other one with the modulation of all blocks in one projection."""
    toy, policy = toy_var(shared_aln=ACTIVE.index(spec) % 2 == 0), load_policy(spec)
    request = label_request(toy.schedule, SEEDS[:2], VAR_LABELS[:2])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={flash: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)})
    with counter:
        result = run(toy, policy, request)
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    assert convolutions > 0
    assert counter.get_total_flops() - convolutions == result.trace.cost.flops
    full = full_cost(request, toy.model.shape)
    assert (result.trace.cost.flops < full.flops) == (spec != "full")
    bound = policy.bind(toy.schedule, toy.model.shape)
    before = forecast(bound, request, toy.model.shape)
    assert before == result.trace.cost if bound.is_static else before.flops >= result.trace.cost.flops


def test_stored_deltas_fill_as_well():
    toy = toy_var()
    for spec in ("depthvar", "uniform-depth", "ld-pruning|depthvar"):
        assert not same_bits(*(run(toy, load_policy(s), label_request(toy.schedule)) for s in (spec, "full")))


def test_unguided_scale_zero_fills_the_unconditional_cache():
    toy = toy_var()
    rows = [scale.work.rows for scale in run(toy, load_policy("full"), label_request(toy.schedule)).trace.scales]
    assert rows[0][(0, False)].block_tokens == (1,) * 5
    assert [row[(0, False)].head_tokens for row in rows] == [0, 4, 9, 16, 36]
    plain = run(toy, load_policy("full"), label_request(toy.schedule, cfg=0.0))
    assert all((0, False) not in scale.work.rows for scale in plain.trace.scales)


def test_given_unconditional_class_equals_the_model_s_own():
    toy = toy_var()
    request = label_request(toy.schedule)
    explicit = replace(request, conditions=request.conditions + (ClassLabel(index=10),) * 3)
    assert same_bits(run(toy, load_policy("full"), request), run(toy, load_policy("full"), explicit))


class OneHotSampler(Sampler):
    """Weights of all codes in place of the ids that are given."""

    def __init__(self, ids: list[Tensor]) -> None:
        self.ids = ids

    def choose(self, scale, grid, logits, kept, rule):
        return [F.one_hot(ids[:, 0], 48).float() for ids in self.ids[scale]]


def test_soft_symbols_are_committed():
    """Weights of all codes instead of ids: one-hot ones change nothing."""
    toy = toy_var()
    request = label_request(toy.schedule)
    hard = run(toy, load_policy("full"), request)
    soft = run(toy, load_policy("full"), replace(request, sampler=OneHotSampler(ids_of(hard))))
    assert soft.choices[4].symbols[0].is_floating_point()
    assert torch.allclose(hard.f_hat, soft.f_hat, atol=1e-5)


# 3. Refusals


def test_a_prompt_is_no_class():
    with pytest.raises(TypeError, match="needs a ClassLabel, got Tensor"):
        toy_var().model.prepare([text_features(1, 4)], False)


@pytest.mark.parametrize("index", [-1, 11])
def test_unknown_class_is_refused(index: int):
    with pytest.raises(FoveateError, match=f"class must be 0 to 9, or 10 for none, got {index}"):
        toy_var().model.prepare([ClassLabel(index=index)], True)


def test_other_grids_are_refused():
    toy = toy_var()
    schedule = ScaleSchedule.from_grids(((1, 1), (2, 2), (3, 3), (4, 4), (8, 8)))
    request = replace(
        label_request(schedule), guidance=GuidanceSchedule.from_var(1.5, 5), sampler=KeyedSampler(seeds=SEEDS)
    )
    with pytest.raises(FoveateError, match="positions for the grids 1x1 2x2 3x3 4x4 6x6 only, got .* 8x8"):
        run(replace(toy, schedule=schedule), load_policy("full"), request)


def test_shapes_that_cannot_be_built_are_refused():
    with pytest.raises(FoveateError, match="width must be a multiple of heads, got 10 and 4"):
        VARConfig(depth=1, width=10, heads=4)
    with pytest.raises(FoveateError, match="grids must begin with"):
        VARConfig(depth=1, width=8, heads=4, grids=((2, 2), (4, 4)))


class Foreign:
    """Something that another model might prepare."""

    def keep(self, rows):
        return self

    def join(self, others):
        return self


def test_what_another_model_prepared_is_refused():
    toy = toy_var()
    with pytest.raises(TypeError, match="what its model's prepare returned, got Foreign"):
        toy.model.start(Foreign())
    with pytest.raises(TypeError, match="got Foreign"):
        toy.model.prepare([ClassLabel(index=1)], True).join([Foreign()])
