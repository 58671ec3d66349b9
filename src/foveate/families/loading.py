"""A model in memory: from an installed package, a folder of ours, a published name, or published files on this disk.

Nothing is fetched that is here already, and everything is checked before it is used: the kind of the weights, that both
networks belong together, and every key.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foveate.conditioning.on_demand import OnDemand
from foveate.conditioning.text import Conditioner
from foveate.core.errors import CheckpointError, FoveateError, unknown
from foveate.core.finite import largest_magnitude, names_of_broken, too_large
from foveate.core.hub import is_like_a_path, is_repository, no_such_file
from foveate.core.layers import empty_module
from foveate.core.protocols import NextScaleModel, ScaleTokenizer
from foveate.core.warnings import CallWarning
from foveate.families.family import TextEncoderFiles
from foveate.families.minilm import OWN
from foveate.families.packaged import packaged_models, refuse_missing_demo
from foveate.families.published import ALIASES, PUBLISHED, published_model
from foveate.families.residency import Residency
from foveate.families.sources import (
    Sources,
    cloned_transformers,
    fetch_model,
    fetch_published,
    local_sources,
    unpinned,
)
from foveate.families.spec import ModelSpec
from foveate.kernels import native
from foveate.kernels.invariance import tile_failing_
from foveate.weights.files import files_of, is_weight_file, naming, weights_sha256
from foveate.weights.folder import (
    AUTOENCODER,
    CONFIG_NAME,
    TRANSFORMER,
    folder_sha256,
    read_config,
    read_network,
    read_text_encoder,
)
from foveate.weights.quantization import check_quantization, quantize_blocks
from foveate.weights.random_weights import RANDOM_SEED, fill_randomly

logger = logging.getLogger("foveate")

_RESIDENT = Residency()


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a model comes from.

    `name_or_path` is a registered name, a folder, a file of transformer weights, or `owner/name` of a folder on the
    hub. `autoencoder` and `text_encoder` replace what would be looked for beside it; `revision` is a branch, tag or
    commit on the hub.
    """

    name_or_path: str | Path
    autoencoder: str | Path | None = None
    text_encoder: str | Path | None = None
    revision: str | None = None
    local_files_only: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Dtypes of a model: what it computes in, and what may differ from that.

    `decoder_dtype` is the decoder's, None if it is `dtype`. `quantization` is how the blocks of the transformer hold
    their weights (`weights.quantization`), None if in `dtype`.
    """

    dtype: torch.dtype
    decoder_dtype: torch.dtype | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        """Refuses unknown or missing quantisation, and combinations that are not possible."""
        if self.quantization is not None:
            check_quantization(self.quantization)

    @property
    def autoencoder_dtype(self) -> torch.dtype:
        """What the autoencoder is read in, so that no part of it is rounded twice."""
        return self.dtype if self.decoder_dtype is None else torch.promote_types(self.dtype, self.decoder_dtype)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedModel:
    """A model in memory; nothing here changes while it generates.

    `weights` is `pretrained` or `random`; `sha256` identifies the weights (`weights_sha256`), those of a text
    encoder only where the model's own folder holds or names it: `text_encoders` names others by folder or repository.
    `tiled_layers` are shapes of linear layers that run in tiles (`kernels.invariance`). `warnings` belong to every
    call. `device` is where it runs; an offloaded model (`offload`) lies in main memory between calls.
    """

    spec: ModelSpec
    transformer: NextScaleModel
    tokenizer: ScaleTokenizer
    text: Conditioner
    weights: str
    sha256: str
    precision: Precision
    device: torch.device
    text_encoders: tuple[str, ...] = ()
    tiled_layers: tuple[str, ...] = ()
    warnings: tuple[CallWarning, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in; the decoder may have another one."""
        return self.precision.dtype

    @property
    def has_independent_rows(self) -> bool:
        """Whether a token has the same bits whatever tokens share its matmuls.

        On a CPU, by the probe at loading; quantised weights in float32 take other code for few tokens than for many.
        """
        is_quantised = self.precision.quantization is not None and self.precision.dtype is torch.float32
        return self.device.type == "cpu" and not is_quantised


