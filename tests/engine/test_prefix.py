"""Families with a text in front of the first scale, and with a step between sampling and commit."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.protocols import BlockContext, PrefixTokens, RefineInput
from foveate.core.rows import Rows
from foveate.engine.executor import Engine
from foveate.engine.forecast import forecast
from foveate.engine.sample import keyed_uniform
from foveate.engine.state import Request
from foveate.models.infinity import Infinity
from foveate.policies.registry import load_policy
from tests.engine.naive import GrowingSlot, added, codes_of, enter, logits_of, sample_bits
from tests.toys import FixedBound, Toy, make_request, text_features, tiny_model, toy

SEEDS, LENGTHS = (3, 7), (5, 8)


class Prefixed:
    """The toy of bits with its text in front of the first scale; everything else is the toy's own."""

    def __init__(self) -> None:
        self.inner = tiny_model()
        self.shape = replace(self.inner.shape, has_text_prefix=True)
        self.rows: dict[int, list[Tensor]] = {}

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def prepare(self, conditions, is_guided):
        prepared = self.inner.prepare(conditions, is_guided)
        texts = [*conditions, *(self.inner.unconditional(len(text)) for text in conditions)]
        self.rows[id(prepared)] = [prefix_of(text) for text in texts]
        return prepared

    def prefix(self, prepared) -> PrefixTokens:
        rows = self.rows.pop(id(prepared))
        counts = tuple(len(row) for row in rows)
        positions = torch.cat([rotation_of(self.inner, count) for count in counts])
        return PrefixTokens(x_nC=torch.cat(rows), rotation_nD=positions, counts=counts)


def prefix_of(text_TE: Tensor) -> Tensor:
    """Hidden states of all text tokens but the last."""
    return text_TE[:-1].repeat(1, 2)


def rotation_of(model: Infinity, count: int) -> Tensor:
    """Positions of a prefix: those of as many tokens of a large grid."""
    return model.positions(toy("square").schedule, 4)[:count]


@dataclass(frozen=True)
class Adds:
    """Adds a map of the branches' hidden states and keyed noise to the latents of the last scale."""

    def refine(self, image: RefineInput) -> Tensor:
        noise_lZ = noise_of(image.seed, image.scale, image.grid)
        index = slice(None) if image.index_k is None else image.index_k
        return refined(image.cond_kC, image.uncond_uC, image.weight, image.symbols_kd, noise_lZ[index])


def noise_of(seed: int, scale: int, grid: tuple[int, int]) -> Tensor:
    return torch.from_numpy(keyed_uniform(seed, scale, (*grid, 8), stream=2)).float().flatten(0, 1)


def refined(cond: Tensor, uncond: Tensor | None, weight: float, symbols: Tensor, noise: Tensor) -> Tensor:
    mixed = cond if uncond is None else weight * cond + (1 - weight) * uncond
    return 0.1 * mixed[:, :8] + 0.2 * noise + 0.05 * symbols


