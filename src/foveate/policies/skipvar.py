"""SkipVAR: each image chooses how many final scales do not run, else how many run without guidance (arXiv 2506.08908).

After two scales the latent, resized to 8x8, is decoded. Two features tell how much an image still changes: the mean
absolute difference of the two images' Sobel magnitudes, and the share of the later one's spectral energy at more than
0.4 of the Nyquist radius. One logistic model chooses how many final scales do not run; where it says none, a second one
chooses on how many the unconditional branch does not run.

Where our source is silent we chose: gray is the mean of the channels; both features enter as logarithms; both models
are multinomial over the counts from 0 to n, read as "at least this many with probability `confidence`"; the two
images are those after the last two scales before the n that may go. A scale runs for a whole request, so of several
images in one the most careful decides. The models are JSON and belong to the network that they were fitted on
(`benchmarks/fit_skipvar.py`). Deciding waits for the device once per request.
Axes: B images, (Y, X) pixels, F features, K counts.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.plan import ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Decoded, Record, Signals
from foveate.core.transfer import to_device

SIDE = 8
"""Latents along a side of what is decoded."""

FEATURES = ("sobel_difference", "high_frequency_share")

_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=torch.float32, device="cpu")


def sobel_magnitude(gray_BYX: Float[Tensor, "B Y X"]) -> Float[Tensor, "B Y X"]:
    """Length of the Sobel gradient; the border is repeated outwards."""
    kernels = to_device(torch.stack((_SOBEL, _SOBEL.T))[:, None], gray_BYX.device)
    padded_B1YX = F.pad(gray_BYX[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded_B1YX, kernels).square().sum(1).sqrt()


def high_frequency_share(gray_BYX: Float[Tensor, "B Y X"]) -> Float[Tensor, " B"]:
    """Share of the spectral energy at more than 0.4 of the Nyquist radius."""
    energy_BYX = torch.fft.fft2(gray_BYX).abs().square()
    y, x = (torch.fft.fftfreq(size, dtype=torch.float32, device="cpu") for size in gray_BYX.shape[1:])
    is_high_YX = to_device((y[:, None].square() + x.square()).sqrt() > 0.4 * 0.5, gray_BYX.device)
    return (energy_BYX * is_high_YX).sum((1, 2)) / energy_BYX.sum((1, 2)).clamp_min(1e-12)


def features(before_B3YX: Float[Tensor, "B 3 Y X"], after_B3YX: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B F"]:
    """Logarithms of the features of two successive images of the same size, in the order of `FEATURES`."""
    before_BYX, after_BYX = before_B3YX.mean(1), after_B3YX.mean(1)
    difference_B = (sobel_magnitude(after_BYX) - sobel_magnitude(before_BYX)).abs().mean((1, 2))
    return torch.stack((difference_B, high_frequency_share(after_BYX)), dim=1).clamp_min(1e-9).log()


@dataclass(frozen=True, kw_only=True, slots=True)
class CountModel:
    """Multinomial logistic regression over the counts 0 to n: one row of weights and one bias per count."""

    weights: tuple[tuple[float, ...], ...]
    biases: tuple[float, ...]

    def choose(self, inputs: Sequence[float], confidence: float) -> int:
        """The largest count that is reached or exceeded with at least this probability."""
        rows = zip(self.weights, self.biases, strict=True)
        logits = [bias + math.fsum(w * x for w, x in zip(row, inputs, strict=True)) for row, bias in rows]
        shares = [math.exp(logit - max(logits)) for logit in logits]
        return sum(math.fsum(shares[n:]) >= confidence * math.fsum(shares) for n in range(1, len(shares)))


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipModel:
    """Both models and the standardisation of their inputs."""

    means: tuple[float, ...]
    deviations: tuple[float, ...]
    scales: CountModel
    branch: CountModel

    @property
    def num_scales(self) -> int:
        """The most scales that may go."""
        return len(self.scales.biases) - 1

    def standardised(self, row: Sequence[float]) -> list[float]:
        """One image's features with mean 0 and deviation 1 over those that the models were fitted on."""
        return [(x - m) / d for x, m, d in zip(row, self.means, self.deviations, strict=True)]

    @classmethod
    def load(cls, path: str) -> "SkipModel":
        """Reads a JSON file; an empty path is the shipped one, fitted on the bundled model.

        Raises:
            FoveateError: The file cannot be read or does not hold such a model.
        """
        try:
            source = Path(path) if path else files("foveate") / "data" / "skipvar.json"
            data = json.loads(source.read_text(encoding="utf-8"))
            model = cls(
                means=tuple(map(float, data["means"])),
                deviations=tuple(map(float, data["deviations"])),
                scales=_count_model(data["scales"]),
                branch=_count_model(data["branch"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FoveateError(f"cannot read the skipvar model {path or '(shipped)'}: {error!r}") from None
        model.check(tuple(data.get("features", ())), path)
        return model

    def check(self, names: tuple[str, ...], path: str) -> None:
        """Refuses what does not fit together."""
        numbers = [*self.means, *self.deviations]
        rows = [*self.scales.weights, *self.branch.weights, self.means, self.deviations]
        for part in (self.scales, self.branch):
            numbers += [*part.biases, *(w for row in part.weights for w in row)]
        is_sound = (
            names == FEATURES
            and all(len(row) == len(FEATURES) for row in rows)
            and len(self.scales.weights) == len(self.branch.weights) == self.num_scales + 1 == len(self.branch.biases)
            and all(map(math.isfinite, numbers))
            and min(self.deviations) > 0
        )
        rule = f"two models of equal counts over the features {', '.join(FEATURES)}"
        require(is_sound, f"the skipvar model {path or '(shipped)'}", rule, ", ".join(names) or "none")


def _count_model(data: dict[str, Any]) -> CountModel:
    return CountModel(
        weights=tuple(tuple(map(float, row)) for row in data["weights"]), biases=tuple(map(float, data["biases"]))
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _State:
    """The earlier image, then the decision: final scales that do not run, and per image those without guidance."""

    before_B3YX: Tensor | None = None
    num_skipped: int = 0
    num_single: tuple[int, ...] = ()


class BoundSkipVAR(Bound):
    """SkipVAR on one schedule."""

    def __init__(self, policy: "SkipVAR", schedule: ScaleSchedule) -> None:
        self.policy, self.num_scales = policy, len(schedule)
        self.is_on = policy.confidence < 1
        self.model = SkipModel.load(policy.model) if self.is_on else None
        self.first = 0 if self.model is None else max(len(schedule) - self.model.num_scales, 2)
        self.is_on = self.is_on and self.first < len(schedule)
        self.directives = (Directive.SCALES, Directive.BRANCH) if self.is_on else ()
        self.is_static = not self.is_on

    def record(self, scale: int) -> frozenset[Record]:
        """A small image after each of the two scales before the first that may go."""
        is_read = self.is_on and self.first - 2 <= scale < self.first
        return frozenset({Decoded(side=SIDE)}) if is_read else frozenset()

    def start(self) -> _State:
        """Nothing seen, nothing decided."""
        return _State()

    def ceiling(self, scale: int) -> ScalePlan:
        """Content decides, so the bound is everything."""
        return ScalePlan()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Decides once, in front of the first scale that may go."""
        if not self.is_on or scale < self.first - 1 or signals is None:
            return ScalePlan(), state
        # Where the scale before did not run, another part of a composition has ended the image already.
        is_fresh = signals.scale == scale - 1
        if scale == self.first - 1:
            return ScalePlan(), replace(state, before_B3YX=signals[Decoded(side=SIDE)]) if is_fresh else state
        if scale == self.first and is_fresh:
            state = self._decide(state.before_B3YX, signals[Decoded(side=SIDE)])
        if scale >= self.num_scales - state.num_skipped:
            return ScalePlan(runs=False), state
        is_guided = tuple(scale < self.num_scales - single for single in state.num_single)
        return ScalePlan(unconditional=None if all(is_guided) else is_guided), state

    def _decide(self, before_B3YX: Tensor, after_B3YX: Tensor) -> _State:
        assert self.model is not None, "it is on"
        # The one wait for the device: whether a scale runs is the host's to know.
        rows = [self.model.standardised(row) for row in features(before_B3YX, after_B3YX).tolist()]
        skipped = min(self.model.scales.choose(row, self.policy.confidence) for row in rows)
        if skipped:
            return _State(num_skipped=skipped, num_single=(0,) * len(rows))
        return _State(num_single=tuple(self.model.branch.choose(row, self.policy.confidence) for row in rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipVAR(Policy):
    """Leaves out final scales, or the unconditional branch on them, as two small models say for each image.

    `confidence`, in (0, 1], is the probability that a count must have; more is more careful, and 1 changes nothing.
    `model` is a JSON file of `benchmarks/fit_skipvar.py`; empty is the shipped one, fitted on the bundled model.
    """

    name: ClassVar[str] = "skipvar"
    confidence: float = 0.5
    model: str = ""

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(0 < self.confidence <= 1, "confidence", "in (0, 1]", self.confidence)

    @classmethod
    def neutral(cls) -> "SkipVAR":
        """No count is certain."""
        return cls(confidence=1.0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Reads the models; they say how many of the last scales may go, and at least two scales run before those.

        Raises:
            FoveateError: The model file cannot be read or does not hold such a model.
        """
        return BoundSkipVAR(self, schedule)