def model_names() -> list[str]:
    """Every registered name."""
    return [*packaged_models(), *PUBLISHED, *ALIASES]


def load_model(
    origin: Origin,
    *,
    weights: str,
    precision: Precision,
    device: torch.device,
    residency: Residency = _RESIDENT,
) -> LoadedModel:
    """Loads a model.

    Args:
        origin: Which, and where it is.
        weights: `pretrained` or `random`.
        precision: What it computes in.
        device: Where it runs.
        residency: Which parts stay in memory. A text encoder that will be released is read once here, before the other
            parts are, so that whatever is wrong with it is said now.

    Raises:
        FoveateError: There is no such model, it cannot be fetched, or `weights` is neither pretrained nor random.
        CheckpointError: Files are missing, damaged or of another model.
    """
    if weights not in ("pretrained", "random"):
        raise FoveateError(f'weights must be "pretrained" or "random", got {weights!r}')
    if device.type == "cpu":
        # Compiled once per machine, and not in the first image's time.
        native.library()
    if weights == "random":
        _refuse_parts(origin, "random weights")
        return _random(find_spec(origin), precision, device, residency)
    folder = _own_folder(origin)
    if folder is not None:
        _refuse_parts(origin, f"{origin.name_or_path}, which holds its own")
        model = _from_folder(folder, precision, device, residency)
        return replace(model, warnings=_unpinned(origin, folder))
    return _from_sources(_find_sources(origin), precision, device, residency)


def _refuse_parts(origin: Origin, whose: str) -> None:
    for name, given in (("autoencoder", origin.autoencoder), ("text_encoder", origin.text_encoder)):
        if given is not None:
            raise FoveateError(f"{name} has no effect on {whose}; leave it out")


def find_spec(origin: Origin) -> ModelSpec:
    """Shapes and defaults of a model, without its weights where that is possible.

    Raises:
        FoveateError: There is no such model.
        CheckpointError: Its files do not say what it is.
    """
    name = str(origin.name_or_path)
    published = published_model(name)
    if published is not None:
        return published.spec
    folder = _own_folder(origin)
    return ModelSpec.from_json(read_config(folder)) if folder is not None else _find_sources(origin).spec


def find_folder(origin: Origin) -> Path:
    """The folder of a package's name, the folder itself, or the copy of a hub model, which is fetched if need be.

    Raises:
        FoveateError: There is none; the registered names are listed, or why the hub gave nothing.
    """
    folder = _own_folder(origin)
    if folder is None:
        raise FoveateError(f"{origin.name_or_path} is not a folder with {CONFIG_NAME}; name one of foveate's format")
    return folder


def _own_folder(origin: Origin) -> Path | None:
    """The folder in our format that an origin means, or None where it means published files."""
    name, path = str(origin.name_or_path), Path(origin.name_or_path)
    if origin.revision is not None and (name in packaged_models() or path.exists()):
        raise FoveateError(f"revision needs a model on the hub; {name} is not one, leave it out")
    packaged = packaged_models()
    if name in packaged:
        folder = packaged[name]
        if not (folder / CONFIG_NAME).is_file():
            raise CheckpointError(f"{folder} lacks {CONFIG_NAME}; install the package of {name} again")
        return folder
    if not path.exists():
        refuse_missing_demo(name)
    if published_model(name) is not None or path.is_file():
        return None
    if not path.is_dir():
        if not is_repository(origin.name_or_path):
            raise _nothing_at(origin.name_or_path)
        path = fetch_model(name, origin.revision, origin.local_files_only)
    return path if _is_ours(path) else None