@torch.inference_mode()
def generate(subject: Toy, request: Request, image: int, is_refined: bool) -> tuple[list[Tensor], Tensor]:
    """The plain loop of one image: a text of both rows in front, all tokens of a scale see each other."""
    model, schedule = subject.model, subject.schedule
    text_TE = text_features(SEEDS[image], LENGTHS[image])
    prepared = model.prepare([text_TE], True)
    texts = [text_TE, model.unconditional(len(text_TE))]
    slots = [GrowingSlot(2) for _ in range(5)]
    f_hat = torch.zeros(1, 8, *schedule.grids[-1])
    latents = []
    for scale, (h, w) in enumerate(schedule.grids):
        own = enter(subject, f_hat, scale).repeat(2, 1, 1) if scale else model.start(prepared)[:, None]
        rotation = model.positions(schedule, scale)
        ahead = 0
        if scale == 0:
            own = torch.cat((torch.stack([prefix_of(text) for text in texts]), own), dim=1)
            ahead = len(text_TE) - 1
            rotation = torch.cat((rotation_of(model, ahead), rotation))
        rows = Rows((ahead + h * w,) * 2)
        x = own.flatten(0, 1)
        for index in range(5):
            context = BlockContext(rows=rows, prepared=prepared, rotation_nD=rotation.repeat(2, 1), slot=slots[index])
            for sublayer in range(3):
                x = x + added(model.block(index).change(sublayer, x, context), rows)
        x = x.unflatten(0, (2, -1))[:, ahead:].flatten(0, 1)
        cond, uncond = logits_of(model, x, Rows((h * w,) * 2), prepared).chunk(2)
        weight, inverse = request.guidance.weights[scale], 1 / request.temperatures[scale]
        logits = weight * (cond * inverse) + (1 - weight) * (uncond * inverse)
        bits = sample_bits(logits, range(h * w), h * w, SEEDS[image], scale, request.filters[scale])
        residual = codes_of(bits, (h, w), 1)[None]
        if is_refined and scale == len(schedule.grids) - 1:
            hidden, other = x.chunk(2)
            more = refined(hidden, other, weight, bits, noise_of(SEEDS[image], scale, (h, w)))
            residual = residual + more.T.unflatten(-1, (h, w))[None]
        f_hat = f_hat + F.interpolate(residual, size=f_hat.shape[-2:], mode="bilinear", align_corners=False)
        latents.append(f_hat)
    return latents, residual


@pytest.mark.parametrize("is_refined", [False, True])
def test_a_text_in_front_and_a_refinement_equal_the_plain_loop(is_refined: bool):
    subject = toy("square")
    request = make_request(subject.schedule, SEEDS, LENGTHS)
    engine = Engine(Prefixed(), subject.tokenizer, refiner=Adds() if is_refined else None)
    bound = load_policy("full").bind(subject.schedule, engine.model.shape)
    steps = [step.f_hat_BZHW for step in engine.run(bound, request)]
    for image in range(2):
        latents, _ = generate(subject, request, image, is_refined)
        assert all(torch.allclose(a[image], b[0], atol=1e-4) for a, b in zip(steps, latents, strict=True))


@pytest.mark.parametrize("spec", ["full", "drop-branch:count=2", "kv-eviction:keep_first=1,window=1", "depthvar"])
def test_costs_and_memory_of_a_text_in_front_are_known_before(spec: str):
    """The text runs all blocks at scale 0, reaches no head, and is never evicted."""
    subject = toy("square")
    engine = Engine(Prefixed(), subject.tokenizer)
    request = make_request(subject.schedule, SEEDS, LENGTHS)
    bound = load_policy(spec).bind(subject.schedule, engine.model.shape)
    *_, last = engine.run(bound, request)
    assert forecast(bound, request, engine.model.shape) == last.trace.cost
    row = last.trace.scales[0].work.rows[(1, True)]
    assert (row.block_tokens, row.head_tokens) == ((LENGTHS[1],) * 5, 1)


def test_requests_with_texts_in_front_go_together():
    subject = toy("square")
    engine = Engine(Prefixed(), subject.tokenizer, refiner=Adds())
    bound = load_policy("random-tokens:num_scales=2").bind(subject.schedule, engine.model.shape)
    requests = [make_request(subject.schedule, [seed], [n]) for seed, n in zip(SEEDS, LENGTHS, strict=True)]
    alone = [[step.f_hat_BZHW for step in engine.run(bound, request)] for request in requests]
    states = [engine.open(bound, request) for request in requests]
    for scale in range(5):
        for outcome, expected in zip(engine.step(states), alone, strict=True):
            assert torch.equal(outcome.f_hat_BZHW, expected[scale])


def test_a_plan_that_leaves_out_tokens_of_the_text_is_refused():
    from foveate.core.plan import DepthMap, ScalePlan  # noqa: PLC0415 - of this test alone

    subject = toy("square")
    engine = Engine(Prefixed(), subject.tokenizer)
    depth = DepthMap(depth_Bl=torch.tensor([[2]]), order=tuple(range(5)), counts=(1, 1, 0, 0, 0))
    with pytest.raises(ValueError, match="scale 0 of this model holds its text; run all of it"):
        list(engine.run(FixedBound([ScalePlan(depths=(depth,))] * 5), make_request(subject.schedule, SEEDS, LENGTHS)))
