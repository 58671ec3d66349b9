"""The public call's options: checked, completed from the model's defaults, put into the engine's words, once."""

import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex, TypedDict, TypeGuard

import torch

from foveate.core.errors import FoveateError, unknown
from foveate.core.guidance import GuidanceSchedule
from foveate.core.policy import Policy
from foveate.core.schedule import ScaleSchedule, parse_ratio, ratio_name
from foveate.core.warnings import CallWarning
from foveate.engine.sample import Filter
from foveate.families import registry
from foveate.families.spec import ModelSpec, per_scale
from foveate.policies.registry import load_policy

Prompts = str | SupportsIndex | Sequence[str | SupportsIndex]
"""One text or several; an index where a model draws classes. Numbers of NumPy do, here and below."""

PerScale = SupportsFloat | Sequence[SupportsFloat]
"""One value for all scales, or one per scale."""

StepCallback = Callable[[Any, int, int, dict[str, Any]], object]
"""Called as (pipe, scale, scales still to come, {"latents": tensor}); raises `Cancelled` to stop."""

MAX_SEED = 2**63 - 1

_MOST_IMAGES = 4096
"""Of one prompt in one call: as many fit into no memory, but the list of their seeds still does."""

_MAX_FLOAT32 = 3.4028234663852886e38

_NEAREST = 3
"""Sizes that an error names."""

_LARGEST_SIDE, _RATIO_ERROR = 7, 1e-3
"""Of a published ratio, and how far a number may be from it: 1.333 is 4:3."""


class Options(TypedDict, total=False):
    """Keyword arguments of `Pipeline.__call__` and `Pipeline.stream`; `Settings` says what each one means."""

    negative_prompt: str | Sequence[str] | None
    height: SupportsIndex | None
    width: SupportsIndex | None
    aspect_ratio: str | SupportsFloat | None
    pixels: str | None
    guidance_scale: PerScale | None
    cfg: PerScale | None
    temperature: PerScale | None
    tau: PerScale | None
    top_k: SupportsIndex | Sequence[SupportsIndex] | None
    top_p: PerScale | None
    more_smooth: bool | None
    num_images_per_prompt: SupportsIndex
    seed: SupportsIndex | Sequence[SupportsIndex] | None
    generator: torch.Generator | None
    rng: str
    policy: str | Path | Policy
    batch_invariant: bool
    output_type: str
    return_dict: bool
    callback_on_step_end: StepCallback | None
    trace: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Settings:
    """Options of one call; None stands for the model's default.

    Attributes:
        negative_prompt: What to move away from; one for all prompts or one for each.
        height: Pixels, together with `width`; a size that the published schedules know.
        width: Pixels, together with `height`.
        aspect_ratio: Width:height, one of the 15 published ratios, or width over height as a number; together with
            `pixels` instead of a size.
        pixels: Pixel budget: 0.06M, 0.25M, 0.60M or 1M.
        guidance_scale: The family's published `cfg`; one number or one per scale. 1 switches guidance off for Infinity,
            0 for VAR and Switti, whose guidance grows from nothing to this over the scales.
        cfg: Alias of `guidance_scale`.
        temperature: Divides logits, above 0; one number or one per scale.
        tau: Alias of `temperature`.
        top_k: Keeps the k best values of every symbol; 0 keeps all, 1 is greedy.
        top_p: Keeps the likeliest values up to this share, in [0, 1]; 0 keeps all.
        more_smooth: Mixes codes instead of choosing them: softer pictures. VAR and Switti only.
        num_images_per_prompt: Images of each prompt, which follow each other in the output.
        seed: Where every prompt starts, or one start per prompt; image j of a prompt uses seed + j. None draws one.
        generator: Random state for `rng="reference"`; it advances.
        rng: `keyed` draws depend on seed, scale and position alone; `reference` draws in the published order for the
            whole batch, from `generator` or from a new one seeded with `seed`.
        policy: Name, spec, YAML file or object.
        batch_invariant: Gives every image the bits that it has alone. On a CPU with keyed draws that is always so; on a
            GPU every image becomes a request of its own, which is slower.
        output_type: `pil` images; `np` uint8 (n, height, width, 3); `pt` float32 in [0, 1], (n, 3, height, width);
            `latent` float32 latents, not decoded.
        return_dict: False returns `(images,)` alone.
        callback_on_step_end: Called after every scale; may raise `Cancelled`.
        trace: Also keeps which token ran how many blocks.
    """

    negative_prompt: str | Sequence[str] | None = None
    height: SupportsIndex | None = None
    width: SupportsIndex | None = None
    aspect_ratio: str | SupportsFloat | None = None
    pixels: str | None = None
    guidance_scale: PerScale | None = None
    cfg: PerScale | None = None
    temperature: PerScale | None = None
    tau: PerScale | None = None
    top_k: SupportsIndex | Sequence[SupportsIndex] | None = None
    top_p: PerScale | None = None
    more_smooth: bool | None = None
    num_images_per_prompt: SupportsIndex = 1
    seed: SupportsIndex | Sequence[SupportsIndex] | None = None
    generator: torch.Generator | None = None
    rng: str = "keyed"
    policy: str | Path | Policy = "full"
    batch_invariant: bool = False
    output_type: str = "pil"
    return_dict: bool = True
    callback_on_step_end: StepCallback | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        """Refuses what does not depend on a model."""
        num = self.num_images_per_prompt
        _require(
            _is_whole(num) and int(num) >= 1, f"num_images_per_prompt must be a whole number, 1 or more, got {num!r}"
        )
        _require(self.rng in ("keyed", "reference"), f"rng must be keyed or reference, got {self.rng!r}")
        kinds = ("pil", "np", "pt", "latent")
        _require(self.output_type in kinds, f"output_type must be one of {', '.join(kinds)}, got {self.output_type!r}")
        _require(self.guidance_scale is None or self.cfg is None, "give guidance_scale or its alias cfg, not both")
        _require(self.temperature is None or self.tau is None, "give temperature or its alias tau, not both")
        sides = (self.width, self.height)
        _require(all(side is None or _is_whole(side) for side in sides), f"width and height are pixels, got {sides}")
        _require((self.height is None) == (self.width is None), "give both height and width, or an aspect_ratio")
        has_shape = self.aspect_ratio is not None or self.pixels is not None
        _require(self.height is None or not has_shape, "give height and width or aspect_ratio and pixels, not both")
        generator, is_reference = self.generator, self.rng == "reference"
        is_torch = generator is None or isinstance(generator, torch.Generator)
        _require(is_torch, f"generator must be a torch.Generator, got {type(generator).__name__}")
        _require(generator is None or is_reference, 'generator needs rng="reference"; use seed with rng="keyed"')
        _require(generator is None or self.seed is None, "give a seed or a generator, not both")
        _require(not (is_reference and self.batch_invariant), 'batch_invariant needs rng="keyed"')


