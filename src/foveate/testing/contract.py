"""The contract of a policy: a frozen record, pure plans below its ceiling, known costs, no effect on batch mates.

Axes: B images, l tokens of a scale, P blocks.
"""

import inspect
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.plan import ScalePlan
from foveate.core.plan_checker import PlanChecker
from foveate.core.policy import Bound, Policy
from foveate.core.schedule import TEMPLATES, ScaleSchedule
from foveate.core.signals import BranchLogits, Decoded, Record, Signal, Signals, SublayerInput
from foveate.core.trace import Trace
from foveate.engine.executor import Engine
from foveate.engine.forecast import forecast
from foveate.engine.state import Request, RequestState, ceiling_tokens
from foveate.policies.full import Full
from foveate.policies.registry import all_policies, load_policy
from foveate.testing.toys import TINY_MODELS, tiny_engine, tiny_request

NUM_IMAGES = 2

SCHEDULES = (
    ScaleSchedule.from_template(1.0, "0.06M"),
    ScaleSchedule.from_template(0.333, "0.25M"),
    ScaleSchedule.from_grids(TEMPLATES[1.75][:5], patch=2),
)
"""A square, a very wide and a patched one, of 5 to 10 scales."""


def check_policy(kind: type[Policy], settings: Sequence[Policy]) -> None:
    """Checks everything.

    Args:
        kind: The class.
        settings: Settings that really do something on five scales of up to 64 tokens and five blocks.

    Raises:
        AssertionError: Names what does not hold.
    """
    assert settings, f"{kind.__name__}: give at least one setting that has an effect"
    check_record(kind)
    for policy in (kind.neutral(), *settings):
        for schedule in SCHEDULES:
            check_plans(policy, schedule)
    check_runs(kind.neutral(), is_neutral=True)
    for policy in settings:
        check_runs(policy)


def check_record(kind: type[Policy]) -> None:
    """A frozen record with defaults, docstrings and a neutral setting of its own class, that a YAML file holds."""
    policy = kind()
    assert policy == kind(**policy.settings()), f"{kind.__name__}: settings() must give its fields"
    assert inspect.getdoc(kind), f"{kind.__name__} needs a docstring"
    assert inspect.getdoc(inspect.getmodule(kind)), f"the module of {kind.__name__} needs a docstring"
    assert isinstance(kind.neutral(), kind), f"{kind.__name__}.neutral() must be one"
    for field in fields(policy):
        try:
            setattr(policy, field.name, field.default)
        except FrozenInstanceError:
            continue
        raise AssertionError(f"{kind.__name__}.{field.name} can be changed; freeze the dataclass")
    if kind.name in all_policies():
        with TemporaryDirectory() as folder:
            policy.to_yaml(Path(folder) / "policy.yaml")
            again = load_policy(Path(folder) / "policy.yaml")
        assert again == policy, f"{kind.__name__} does not come back from YAML: {again}"


def random_signals(
    schedule: ScaleSchedule, scale: int, wanted: frozenset[Record], width: int = 8, num_images: int = NUM_IMAGES
) -> Signals:
    """Random answers to what was asked for, and nothing else; the conditional branch ran all tokens."""
    generator = torch.Generator().manual_seed(scale)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def value(record: Record) -> Tensor:
        if isinstance(record, SublayerInput):
            return noise(num_images, num_tokens, width)
        if isinstance(record, Decoded):
            return noise(num_images, 3, 8 * record.side, 8 * record.side).clamp(-1, 1)
        return noise(num_images, num_tokens).abs()

    num_tokens, latent_grid = schedule.scales[scale].num_tokens, schedule.latent_grid(scale)
    pairs = [(noise(num_tokens, 6), noise(num_tokens, 6)) for _ in range(num_images)]
    last_grid = schedule.latent_grid(len(schedule) - 1)
    return Signals(
        scale=scale,
        grid=schedule.grids[scale],
        residual_BZhw=noise(num_images, 4, *latent_grid) if Signal.RESIDUAL in wanted else None,
        f_hat_BZHW=noise(num_images, 4, *last_grid) if Signal.F_HAT in wanted else None,
        logits=tuple(BranchLogits(cond_kV=cond, uncond_kV=uncond) for cond, uncond in pairs)
        if Signal.LOGITS in wanted
        else None,
        values={record: value(record) for record in sorted(wanted - set(Signal), key=str)},
    )


def plans_of(bound: Bound, schedule: ScaleSchedule, num_images: int = NUM_IMAGES) -> list[ScalePlan]:
    """The plans of all scales, after random signals."""
    plans, state, signals = [], bound.start(), None
    for scale in range(len(schedule)):
        plan, state = bound.plan(scale, signals, state)
        plans.append(plan)
        if plan.runs:
            signals = random_signals(schedule, scale, bound.record(scale), num_images=num_images)
    return plans


def as_data(plan: ScalePlan, num_tokens: int, num_blocks: int) -> list[object]:
    """What a plan says, as plain values that can be compared."""
    keep_Bl = plan.keep(NUM_IMAGES, num_tokens)
    maps = [keep_Bl, *(plan.active(block) for block in range(num_blocks)), plan.weight_Bl, plan.base_weight_Bl]
    maps += [plan.source_Bl, plan.guided_B, *(part.token_map for part in plan.unconditional_tokens)]
    words = [plan.runs, plan.unconditional, plan.difference, plan.fill, plan.base, plan.evict, plan.dtypes]
    parts = [(part.blocks, part.count) for part in plan.sublayers]
    return [*words, parts, *(None if value is None else value.tolist() for value in maps)]