def _nothing_at(name: str | Path) -> FoveateError:
    """The error for a name that is not registered, not on this disk and not possible on the hub."""
    if isinstance(name, Path) or is_like_a_path(name):
        return no_such_file("model", name)
    rest = "; or give a folder or a file of weights (there is no such file here), or owner/name on the hub"
    return unknown("model", name, model_names(), rest)


def _unpinned(origin: Origin, path: Path) -> tuple[CallWarning, ...]:
    """The warning of weights that came from a repository on the hub, if they did."""
    if not is_repository(origin.name_or_path):
        return ()
    return unpinned(str(origin.name_or_path), origin.revision, path)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is in our format, complete or not; others hold published files."""
    if (folder / CONFIG_NAME).is_file():
        return "format" in read_config(folder)
    has_parts = all(any(folder.glob(f"{part}*.safetensors*")) for part in (TRANSFORMER, AUTOENCODER))
    has_published = any(is_weight_file(path) for path in folder.iterdir()) or bool(cloned_transformers(folder))
    return has_parts or not has_published


def _find_sources(origin: Origin) -> Sources:
    name = str(origin.name_or_path)
    published = published_model(name)
    if published is not None:
        return fetch_published(
            published, origin.autoencoder, origin.text_encoder, origin.revision, origin.local_files_only
        )
    path = Path(origin.name_or_path)
    if not path.exists():
        path = fetch_model(name, origin.revision, origin.local_files_only)
    sources = local_sources(path, origin.autoencoder, origin.text_encoder, origin.local_files_only)
    return replace(sources, warnings=_unpinned(origin, path))


def _from_folder(folder: Path, precision: Precision, device: torch.device, residency: Residency) -> LoadedModel:
    """A model in our own format."""
    spec = ModelSpec.from_json(read_config(folder))
    if not spec.conditioning.is_own:
        own = " or ".join(conditioning.name for conditioning in OWN)
        raise CheckpointError(f"{folder}: a folder of ours holds the text encoder {own}, got {spec.conditioner}")
    shape, has_places = spec.kind.text(spec.transformer), spec.conditioning.has_places
    place = _text_place(device, residency)
    read = partial(read_text_encoder, folder, shape.tokens, has_places=has_places)
    encoder = read(place)
    if encoder.model.config.width != shape.width:
        raise CheckpointError(f"text encoder is {encoder.model.config.width} wide, the transformer reads {shape.width}")
    text: Conditioner = OnDemand(load=read, device=place) if residency.release_text_encoder else encoder
    del encoder
    return _assemble(
        spec, (folder / TRANSFORMER, folder / AUTOENCODER), text, folder_sha256(folder), precision, device, residency
    )


def _from_sources(sources: Sources, precision: Precision, device: torch.device, residency: Residency) -> LoadedModel:
    """A model in published files; its text encoders come from their own folders or repositories."""
    spec = sources.spec
    paths = (sources.transformer, sources.autoencoder)
    digest = weights_sha256(file for path in paths for file in files_of(path))
    read, place = partial(_conditioner, sources, precision.dtype), _text_place(device, residency)
    text = read(place)
    if residency.release_text_encoder and sources.text_encoders:
        text = OnDemand(load=read, device=place)
    model = _assemble(spec, paths, text, digest, precision, device, residency)
    return replace(model, text_encoders=sources.text_encoders, warnings=sources.warnings)


def _assemble(
    spec: ModelSpec,
    paths: tuple[Path, Path],
    text: Conditioner,
    sha256: str,
    precision: Precision,
    device: torch.device,
    residency: Residency,
) -> LoadedModel:
    kind, place = spec.kind, _place(device, residency)
    transformer, autoencoder = (
        read_network(path, partial(network.build, config), network.load, dtype, place)
        for path, network, config, dtype in (
            (paths[0], kind.transformer, spec.transformer, precision.dtype),
            (paths[1], kind.autoencoder, spec.autoencoder, precision.autoencoder_dtype),
        )
    )
    with naming(paths[1]):
        _settle((transformer, autoencoder), precision)
    return LoadedModel(
        spec=spec,
        transformer=transformer,
        tokenizer=kind.tokenizer(autoencoder, spec.patch),
        text=text,
        weights="pretrained",
        sha256=sha256,
        precision=precision,
        device=device,
    )


def _settle(networks: tuple[Any, Any], precision: Precision) -> None:
    """Puts a loaded transformer and autoencoder into their dtypes.

    Raises:
        CheckpointError: A weight of the autoencoder overflows its dtype.
    """
    transformer, autoencoder = networks
    _settle_autoencoder(autoencoder, precision)
    if precision.quantization is not None:
        blocks = [transformer.block(i) for i in range(transformer.shape.num_blocks)]
        quantize_blocks(blocks, precision.quantization)


def _settle_autoencoder(autoencoder: Any, precision: Precision) -> None:  # noqa: ANN401 - of any family
    decoder_dtype = precision.decoder_dtype or precision.dtype
    is_mixed = decoder_dtype != precision.dtype
    # Weights fit the dtype that they were read in; only what is rounded here can overflow.
    largest = {name: largest_magnitude(weight) for name, weight in autoencoder.named_parameters()} if is_mixed else {}
    autoencoder.settle(precision.dtype, decoder_dtype)
    broken = names_of_broken(autoencoder.named_parameters()) if is_mixed else []
    if broken:
        dtype = autoencoder.get_parameter(broken[0]).dtype
        raise too_large(
            broken[0], largest[broken[0]], dtype, "--decoder-dtype" if dtype == decoder_dtype else "--dtype"
        )


def with_independent_rows(model: LoadedModel) -> LoadedModel:
    """The model after the probe of its linear layers: those whose rows depend on the rows beside them run in tiles."""
    transformer: Any = model.transformer
    tiled = tile_failing_([transformer.block(i) for i in range(transformer.shape.num_blocks)], [transformer.head])
    if tiled:
        logger.info("linear layers run in tiles, so that no image depends on its batch; slower: %s", ", ".join(tiled))
    return replace(model, tiled_layers=tiled)


def _conditioner(sources: Sources, dtype: torch.dtype, device: torch.device) -> Conditioner:
    """The published conditioner; a class-conditional model has no weights for it."""
    spec = sources.spec
    if spec.conditioning.read is None:
        raise CheckpointError(f"{spec.name}: the text encoder {spec.conditioner} lies in folders of ours only")
    return spec.conditioning.read(
        TextEncoderFiles(
            model=spec.name,
            config=spec.transformer,
            places=sources.text_encoders,
            dtype=dtype,
            device=device,
            local_files_only=sources.local_files_only,
        )
    )


def _place(device: torch.device, residency: Residency) -> torch.device:
    """Where the weights of the networks go."""
    return torch.device("cpu") if residency.offload else device


def _text_place(device: torch.device, residency: Residency) -> torch.device:
    """Where those of the text encoder go: one that is dropped behind its work need not wait in main memory."""
    return device if residency.release_text_encoder else _place(device, residency)


def _random(spec: ModelSpec, precision: Precision, device: torch.device, residency: Residency) -> LoadedModel:
    """The shapes of a model, filled with noise."""
    kind, place = spec.kind, _place(device, residency)
    transformer = empty_module(partial(kind.transformer.build, spec.transformer), precision.dtype, place)
    autoencoder = empty_module(partial(kind.autoencoder.build, spec.autoencoder), precision.autoencoder_dtype, place)
    fill_randomly(transformer)
    fill_randomly(autoencoder)
    _settle((transformer, autoencoder), precision)
    return LoadedModel(
        spec=spec,
        transformer=transformer,
        tokenizer=kind.tokenizer(autoencoder, spec.patch),
        text=kind.random_conditioner(spec.transformer, device),
        weights="random",
        sha256=f"random-{RANDOM_SEED}",
        precision=precision,
        device=device,
    )