def settings_of(options: Options) -> Settings:
    """The options of a call, checked.

    Raises:
        FoveateError: There is no such option (the closest is named), or a value that no model could take.
    """
    known = [field.name for field in fields(Settings)]
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    return Settings(**options)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """A call in the engine's words, every default filled in.

    `prompts` and `negatives` have one entry per prompt, `seeds` one per image (none with a caller's own generator).
    `guidance_scale` is the family's `cfg` of every scale, `guidance` what it means to the engine.
    `smooth_scales` are the first scale that mixes codes and the first one behind it, None where none does.
    """

    settings: Settings
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

    @property
    def images_per_prompt(self) -> int:
        """Images of each prompt."""
        return int(self.settings.num_images_per_prompt)

    @property
    def num_images(self) -> int:
        """Images of all prompts."""
        return len(self.prompts) * self.images_per_prompt

    def is_batch_invariant(self, has_independent_rows: bool) -> bool:
        """Whether every image gets the bits that it has alone: if asked for, and where that costs nothing.

        The images are then requests of their own, which share their products where rows are independent.
        """
        return self.settings.batch_invariant or (has_independent_rows and self.settings.rng == "keyed")

    def per_image(self, per_prompt: Sequence[Any]) -> tuple[Any, ...]:
        """Repeats entries per prompt for each of its images."""
        return tuple(entry for entry in per_prompt for _ in range(self.images_per_prompt))


