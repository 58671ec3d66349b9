"""Tiny real models with loud random weights, requests for them, and spies: for tests of core, engine and policies."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from foveate.core.conditions import ClassLabel
from foveate.core.guidance import GuidanceSchedule
from foveate.core.plan import ScalePlan
from foveate.core.policy import Bound, Policy
from foveate.core.protocols import NextScaleModel, Refiner, ScaleTokenizer
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.core.trace import Trace
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, KeyedSampler, Sampler
from foveate.engine.state import Request
from foveate.models.var import VAR, VARConfig
from foveate.policies.registry import load_policy
from foveate.testing.toys import (
    LATENT_CHANNELS,
    TINY_GRIDS,
    randomise,
    text_features,
    tiny_model,
    tiny_tokenizer,
)
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.vq import VQTokenizer

SEEDS = (3, 7, 11)
LENGTHS = (5, 9, 5)
GRIDS = TINY_GRIDS

VAR_GRIDS: tuple[Grid, ...] = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6))
VAR_LABELS = (1, 4, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Toy:
    """A model, a tokenizer and a schedule that belong together."""

    name: str
    model: NextScaleModel
    tokenizer: ScaleTokenizer
    schedule: ScaleSchedule
    refiner: Refiner | None = None

    @property
    def num_blocks(self) -> int:
        return self.model.shape.num_blocks


@cache
def toy(name: str, dtype: torch.dtype = torch.float32) -> Toy:
    """A toy by the name of its grids; tests leave it as it is."""
    grids, patch = GRIDS[name]
    return Toy(
        name=name,
        model=tiny_model(patch, dtype),
        tokenizer=tiny_tokenizer(patch),
        schedule=ScaleSchedule.from_grids(grids, patch=patch),
    )


def make_var(dtype: torch.dtype = torch.float32, *, shared_aln: bool = False) -> VAR:
    """Embeddings are louder than matrices, so that class, level and position all decide."""
    config = VARConfig(
        depth=5,
        width=64,
        heads=4,
        num_classes=10,
        codebook_size=48,
        latent_channels=LATENT_CHANNELS,
        grids=VAR_GRIDS,
        shared_aln=shared_aln,
        ff_width=128,
    )
    model = VAR(config)
    randomise(model, seed=6)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name in ("class_emb.weight", "pos_start", "pos_1LC", "lvl_embed.weight") or name.endswith("ada_gss"):
            parameter.data.normal_(0.0, 0.7, generator=generator)
    return model.requires_grad_(requires_grad=False).to(dtype).eval()


@cache
def toy_var(dtype: torch.dtype = torch.float32, *, shared_aln: bool = False) -> Toy:
    """The toy of the VAR family; tests leave it as it is."""
    config = AutoencoderConfig(
        latent_channels=LATENT_CHANNELS,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        codebook_size=48,
    )
    autoencoder = Autoencoder(config)
    randomise(autoencoder, seed=8)
    return Toy(
        name="var",
        model=make_var(dtype, shared_aln=shared_aln),
        tokenizer=VQTokenizer(autoencoder.requires_grad_(requires_grad=False).eval()),
        schedule=ScaleSchedule.from_grids(VAR_GRIDS),
    )


def make_request(
    schedule: ScaleSchedule,
    seeds: Sequence[int] = SEEDS,
    lengths: Sequence[int] = LENGTHS,
    weights: Sequence[float] = (2.0, 2.5, 3.0, 3.0, 2.0),
    sampler: Sampler | None = None,
    rule: Filter | None = None,
    negatives: Sequence[Tensor] = (),
    hidden_blocks: tuple[int, ...] = (),
    wants_maps: bool = True,
) -> Request:
    """A request whose images each have their own seed and prompt."""
    num_scales = len(schedule)
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule(weights=tuple(weights), hidden_blocks=hidden_blocks),
        temperatures=(0.5, 1.0, 1.5, 1.0, 0.7)[:num_scales],
        filters=(rule or Filter(top_k=0, top_p=0.0),) * num_scales,
        sampler=sampler or KeyedSampler(seeds=tuple(seeds)),
        conditions=(*(text_features(seed, n) for seed, n in zip(seeds, lengths, strict=True)), *negatives),
        num_images=len(seeds),
        wants_maps=wants_maps,
    )


def label_request(
    schedule: ScaleSchedule, seeds: Sequence[int] = SEEDS, labels: Sequence[int] = VAR_LABELS, cfg: float = 1.5
) -> Request:
    """A request for classes, guided as the VAR family is."""
    weights = GuidanceSchedule.from_var(cfg, len(schedule)).weights
    request = make_request(schedule, seeds, (1,) * len(seeds), weights)
    return replace(request, conditions=tuple(ClassLabel(index=label) for label in labels))


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What the sampler saw and chose at one scale."""

    logits: tuple[Tensor, ...]
    kept: tuple[Tensor, ...] | None
    symbols: tuple[Tensor, ...]

    def positions(self, image: int, num_tokens: int) -> list[int]:
        return list(range(num_tokens)) if self.kept is None else self.kept[image].tolist()


