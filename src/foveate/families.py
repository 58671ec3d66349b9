"""Which transformer, tokenizer, text encoder, sizes and defaults belong together, by name or by folder.

Names are either bundled (with weights) or only shapes that random weights fill. A folder holds what `folder` writes;
`owner/name` is such a folder on the hub.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.conditioning.text import RandomText, TextFeatures
from foveate.core.errors import CheckpointError, FoveateError, UnsupportedError, unknown
from foveate.core.schedule import BUDGETS, parse_ratio
from foveate.folder import read_autoencoder, read_config, read_text_encoder, read_transformer, weights_sha256
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.models.random_weights import RANDOM_SEED, empty_module, fill_randomly
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer

DATA = Path(__file__).parent / "data"
BUNDLED = {"emoji": "emoji-tiny", "emoji-tiny": "emoji-tiny"}
"""Bundled models and aliases: name -> folder below `DATA`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_ALL_RATIOS = (
    "1:1", "4:5", "3:4", "2:3", "4:7", "1:2", "2:5", "1:3", "5:4", "4:3", "3:2", "7:4", "2:1", "5:2", "3:1",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """How a model is sampled unless asked otherwise; a tuple holds one value per scale of the longest schedule."""

    guidance_scale: float | tuple[float, ...] = 4.0
    temperature: float | tuple[float, ...] = 0.5
    top_k: int = 0
    top_p: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One model: its shapes, what it was trained on and its defaults.

    `budgets` (pixel budgets) and `ratios` (width:height) are those it was trained on; the first ones are the default.
    """

    name: str
    transformer: InfinityConfig
    autoencoder: AutoencoderConfig
    patch: int = 1
    text_encoder: str = "minilm"
    budgets: tuple[str, ...] = ("1M",)
    ratios: tuple[str, ...] = _ALL_RATIOS
    defaults: Defaults = Defaults()

    def __post_init__(self) -> None:
        """Refuses parts that do not fit each other."""
        bits = self.autoencoder.latent_channels * self.patch**2
        if self.transformer.bits != bits:
            raise FoveateError(f"bits must be latent_channels * patch^2 = {bits}, got {self.transformer.bits}")
        if not self.budgets or not set(self.budgets) <= set(BUDGETS):
            raise FoveateError(f"budgets must be some of {', '.join(BUDGETS)}, got {', '.join(self.budgets) or 'none'}")
        if not self.ratios:
            raise FoveateError("ratios must name at least one aspect ratio, got none")
        for ratio in self.ratios:
            parse_ratio(ratio)

    @property
    def stride(self) -> int:
        """Pixels along a side of a token."""
        return self.autoencoder.stride * self.patch

    def to_json(self) -> dict[str, Any]:
        """What `config.json` of a model folder holds."""
        return {"format": 1, "family": "infinity", **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelSpec":
        """Reads what `to_json` returned.

        Raises:
            CheckpointError: An unknown format, family or field, or a missing one.
        """
        rest = dict(data)
        version, family = rest.pop("format", None), rest.pop("family", None)
        if version != 1 or family != "infinity":
            raise CheckpointError(f"config.json must be of format 1 and family infinity, got {version} and {family}")
        try:
            rest["transformer"] = InfinityConfig(**rest["transformer"])
            rest["autoencoder"] = AutoencoderConfig(**_tuples(rest["autoencoder"]))
            rest["defaults"] = Defaults(**_tuples(rest.get("defaults", {})))
            return cls(**_tuples(rest))
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"config.json does not describe a model: {error}") from None


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _published(
    name: str, latent: int, multipliers: tuple[int, ...], patch: int, budget: str, shape: dict[str, Any]
) -> ModelSpec:
    """A published Infinity model; its text encoder is T5-XL, 2,048 wide."""
    autoencoder = AutoencoderConfig(latent_channels=latent, base_channels=128, channel_multipliers=multipliers)
    transformer = InfinityConfig(**shape, bits=latent * patch**2, text_width=2048, pool_heads=16)
    return ModelSpec(
        name=name,
        transformer=transformer,
        autoencoder=autoencoder,
        patch=patch,
        text_encoder="t5-xl",
        budgets=(budget,),
        defaults=Defaults(guidance_scale=4.0, temperature=0.5, top_k=900, top_p=0.97),
    )


_F16, _F8 = (1, 2, 4, 4, 4), (1, 2, 4, 4)

SHAPES: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _published("infinity-125m", 16, _F16, 1, "0.06M", {"depth": 12, "width": 768, "heads": 8, "chunks": 4}),
        _published("infinity-2b", 32, _F16, 1, "1M", {"depth": 32, "width": 2048, "heads": 16, "chunks": 8}),
        _published("infinity-8b", 14, _F8, 2, "1M", {"depth": 40, "width": 3584, "heads": 28, "chunks": 8}),
    )
}
"""Published shapes, for random weights."""


def model_names() -> list[str]:
    """Every registered name."""
    return [*BUNDLED, *SHAPES]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedModel:
    """A model in memory; nothing here changes while it generates.

    `weights` is `pretrained` or `random`; `sha256` covers the bytes of all weight files.
    """

    spec: ModelSpec
    transformer: Infinity
    tokenizer: BSQTokenizer
    text: TextFeatures
    weights: str
    sha256: str
    dtype: torch.dtype
    device: torch.device


def load_model(
    name_or_path: str | Path,
    *,
    weights: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    local_files_only: bool = False,
) -> LoadedModel:
    """Loads a registered name, a model folder or a model folder on the hub.

    Args:
        name_or_path: Which.
        weights: `pretrained` or `random`.
        dtype: What it computes in.
        device: Where it runs.
        revision: Branch, tag or commit of a hub model; None elsewhere.
        local_files_only: Takes a hub model from what was fetched before.

    Raises:
        FoveateError: There is no such model, it cannot be fetched, or `weights` is neither pretrained nor random.
        UnsupportedError: Weights of a model of which only the shape is registered.
        CheckpointError: The folder is incomplete, damaged or of another model.
    """
    if weights not in ("pretrained", "random"):
        raise FoveateError(f'weights must be "pretrained" or "random", got {weights!r}')
    if revision is not None and not _is_hub_id(name_or_path):
        raise FoveateError(f"revision needs a hub model, owner/name; {name_or_path} is none, leave it out")
    if str(name_or_path) in SHAPES:
        if weights != "random":
            raise UnsupportedError(
                f'{name_or_path}: this version loads local folders with config.json, or weights="random"'
            )
        return _random(SHAPES[str(name_or_path)], dtype, device)
    folder = find_folder(name_or_path, revision=revision, local_files_only=local_files_only)
    spec = ModelSpec.from_json(read_config(folder))
    return _random(spec, dtype, device) if weights == "random" else _pretrained(folder, spec, dtype, device)


def find_folder(name_or_path: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a bundled name, the folder itself, or the copy of a hub model, which is fetched if need be.

    Raises:
        FoveateError: There is none; the registered names are listed, or why the hub gave nothing.
    """
    name = str(name_or_path)
    if name in BUNDLED:
        folder = DATA / BUNDLED[name]
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"this installation lacks the weights of {BUNDLED[name]}; install the wheel")
        return folder
    if _is_hub_id(name_or_path):
        return _fetch(name, revision, local_files_only)
    if not Path(name_or_path).is_dir():
        raise unknown("model", name, model_names(), ", or a folder with config.json, or owner/name of a hub model")
    return Path(name_or_path)