def resolve(prompts: Prompts, settings: Settings, spec: ModelSpec) -> Job:
    """Completes a call from the model's defaults.

    Raises:
        FoveateError: A value that is out of range or does not exist; the message says what does.
    """
    texts = _prompts(_listed(prompts, spec), "prompt")
    ratio, budget = _size(settings, spec)
    schedule = spec.schedule(ratio, budget)
    count, defaults = len(schedule), spec.defaults
    cfg, tau = _first(settings.guidance_scale, settings.cfg), _first(settings.temperature, settings.tau)
    guidance = _per_scale("guidance_scale", cfg, defaults.guidance_scale, count)
    temperatures = _per_scale("temperature", tau, defaults.temperature, count)
    top_k = _per_scale("top_k", settings.top_k, defaults.top_k, count)
    top_p = _per_scale("top_p", settings.top_p, defaults.top_p, count)
    for t in temperatures:
        is_possible = t > 0 and 1 / t <= _MAX_FLOAT32
        _require(
            is_possible, f"temperature must be above {1 / _MAX_FLOAT32:.3g}, got {t}; top_k=1 takes the best always"
        )
    for k, p in zip(top_k, top_p, strict=True):
        _require(k >= 0 and k == int(k), f"top_k must be a whole number, 0 or more, got {k}")
        _require(0 <= p <= 1, f"top_p must be in [0, 1], got {p}")
    return Job(
        settings=settings,
        prompts=texts,
        negatives=_negatives(settings.negative_prompt, len(texts), spec),
        seeds=_seeds(settings, len(texts)),
        schedule=schedule,
        ratio=ratio_name(ratio),
        budget=budget,
        guidance_scale=guidance,
        guidance=spec.kind.guidance(guidance, defaults.guidance_window),
        temperatures=temperatures,
        filters=tuple(Filter(top_k=int(k), top_p=p) for k, p in zip(top_k, top_p, strict=True)),
        smooth_scales=_smooth_scales(settings.more_smooth, spec, count),
        policy=load_policy(settings.policy),
    )


def warnings_of(job: Job, spec: ModelSpec, *, is_trained: bool) -> tuple[CallWarning, ...]:
    """What a call does otherwise than its words suggest, as far as it is known before anything runs.

    Args:
        job: The call.
        spec: The model.
        is_trained: Whether its weights have seen images, so that there are sizes that they never saw.
    """
    found = []
    if is_trained and not (job.budget in spec.budgets and job.ratio in spec.ratios):
        known = f"{', '.join(spec.ratios)} at {', '.join(spec.budgets)}"
        message = (
            f"{spec.name} was trained on {known}; {job.ratio} at {job.budget} is outside of that and may look wrong"
        )
        found.append(CallWarning(code="untrained_size", message=message))
    weights = job.guidance.weights
    if max(weights) <= 0:
        asked, without = job.guidance_scale[0], "the negative prompt" if job.negatives else "no prompt at all"
        message = (
            f"guidance_scale {asked:g} leaves the prompt out: this draws {without}; raise it to be guided by the prompt"
        )
        found.append(CallWarning(code="guidance_ignores_prompt", message=message))
    if job.negatives is not None and all(weight == 1 for weight in weights):
        message = f"negative_prompt has no effect without guidance, guidance_scale {job.guidance_scale[0]:g}; raise it"
        found.append(CallWarning(code="negative_prompt_ignored", message=message))
    return tuple(found)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise FoveateError(message)


def _is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int, or one of NumPy's, which behave alike."""
    return isinstance(value, Integral)


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is a float or an int, or one of NumPy's."""
    return isinstance(value, Real)


def _entries(name: str, value: object, what: str) -> list[Any]:
    """The entries of a sequence; a text is none."""
    try:
        if isinstance(value, Iterable) and not isinstance(value, str):
            return list(value)
    except TypeError:  # An array without axes says that it can be iterated, but it cannot.
        pass
    raise FoveateError(f"{name} must be {what}, got {value!r}")


def _first(value: PerScale | None, alias: PerScale | None) -> PerScale | None:
    return alias if value is None else value


def _prompts(texts: list[str], name: str) -> tuple[str, ...]:
    _require(bool(texts), f"{name}s must hold at least one text, got none")
    for text in texts:
        _require(isinstance(text, str), f"{name} must be text, got {type(text).__name__}")
        _require(bool(text.strip()), f"{name} must not be empty; say what to draw" if name == "prompt" else
                 f"{name} must not be empty; leave it out")  # fmt: skip
        _require(_is_plain(text), f"{name} holds characters that are no text (NUL or half a surrogate pair): {text!r}")
    return tuple(texts)