@dataclass(kw_only=True)
class SpySampler(Sampler):
    """Notes what another sampler sees and chooses, per scale that ran; may fail at a scale instead."""

    inner: Sampler
    fails_at: int | None = None
    choices: dict[int, Choice] = field(default_factory=dict)

    def thresholds(self, scale, grid, num_images, num_bits):
        return self.inner.thresholds(scale, grid, num_images, num_bits)

    def choose(self, scale, grid, logits, kept, rule):
        if scale == self.fails_at:
            raise RuntimeError("the toy broke")
        return self._noted(scale, logits, kept, self.inner.choose(scale, grid, logits, kept, rule))

    def choose_with_draws(self, scale, grid, logits, kept, rule):
        symbols, drawn = self.inner.choose_with_draws(scale, grid, logits, kept, rule)
        return self._noted(scale, logits, kept, symbols), drawn

    def seed_of(self, image):
        return self.inner.seed_of(image)

    def generator_of(self):
        return self.inner.generator_of()

    def _noted(self, scale, logits, kept, symbols):
        kept = None if kept is None else tuple(kept)
        self.choices[scale] = Choice(logits=tuple(logits), kept=kept, symbols=tuple(symbols))
        return symbols


class SpyBound(Bound):
    """Notes the signals that a bound policy gets and the plans that it gives."""

    def __init__(self, inner: Bound) -> None:
        self.inner = inner
        self.directives, self.is_static = inner.directives, inner.is_static
        self.signals, self.plans = [], []

    @property
    def label(self):
        return self.inner.label

    def record(self, scale):
        return self.inner.record(scale)

    def keeps(self, scale):
        return self.inner.keeps(scale)

    def start(self):
        return self.inner.start()

    def ceiling(self, scale):
        return self.inner.ceiling(scale)

    def ceilings(self, scale):
        return self.inner.ceilings(scale)

    def plan(self, scale, signals, state):
        plan, state = self.inner.plan(scale, signals, state)
        self.signals.append(signals)
        self.plans.append(plan)
        return plan, state


class FixedBound(Bound):
    """Plans that are written down."""

    def __init__(self, plans: Sequence[ScalePlan]) -> None:
        self.plans = tuple(plans)

    def plan(self, scale, signals, state):
        return self.plans[scale], state

    def ceiling(self, scale):
        return replace(self.plans[scale], selections=(), depths=(), unconditional_tokens=(), unconditional=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """A finished run: the latent after every scale, the trace, and what the spies noted."""

    f_hats: tuple[Tensor, ...]
    trace: Trace
    choices: dict[int, Choice]
    bound: SpyBound

    @property
    def f_hat(self) -> Tensor:
        return self.f_hats[-1]


def run(
    subject: Toy,
    policy: Policy | Bound,
    request: Request | None = None,
    model: NextScaleModel | None = None,
    *,
    uses_triton: bool = False,
) -> Result:
    """Runs a policy to the end with spies on it."""
    request = request or make_request(subject.schedule)
    model = model or subject.model
    bound = SpyBound(policy.bind(subject.schedule, model.shape) if isinstance(policy, Policy) else policy)
    spy = SpySampler(inner=request.sampler)
    engine = Engine(model, subject.tokenizer, refiner=subject.refiner, uses_triton=uses_triton)
    steps = list(engine.run(bound, with_sampler(request, spy)))
    f_hats = tuple(step.f_hat_BZHW for step in steps)
    return Result(f_hats=f_hats, trace=steps[-1].trace, choices=spy.choices, bound=bound)


@cache
def cached_run(spec: str, name: str) -> Result:
    """A policy with the usual request on a toy; runs once for all tests, which leave the result as it is."""
    return run(toy(name), load_policy(spec))


def with_sampler(request: Request, sampler: Sampler) -> Request:
    """The same request with another sampler."""
    values = {name: getattr(request, name) for name in request.__slots__}
    return Request(**(values | {"sampler": sampler}))


def checked(policy, field: str, value: object):
    """Runs a policy's own checks on a field: in tests the annotations would refuse some values even earlier."""
    object.__setattr__(policy, field, value)
    policy.__post_init__()


def same_bits(a: Result, b: Result) -> bool:
    """Whether two runs chose the same symbols and made the same latents, bit for bit."""
    if a.choices.keys() != b.choices.keys() or len(a.f_hats) != len(b.f_hats):
        return False
    symbols = all(
        torch.equal(x, y) for s in a.choices for x, y in zip(a.choices[s].symbols, b.choices[s].symbols, strict=True)
    )
    return symbols and all(torch.equal(x, y) for x, y in zip(a.f_hats, b.f_hats, strict=True))
