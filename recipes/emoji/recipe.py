"""The file of a training run: read over its base and the section of the device, and checked.

The same file serves a CPU and a GPU: `device` and the minutes are all that differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from foveate.core.errors import FoveateError, unknown
from foveate.core.schedule import ScaleSchedule, parse_ratio
from foveate.families.spec import Defaults, tuples
from foveate.models.infinity import InfinityConfig
from foveate.tokenizers.autoencoder import AutoencoderConfig
from recipes.emoji.corpus import CorpusConfig
from recipes.emoji.loop import Optimisation
from recipes.emoji.places import PlacesRecipe
from recipes.emoji.sampling import SamplingSearch
from recipes.emoji.scenes import SceneConfig
from recipes.emoji.tokenizer import TokenizerRecipe
from recipes.emoji.transformer import Length, TransformerRecipe
from recipes.emoji.weights import DrawWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a training file says; `ratios` are the aspect ratios trained on, the square first."""

    name: str
    budget: str
    ratios: tuple[str, ...]
    corpus: CorpusConfig
    weights: DrawWeights
    scenes: SceneConfig
    tokenizer: TokenizerRecipe
    places: PlacesRecipe
    transformer: TransformerRecipe
    defaults: Defaults
    sampling: SamplingSearch
    sheet: tuple[str, ...]
    notice: str
    card: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """How this call runs a recipe.

    Attributes:
        device: "cpu" or "cuda"; None takes a GPU if there is one. The section of its name goes over the file.
        minutes_scale: Multiplies the minutes of both networks.
        keeps_tokenizer: Whether the tokenizer that the run starts from stays as it is.
        is_dry: One small step of everything, to see that all of it runs here.
    """

    device: str | None = None
    minutes_scale: float = 1.0
    keeps_tokenizer: bool = False
    is_dry: bool = False

    def chosen_device(self) -> str:
        """The device's name.

        Raises:
            FoveateError: It is not known, or this machine has none.
        """
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in {"cpu", "cuda"}:
            raise FoveateError(f"--device must be cpu or cuda, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise FoveateError("--device cuda needs a GPU and torch built for it, this machine has none; try cpu")
        return device


_DTYPES = ("float32", "bfloat16")
"""Gradients in float16 would need a scaled loss."""

_UNREADABLE = (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError, KeyError, TypeError, AttributeError)
"""Errors of a file that is missing, is not YAML, or does not hold a recipe."""


def load_recipe(path: Path, route: Route | None = None) -> Recipe:
    """Reads a training file; `corpus` in it names another file beside it.

    Raises:
        FoveateError: The file cannot be read, or a field is missing or unknown.
    """
    route = route or Route()
    device = route.chosen_device()
    try:
        data = _read_recipe(path)
        sections = {name: data.pop(name, {}) for name in ("cpu", "cuda")}
        _lay_over(data, sections[device])
        if route.is_dry:
            _lay_over(
                data,
                {
                    "places": {"steps": min(1, data.get("places", {}).get("steps", 1)), "batch": 2, "checks": 2},
                    "tokenizer": _DRY,
                    "transformer": _DRY | {"window": 1, "compiles": False},
                },
            )
            data["sheet"] = data["sheet"][:2]
            data["sampling"] = {"guidance": [1.5], "temperatures": [0.5], "factors": [], "prompts": 2}
        corpus = CorpusConfig.from_dict(_read_yaml(path.parent / data["corpus"]))
        schedule = ScaleSchedule.from_template(1.0, data["budget"])
        if data["dtype"] not in _DTYPES:
            raise unknown("dtype for training", str(data["dtype"]), _DTYPES)
        run = {"device": device, "dtype": data["dtype"]}
        if route.keeps_tokenizer:
            data["tokenizer"]["optimisation"]["minutes"] = 0.0
        shape = data["autoencoder"] | {"channel_multipliers": tuple(data["autoencoder"]["channel_multipliers"])}
        tokenizer = TokenizerRecipe(
            shape=AutoencoderConfig(**shape),
            grids=schedule.grids,
            optimisation=_optimisation(data["tokenizer"].pop("optimisation"), route.minutes_scale),
            **data["tokenizer"],
            **run,
        )
        lengths = data["transformer"].pop("lengths")
        transformer = TransformerRecipe(
            shape=InfinityConfig(**data["transformer"].pop("shape")),
            schedule=schedule,
            lengths=tuple(_length(length, data["budget"]) for length in lengths),
            optimisation=_optimisation(data["transformer"].pop("optimisation"), route.minutes_scale),
            **data["transformer"],
            **run,
        )
        notice = (path.parent / data["notice"]).read_text(encoding="utf-8")
        card = (path.parent / data["card"]).read_text(encoding="utf-8")
        return Recipe(
            name=data["name"],
            budget=data["budget"],
            ratios=tuple(dict.fromkeys(["1:1", *(length["ratio"] for length in lengths if "ratio" in length)])),
            corpus=corpus,
            weights=DrawWeights.from_dict(data["weights"]),
            scenes=SceneConfig(**data["scenes"]),
            tokenizer=tokenizer,
            places=PlacesRecipe(**data.get("places", {})),
            transformer=transformer,
            defaults=Defaults(**tuples(data["defaults"])),
            sampling=SamplingSearch(**tuples(data.get("sampling", {}))),
            sheet=tuple(data["sheet"]),
            notice=notice,
            card=card,
        )
    except _UNREADABLE as error:
        raise FoveateError(f"cannot read the training file {path}: {error!r}") from None


_DRY = {"optimisation": {"minutes": 1e-6, "batch": 2}}
"""Any time at all is one step."""


def _lay_over(data: dict[str, Any], section: Mapping[str, Any]) -> None:
    """Replaces values by those of a section, mapping by mapping, in place."""
    for name, value in section.items():
        if isinstance(value, Mapping) and isinstance(data.get(name), dict):
            _lay_over(data[name], value)
        else:
            data[name] = value


def load_corpus_config(path: Path, route: Route | None = None) -> CorpusConfig:
    """Reads what goes into a corpus, from a corpus file or from the training file that names one.

    Raises:
        FoveateError: A file cannot be read, or a field is unknown or wrong.
    """
    try:
        data = _read_recipe(path)
        if "corpus" not in data:
            return CorpusConfig.from_dict(data)
        _lay_over(data, data.get((route or Route()).chosen_device(), {}))
        return CorpusConfig.from_dict(_read_yaml(path.parent / data["corpus"]))
    except _UNREADABLE as error:
        raise FoveateError(f"cannot read the corpus file {path}: {error!r}") from None


def _read_recipe(path: Path) -> Any:  # noqa: ANN401 - see `_read_yaml`
    """A training file over the one beside it that it names as its `base`."""
    data = _read_yaml(path)
    if isinstance(data, dict) and "base" in data:
        over, data = data, _read_recipe(path.parent / data["base"])
        _lay_over(data, {name: value for name, value in over.items() if name != "base"})
    return data


def _read_yaml(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds; its readers check it
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _length(fields: Mapping[str, Any], budget: str) -> Length:
    """A kind of step; `ratio` in the file names its aspect ratio, width:height."""
    others = {name: value for name, value in fields.items() if name != "ratio"}
    if "ratio" not in fields:
        return Length(**others)
    return Length(schedule=ScaleSchedule.from_template(parse_ratio(fields["ratio"]), budget), **others)


def _optimisation(fields: dict[str, Any], minutes_scale: float) -> Optimisation:
    return Optimisation(**(fields | {"minutes": fields["minutes"] * minutes_scale}))
