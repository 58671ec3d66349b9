"""A call, completed from the model's defaults and translated for the engine."""

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, SupportsIndex, cast

import torch

from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.policy import Policy
from foveate.core.schedule import ScaleSchedule, parse_ratio, ratio_name
from foveate.core.warnings import CallWarning
from foveate.engine.sample import Filter
from foveate.families import registry
from foveate.families.spec import Defaults, ModelSpec, per_scale
from foveate.pipeline.options import OPTIONS, Option, Options, checked, finite, is_number, is_whole
from foveate.policies.fit_budget import dialled
from foveate.policies.provenance import Provenance
from foveate.policies.registry import load_policy, provenance_of

Prompts = str | SupportsIndex | Sequence[str | SupportsIndex]
"""One text or several; an index where a model generates classes."""

MAX_SEED = 2**63 - 1

_MOST_IMAGES = 4096
"""Of one prompt in one call: as many fit into no memory, but the list of their seeds still does."""

_NEAREST = 3
"""Sizes that an error names."""

_LARGEST_SIDE, _RATIO_ERROR = 7, 1e-3
"""Of a published ratio, and how far a number may be from it: 1.333 is 4:3."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """A call in the engine's terms, every default filled in.

    `prompts` and `negatives` have one entry per prompt, `seeds` one per image (none with a caller's own generator).
    `guidance_scale` is the family's `cfg` of every scale, `guidance` what it means to the engine.
    `smooth_scales` are the first scale that mixes codes and the first one behind it, None where none does.
    `options` are those of the call, checked; `kept` is what an image's file keeps of them, as it was used. `policy` is
    the family until a budget is fitted (`pipeline.budget`), which may have `notes`; `provenance` is that of its file.
    """

    options: Options
    kept: Mapping[str, Any]
    prompts: tuple[str, ...]
    negatives: tuple[str, ...] | None
    seeds: tuple[int, ...]
    schedule: ScaleSchedule
    ratio: str
    budget: str
    guidance_scale: tuple[float, ...]
    guidance: GuidanceSchedule
    temperatures: tuple[float, ...]
    filters: tuple[Filter, ...]
    smooth_scales: tuple[int, int] | None
    policy: Policy
    notes: tuple[str, ...] = ()
    provenance: Provenance | None = None

    @property
    def asked(self) -> dict[str, float]:
        """The budget that the policy was fitted to, if there is one."""
        names = ("budget", "latency_budget_ms")
        given = {name: cast(dict[str, Any], self.options)[name] for name in names}
        return {name: float(value) for name, value in given.items() if value is not None}

    @property
    def images_per_prompt(self) -> int:
        """Images of each prompt."""
        return int(self.options["num_images_per_prompt"])

    @property
    def num_images(self) -> int:
        """Images of all prompts."""
        return len(self.prompts) * self.images_per_prompt

    def is_batch_invariant(self, has_independent_rows: bool) -> bool:
        """Whether every image gets the bits that it has alone: if asked for, and where that costs nothing.

        The images are then requests of their own, which share their matmuls where rows are independent.
        """
        return self.options["batch_invariant"] or (has_independent_rows and self.options["rng"] == "keyed")

    def per_image(self, per_prompt: Sequence[Any]) -> tuple[Any, ...]:
        """Repeats entries per prompt for each of its images."""
        return tuple(entry for entry in per_prompt for _ in range(self.images_per_prompt))


def resolve(prompts: Prompts, options: Options, spec: ModelSpec) -> Job:
    """Checks a call and completes it from the model's defaults.

    Raises:
        FoveateError: A value that is out of range or does not exist; the message says what does.
    """
    call = checked(options)
    generator = call["generator"]
    if not isinstance(generator, torch.Generator | None):
        raise FoveateError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    texts = _prompts(_listed(prompts, spec), "prompt")
    ratio, budget = _size(call, spec)
    schedule, defaults = spec.schedule(ratio, budget), spec.defaults
    scaled = {
        name: _per_scale(option, cast(dict[str, Any], call)[name], defaults, len(schedule))
        for name, option in OPTIONS.items()
        if option.per_scale
    }
    smooth_scales = _smooth_scales(call["more_smooth"], spec, len(schedule))
    policy, (rows, columns) = load_policy(call["policy"]), schedule.grids[-1]
    policy = policy if call["budget"] is None and call["latency_budget_ms"] is None else dialled(policy)
    used = {
        **call,
        **scaled,
        "width": columns * spec.stride,
        "height": rows * spec.stride,
        "aspect_ratio": ratio_name(ratio),
        "pixels": budget,
        "more_smooth": smooth_scales is not None,
        "policy": policy,
    }
    return Job(
        options=call,
        kept={name: used[name] for name, option in OPTIONS.items() if option.is_kept},
        prompts=texts,
        negatives=_negatives(call["negative_prompt"], len(texts), spec),
        seeds=_seeds(call, len(texts)),
        schedule=schedule,
        ratio=ratio_name(ratio),
        budget=budget,
        guidance_scale=scaled["guidance_scale"],
        guidance=spec.kind.guidance(scaled["guidance_scale"], defaults.guidance_window),
        temperatures=scaled["temperature"],
        filters=tuple(Filter(top_k=k, top_p=p) for k, p in zip(scaled["top_k"], scaled["top_p"], strict=True)),
        smooth_scales=smooth_scales,
        policy=policy,
        provenance=provenance_of(call["policy"]),
    )


def warnings_of(job: Job, spec: ModelSpec, sha256: str, *, is_trained: bool) -> tuple[CallWarning, ...]:
    """Warnings about a call that are known before anything runs.

    Args:
        job: The call.
        spec: The model.
        sha256: Of its weights.
        is_trained: Whether its weights have seen images, so that there are sizes that they never saw.
    """
    found = []
    if is_trained and not (job.budget in spec.budgets and job.ratio in spec.ratios):
        known = f"{', '.join(spec.ratios)} at {', '.join(spec.budgets)}"
        message = (
            f"{spec.name} was trained on {known}; {job.ratio} at {job.budget} is outside of that and may look wrong"
        )
        found.append(CallWarning(code="untrained_size", message=message))
    measured = job.provenance
    if is_trained and measured is not None and not job.asked and not measured.is_of(spec.name, sha256):
        found.append(_measured_elsewhere(str(job.options["policy"]), measured, spec))
    weights = job.guidance.weights
    if max(weights) <= 0:
        asked, without = job.guidance_scale[0], "the negative prompt" if job.negatives else "no prompt at all"
        message = f"guidance_scale {asked:g} ignores the prompt: the image follows {without}; raise it"
        found.append(CallWarning(code="guidance_ignores_prompt", message=message))
    if job.negatives is not None and all(weight == 1 for weight in weights):
        message = f"negative_prompt has no effect without guidance, guidance_scale {job.guidance_scale[0]:g}; raise it"
        found.append(CallWarning(code="negative_prompt_ignored", message=message))
    return tuple(found)


def _measured_elsewhere(policy: str, measured: Provenance, spec: ModelSpec) -> CallWarning:
    """The warning of a setting from another model; metadata holds it, so a file is said by name, without its folder."""
    policy = Path(policy).name
    weights = "" if measured.sha256 is None else f" ({measured.sha256[:12]})"
    kept = f", where it keeps {' and '.join(measured.bound)}" if measured.bound else ""
    message = (
        f"{policy} was chosen on {measured.model}{weights}{kept}; nothing is known of it on these weights of "
        f"{spec.name}: measure it with foveate compare --policy {policy} --model {spec.name}"
    )
    return CallWarning(code="policy_measured_elsewhere", message=message)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise FoveateError(message)


def _entries(name: str, value: object, what: str) -> list[Any]:
    """The entries of a sequence; a text does not count as one."""
    try:
        if isinstance(value, Iterable) and not isinstance(value, str):
            return list(value)
    except TypeError:  # An array without axes says that it can be iterated, but it cannot.
        pass
    raise FoveateError(f"{name} must be {what}, got {value!r}")


def _prompts(texts: list[str], name: str) -> tuple[str, ...]:
    _require(bool(texts), f"{name}s must hold at least one text, got none")
    for text in texts:
        _require(isinstance(text, str), f"{name} must be text, got {type(text).__name__}")
        _require(bool(text.strip()), f"{name} must not be empty; say what to generate" if name == "prompt" else
                 f"{name} must not be empty; leave it out")  # fmt: skip
        _require(_is_plain(text), f"{name} holds characters that are not text (NUL or half a surrogate pair): {text!r}")
    return tuple(texts)


def _is_plain(text: str) -> bool:
    """Whether a text can be stored as UTF-8 and in metadata."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def draws_classes(spec: ModelSpec) -> bool:
    """Whether prompts name classes, by an index too."""
    return spec.conditioning.names_classes


def _listed(prompts: Prompts, spec: ModelSpec) -> list[Any]:
    """Prompts as a list; where they name classes, an index may also come as a number."""
    is_one = isinstance(prompts, str) or is_whole(prompts)
    texts: list[Any] = [prompts] if is_one else _entries("prompt", prompts, "a text, or a list of texts")
    return [str(int(text)) if draws_classes(spec) and is_whole(text) else text for text in texts]


def _smooth_scales(asked: bool | None, spec: ModelSpec, count: int) -> tuple[int, int] | None:
    """Scales that mix codes: from where the model's defaults begin to where guidance ends."""
    defaults = spec.defaults
    *others, last = (family.title for family in registry.FAMILIES if family.can_smooth)
    able = f"{', '.join(others)} and {last}"
    _require(not asked or spec.kind.can_smooth, f"more_smooth is for {able}; {spec.name} samples bits")
    if not (defaults.more_smooth if asked is None else asked):
        return None
    end = defaults.guidance_window[1]
    return defaults.smooth_start, count if end is None else end


def _negatives(negative: str | Sequence[str] | None, num_prompts: int, spec: ModelSpec) -> tuple[str, ...] | None:
    if negative is None:
        return None
    _require(spec.kind.has_negatives, f"{spec.name} is guided by classes and takes no negative_prompt; leave it out")
    one = [negative] * num_prompts if isinstance(negative, str) else None
    texts = one or _entries("negative_prompt", negative, "a text, or one per prompt")
    _require(len(texts) == num_prompts, f"negative_prompt needs one text per prompt, {num_prompts}, got {len(texts)}")
    return _prompts(texts, "negative_prompt")


def _size(call: Options, spec: ModelSpec) -> tuple[float, str]:
    """Template ratio and budget."""
    width, height = call["width"], call["height"]
    if height is not None and width is not None:
        known = spec.sizes()
        wanted = (int(width), int(height))
        if wanted not in known:
            near = sorted(known, key=lambda size: (_distance(wanted, size), size))[:_NEAREST]
            possible = ", ".join(f"{w}x{h}" for w, h in near)
            rest = f"; nearest of {len(known)}" if len(known) > _NEAREST else ""
            raise FoveateError(f"size must be one of {possible} (width x height{rest}), got {wanted[0]}x{wanted[1]}")
        return known[wanted]
    ratio, budget = call["aspect_ratio"], call["pixels"]
    return _ratio(spec.ratios[0] if ratio is None else ratio), spec.budgets[0] if budget is None else budget


def _distance(wanted: tuple[int, int], size: tuple[int, int]) -> float:
    """How far two sizes are apart: both sides as factors, so that area and ratio count."""
    return math.hypot(*(math.log(max(asked, 1)) - math.log(side) for asked, side in zip(wanted, size, strict=True)))


def _ratio(value: object) -> float:
    """Template key of an aspect ratio, as text or as a number."""
    text = str(value)
    if is_number(value) and math.isfinite(value):
        near = Fraction(float(value)).limit_denominator(_LARGEST_SIDE)
        text = str(near) if abs(near - float(value)) < _RATIO_ERROR else text
    return parse_ratio(text)


def _per_scale(option: Option, value: object, defaults: Defaults, count: int) -> tuple[Any, ...]:
    """One value per scale; only a default may have more or fewer values, see `families.spec.per_scale`."""
    name = option.name
    if value is None:
        values: list[Any] = list(per_scale(getattr(defaults, name), count))
    else:
        values = [value] * count if is_number(value) else _entries(name, value, "a number, or one per scale")
    _require(len(values) == count, f"{name} needs one number or {count}, one per scale, got {len(values)}")
    numbers = [finite(name, entry) for entry in values]
    if option.rule is not None:
        for number, entry in zip(numbers, values, strict=True):
            if not option.rule.holds(number):
                raise option.rule.error(name, entry)
    return tuple(int(number) if option.reads is int else number for number in numbers)


def _seeds(call: Options, num_prompts: int) -> tuple[int, ...]:
    if call["generator"] is not None:
        return ()
    per_prompt = int(call["num_images_per_prompt"])
    _require(
        per_prompt <= _MOST_IMAGES,
        f"num_images_per_prompt must be {_MOST_IMAGES} or less in one call, got {per_prompt}; "
        "foveate.pipeline.bulk.draw_rows generates more, batch by batch",
    )
    seed = secrets.randbelow(2**32) if call["seed"] is None else call["seed"]
    if call["rng"] == "reference" and not is_whole(seed):
        raise FoveateError(f'rng="reference" takes one integer seed for the whole batch, got {seed!r}')
    starts = [seed] * num_prompts if is_whole(seed) else _entries("seed", seed, "an integer, or one per prompt")
    _require(len(starts) == num_prompts, f"seed needs one integer or one per prompt, {num_prompts}, got {len(starts)}")
    for start in starts:
        is_ok = is_whole(start) and 0 <= int(start) <= MAX_SEED - per_prompt
        _require(is_ok, f"seed must be an integer in [0, 2^63 - {per_prompt}), got {start!r}")
    starts = [int(start) for start in starts]
    if call["rng"] == "reference":
        return (starts[0],) * (num_prompts * per_prompt)
    return tuple(start + j for start in starts for j in range(per_prompt))
