"""One model: its shapes, the sizes it generates and its defaults; what `config.json` of a model folder holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.schedule import BUDGETS, Grid, ScaleSchedule, parse_ratio, ratio_name, sizes
from foveate.families.family import Conditioning, Family
from foveate.families.minilm import MINILM
from foveate.weights.folder import FORMAT

ALL_RATIOS = (
    "1:1", "4:5", "3:4", "2:3", "4:7", "1:2", "2:5", "1:3", "5:4", "4:3", "3:2", "7:4", "2:1", "5:2", "3:1",
)  # fmt: skip

_BUDGET_OF_SIDE = {256: "0.06M", 512: "0.25M", 1024: "1M"}
"""Pixel budgets as squares of models that generate one size."""


def per_scale(value: float | int | tuple[float | int, ...], count: int) -> tuple[float, ...]:
    """A default at every scale: of a list that is too short the last value goes on, one that is too long is cut."""
    values = value if isinstance(value, tuple) else (value,)
    if not values:
        raise FoveateError("a default per scale needs at least one value, got none")
    return tuple(float(values[min(scale, len(values) - 1)]) for scale in range(count))


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """How a model is sampled unless asked otherwise; a tuple holds one value per scale, and its last one goes on.

    `guidance_window` is the first scale that guidance acts on and the first one behind it, None for all others.
    `more_smooth` samples soft codes from scale `smooth_start` on, as the published demos of VAR, Switti and HART.
    """

    guidance_scale: float | tuple[float, ...] = 4.0
    temperature: float | tuple[float, ...] = 0.5
    top_k: int | tuple[int, ...] = 0
    top_p: float = 0.0
    guidance_window: tuple[int, int | None] = (0, None)
    more_smooth: bool = False
    smooth_start: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One model: its shapes, what it was trained on and its defaults.

    `transformer` and `autoencoder` are configurations of the networks of `family`; `conditioner` names one of its
    conditionings. `budgets` (pixel budgets) and `ratios` (width:height) are those it was trained on; the first ones are
    the default. A model of a fixed size has `grids` instead, its one schedule.
    """

    name: str
    transformer: Any
    autoencoder: Any
    family: str
    patch: int = 1
    conditioner: str = MINILM.name
    budgets: tuple[str, ...] = ("1M",)
    ratios: tuple[str, ...] = ALL_RATIOS
    grids: tuple[Grid, ...] | None = None
    defaults: Defaults = Defaults()

    def __post_init__(self) -> None:
        """Refuses parts that do not fit each other."""
        kind = self.kind
        conditioners = [conditioning.name for conditioning in kind.conditionings]
        if self.conditioner not in conditioners:
            raise FoveateError(
                f"conditioner of family {self.family} must be one of {', '.join(conditioners)}, "
                f"got {self.conditioner!r}"
            )
        wanted, offered = kind.symbols(self.transformer, self.autoencoder, self.patch)
        if wanted != offered:
            raise FoveateError(f"the transformer wants {wanted}, the autoencoder offers {offered}; they do not fit")
        if not self.budgets or not set(self.budgets) <= set(BUDGETS):
            raise FoveateError(f"budgets must be some of {', '.join(BUDGETS)}, got {', '.join(self.budgets) or 'none'}")
        if not self.ratios:
            raise FoveateError("ratios must name at least one aspect ratio, got none")
        for ratio in self.ratios:
            parse_ratio(ratio)
        if kind.is_fixed_size != (self.grids is not None):
            raise FoveateError(f"family {self.family} {'needs' if kind.is_fixed_size else 'takes no'} grids of its own")

    @property
    def kind(self) -> Family:
        """The family's record."""
        return _family_named(self.family)

    @property
    def conditioning(self) -> Conditioning:
        """What makes its conditions."""
        return next(known for known in self.kind.conditionings if known.name == self.conditioner)

    @property
    def stride(self) -> int:
        """Pixels along a side of a token."""
        return self.autoencoder.stride * self.patch

    @property
    def default_schedule(self) -> ScaleSchedule:
        """The scales of an image of the default size."""
        return self.schedule(parse_ratio(self.ratios[0]), self.budgets[0])

    def schedule(self, ratio: float, budget: str) -> ScaleSchedule:
        """The scales of an image.

        Args:
            ratio: Template key, height over width.
            budget: Pixel budget.

        Raises:
            FoveateError: There is no such size, or the model has another one only.
        """
        if self.grids is None:
            return ScaleSchedule.from_template(ratio, budget, self.patch)
        if (ratio_name(ratio), budget) != (self.ratios[0], self.budgets[0]):
            ((width, height),) = self.sizes()
            raise FoveateError(f"{self.name} generates {width}x{height} only; leave the size out")
        return ScaleSchedule.from_grids(self.grids, finest=self.grids[-1], patch=self.patch)

    def sizes(self) -> dict[tuple[int, int], tuple[float, str]]:
        """Every (width, height) in pixels that can be generated, with its ratio and budget."""
        if self.grids is None:
            return sizes(self.stride)
        height, width = self.grids[-1]
        return {(width * self.stride, height * self.stride): (parse_ratio(self.ratios[0]), self.budgets[0])}

    def to_json(self) -> dict[str, Any]:
        """What `config.json` of a model folder holds."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelSpec":
        """Reads what `to_json` returned.

        Raises:
            CheckpointError: An unknown format, family or field, or a missing one.
        """
        rest = dict(data)
        if "format" not in rest:
            raise CheckpointError("config.json names no format, so it is of another program")
        # Which format it is and where the text encoder lies were the folder's business.
        for name in ("format", "text_encoder"):
            rest.pop(name, None)
        kind = _family_named(rest.get("family"))
        try:
            rest["transformer"] = kind.transformer.config(**tuples(rest["transformer"]))
            rest["autoencoder"] = kind.autoencoder.config(**tuples(rest["autoencoder"]))
            rest["defaults"] = Defaults(**tuples(rest.get("defaults", {})))
            return cls(**tuples(rest))
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"config.json does not describe a model: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """A file or folder of weights in a hub repository."""

    repo: str
    path: str

    @property
    def is_folder(self) -> bool:
        """Whether shards and their index lie in a folder."""
        return "." not in self.path.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A published model.

    Attributes:
        spec: Its shapes and defaults.
        transformer: Where its weights are.
        autoencoder: Where those of the autoencoder it was trained with are.
        text_encoders: Hub repositories of its text encoders.
        licence: Of the weights, as the model card states it.
        revision: Commit of the transformer's repository at which the files are known; None where nobody has noted one,
            and then loading from the hub warns (`weights_unpinned`).
        aliases: Other names of the model.
        facts: A file of the transformer's repository that says what its weights do not; None where they say all.
    """

    spec: ModelSpec
    transformer: WeightSource
    autoencoder: WeightSource
    text_encoders: tuple[str, ...]
    licence: str
    revision: str | None = None
    aliases: tuple[str, ...] = ()
    facts: str | None = None


def _family_named(name: object) -> Family:
    from foveate.families.registry import family_named  # noqa: PLC0415 - the records themselves hold specs

    return family_named(name)


def budget_of(grids: tuple[Grid, ...], stride: int) -> str:
    """Pixel budget of a fixed square size.

    Raises:
        FoveateError: It is not one of 256, 512 and 1024 pixels.
    """
    height, width = grids[-1]
    if height != width or width * stride not in _BUDGET_OF_SIDE:
        raise FoveateError(f"a fixed size must be a square of 256, 512 or 1024 pixels, got {width * stride}")
    return _BUDGET_OF_SIDE[width * stride]


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a frozen record takes them: lists, nested ones too, become tuples."""
    return {name: _frozen(value) if isinstance(value, list) else value for name, value in values.items()}


def _frozen(values: list[Any]) -> tuple[Any, ...]:
    return tuple(_frozen(value) if isinstance(value, list) else value for value in values)