def _is_plain(text: str) -> bool:
    """Whether a text can be stored as UTF-8 and in metadata."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def draws_classes(spec: ModelSpec) -> bool:
    """Whether prompts name classes, by an index too."""
    return spec.conditioning.names_classes


def _listed(prompts: Prompts, spec: ModelSpec) -> list[Any]:
    """Prompts as a list; where they name classes, an index may also come as a number."""
    is_one = isinstance(prompts, str) or _is_whole(prompts)
    texts: list[Any] = [prompts] if is_one else _entries("prompt", prompts, "a text, or a list of texts")
    return [str(int(text)) if draws_classes(spec) and _is_whole(text) else text for text in texts]


def _smooth_scales(asked: bool | None, spec: ModelSpec, count: int) -> tuple[int, int] | None:
    """Scales that mix codes: from where the model's defaults begin to where guidance ends."""
    defaults = spec.defaults
    able = " and ".join(family.title for family in registry.FAMILIES if family.can_smooth)
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


def _size(settings: Settings, spec: ModelSpec) -> tuple[float, str]:
    """Template ratio and budget."""
    if settings.height is not None and settings.width is not None:
        known = spec.sizes()
        wanted = (int(settings.width), int(settings.height))
        if wanted not in known:
            near = sorted(known, key=lambda size: (_distance(wanted, size), size))[:_NEAREST]
            possible = ", ".join(f"{w}x{h}" for w, h in near)
            rest = f"; nearest of {len(known)}" if len(known) > _NEAREST else ""
            raise FoveateError(f"size must be one of {possible} (width x height{rest}), got {wanted[0]}x{wanted[1]}")
        ratio, budget = known[wanted]
    else:
        ratio = _ratio(spec.ratios[0] if settings.aspect_ratio is None else settings.aspect_ratio)
        budget = spec.budgets[0] if settings.pixels is None else settings.pixels
    return ratio, budget


def _distance(wanted: tuple[int, int], size: tuple[int, int]) -> float:
    """How far two sizes are apart: both sides as factors, so that area and ratio count."""
    return math.hypot(*(math.log(max(asked, 1)) - math.log(side) for asked, side in zip(wanted, size, strict=True)))


def _ratio(value: object) -> float:
    """Template key of an aspect ratio, as text or as a number."""
    text = str(value)
    if _is_number(value) and math.isfinite(value):
        near = Fraction(float(value)).limit_denominator(_LARGEST_SIDE)
        text = str(near) if abs(near - float(value)) < _RATIO_ERROR else text
    return parse_ratio(text)


def _per_scale(
    name: str, value: object, default: float | int | tuple[float | int, ...], count: int
) -> tuple[float, ...]:
    """One value per scale; only a default may have more or fewer values, see `families.spec.per_scale`."""
    if value is None:
        values: list[Any] = list(per_scale(default, count))
    else:
        values = [value] * count if _is_number(value) else _entries(name, value, "a number, or one per scale")
    _require(len(values) == count, f"{name} needs one number or {count}, one per scale, got {len(values)}")
    return tuple(_finite(name, entry) for entry in values)


def _finite(name: str, entry: object) -> float:
    """A number of any library that float32 can hold, as that is what it is multiplied with; a text is none."""
    if isinstance(entry, SupportsFloat):
        # An array of several numbers only looks like one, and an integer may be larger than any float.
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            number = float(entry)
            if abs(number) <= _MAX_FLOAT32:
                return number
    raise FoveateError(f"{name} must be finite numbers in float32, at most {_MAX_FLOAT32:.3g}, got {entry!r}")


def _seeds(settings: Settings, num_prompts: int) -> tuple[int, ...]:
    if settings.generator is not None:
        return ()
    per_prompt = int(settings.num_images_per_prompt)
    _require(
        per_prompt <= _MOST_IMAGES,
        f"num_images_per_prompt must be {_MOST_IMAGES} or less in one call, got {per_prompt}; "
        "foveate.pipeline.bulk.draw_rows draws more, batch by batch",
    )
    seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
    if settings.rng == "reference" and not _is_whole(seed):
        raise FoveateError(f'rng="reference" takes one integer seed for the whole batch, got {seed!r}')
    starts = [seed] * num_prompts if _is_whole(seed) else _entries("seed", seed, "an integer, or one per prompt")
    _require(len(starts) == num_prompts, f"seed needs one integer or one per prompt, {num_prompts}, got {len(starts)}")
    for start in starts:
        is_ok = _is_whole(start) and 0 <= int(start) <= MAX_SEED - per_prompt
        _require(is_ok, f"seed must be an integer in [0, 2^63 - {per_prompt}), got {start!r}")
    starts = [int(start) for start in starts]
    if settings.rng == "reference":
        return (starts[0],) * (num_prompts * per_prompt)
    return tuple(start + j for start in starts for j in range(per_prompt))