def check_plans(policy: Policy, schedule: ScaleSchedule, shape: ModelShape | None = None) -> None:
    """Two walks over one bound policy agree, the engine takes every plan, and none runs more than its ceiling."""
    if shape is None:
        shape = tiny_engine()[0].model.shape
    bound = policy.bind(schedule, shape)
    checker = PlanChecker(
        policy=policy.spec, num_images=NUM_IMAGES, num_blocks=shape.num_blocks, num_scales=len(schedule)
    )
    pairs = zip(schedule.scales, plans_of(bound, schedule), plans_of(bound, schedule), strict=True)
    for scale, plan, again in pairs:
        where, tokens = f"{policy.spec}, scale {scale.index}", scale.num_tokens
        checker.check(plan, scale.index, tokens)
        same = as_data(plan, tokens, shape.num_blocks) == as_data(again, tokens, shape.num_blocks)
        assert same, f"{where}: the same signals gave another plan"
        limits = ceiling_tokens(bound.ceiling(scale.index), tokens, shape.num_blocks)
        for counts in _counts(plan, tokens, shape.num_blocks):
            assert all(n <= limit for n, limit in zip(counts, limits, strict=True)), f"{where}: more than its ceiling"
            assert not bound.is_static or counts == limits, f"{where}: static, but not what its ceiling counts"
    first = plans_of(bound, schedule)[0]
    assert first.runs, f"{policy.spec}: scale 0 must run"
    assert first.keep(1, 1) is None, f"{policy.spec}: scale 0 must run all of its tokens"


def _counts(plan: ScalePlan, num_tokens: int, num_blocks: int) -> list[list[int]]:
    """Tokens per block of each image."""
    keep_Bl = plan.keep(NUM_IMAGES, num_tokens)
    keep_Bl = torch.ones(NUM_IMAGES, num_tokens, dtype=torch.bool) if keep_Bl is None else keep_Bl
    active = [plan.active(block) for block in range(num_blocks)]
    masks = [keep_Bl if a is None else keep_Bl & a for a in active]
    return [[int(mask[image].sum()) * plan.runs for mask in masks] for image in range(NUM_IMAGES)]


def check_runs(policy: Policy, *, is_neutral: bool = False) -> None:
    """On tiny real models: effects happen or are reported, costs are known before, batching changes nothing."""
    has_effect = False
    for name in TINY_MODELS:
        engine, schedule = tiny_engine(name)
        request = tiny_request(schedule, (3, 7), name=name)
        bound = policy.bind(schedule, engine.model.shape)
        latent, trace = _run(engine, bound, request)
        full, _ = _run(engine, Full().bind(schedule, engine.model.shape), request)
        where = f"{policy.spec} on the {name} model"
        assert bool(torch.isfinite(latent).all()), f"{where}: numbers that are not finite"
        is_same = torch.equal(latent, full)
        assert is_same or not is_neutral, f"{where}: neutral, but not bitwise equal to full"
        has_effect |= not is_same
        _check_cost(bound, request, engine, trace, where)
        fired = {directive.value for directive in trace.fired()}
        promised = {directive.value for directive in bound.directives}
        assert fired <= promised, f"{where}: {fired - promised} happened, but no directive says so"
        assert promised - fired == set(trace.unfired), f"{where}: what never happened is not reported"
    assert has_effect or is_neutral, f"{policy.spec} changed nothing on any model; give a setting that does"
    for name in ("square", "text"):
        _check_company(policy, name)


def _run(engine: Engine, bound: Bound, request: Request) -> tuple[Tensor, Trace]:
    *_, last = engine.run(bound, request)
    return last.f_hat_BZHW, last.trace


def _check_cost(bound: Bound, request: Request, engine: Engine, trace: Trace, where: str) -> None:
    before, after = forecast(bound, request, engine.model.shape), trace.cost
    if bound.is_static:
        assert before == after, f"{where}: static, but {before} was forecast and {after} ran"
        return
    is_below = after.flops <= before.flops and after.tokens <= before.tokens and after.kv_bytes <= before.kv_bytes
    assert is_below, f"{where}: {after} ran, above the forecast {before}"


def _check_company(policy: Policy, name: str) -> None:
    """Three images in one batch, each starting one scale later than the one before, equal each one alone."""
    engine, schedule = tiny_engine(name)
    requests = [tiny_request(schedule, (seed,), name=name) for seed in (3, 7, 11)]
    bounds = [policy.bind(schedule, engine.model.shape) for _ in requests]
    alone = [_run(engine, bound, request)[0] for bound, request in zip(bounds, requests, strict=True)]
    states: list[RequestState] = []
    while not states or not states[-1].is_done:
        if len(states) < len(requests):
            states.append(engine.open(bounds[len(states)], requests[len(states)]))
        for outcome in engine.step([state for state in states if not state.is_done]):
            if isinstance(outcome, Exception):
                raise outcome
    for state, latent in zip(states, alone, strict=True):
        assert torch.equal(state.f_hat_BZHW, latent), f"{policy.spec}: an image changes with its batch"