def _is_hub_id(name_or_path: str | Path) -> bool:
    return _HUB_ID.fullmatch(str(name_or_path)) is not None and not Path(name_or_path).is_dir()


def _fetch(name: str, revision: str | None, local_files_only: bool) -> Path:
    """The local copy of a hub model."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, rarely needed

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=local_files_only))
    except Exception as error:
        # The client raises what its network library raises, so nothing narrower would do.
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FoveateError(f"no folder {name}, and no such model from the hub: {first}") from error


def _pretrained(folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    if spec.text_encoder != "minilm":
        raise UnsupportedError(f"text encoder {spec.text_encoder!r} is not in this version; there is minilm")
    text = read_text_encoder(folder, spec.transformer.text_tokens, device)
    if text.model.config.width != spec.transformer.text_width:
        raise CheckpointError(
            f"text encoder is {text.model.config.width} wide, the transformer reads {spec.transformer.text_width}"
        )
    return LoadedModel(
        spec=spec,
        transformer=read_transformer(folder, spec.transformer, dtype, device),
        tokenizer=BSQTokenizer(read_autoencoder(folder, spec.autoencoder, dtype, device), spec.patch),
        text=text,
        weights="pretrained",
        sha256=weights_sha256(folder),
        dtype=dtype,
        device=device,
    )


def _random(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    transformer = empty_module(lambda: Infinity(spec.transformer), dtype, device)
    autoencoder = empty_module(lambda: Autoencoder(spec.autoencoder), dtype, device)
    fill_randomly(transformer)
    fill_randomly(autoencoder)
    config = spec.transformer
    return LoadedModel(
        spec=spec,
        transformer=transformer,
        tokenizer=BSQTokenizer(autoencoder, spec.patch),
        text=RandomText(width=config.text_width, max_tokens=config.text_tokens, device=device),
        weights="random",
        sha256=f"random-{RANDOM_SEED}",
        dtype=dtype,
        device=device,
    )
