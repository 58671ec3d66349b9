"""Finds published weights: on the hub by a friendly name, or on this disk by what the files hold.

A transformer on this disk says by its weights what it is; the autoencoder lies beside it under its published name, or
is given. Wrong pairs are refused with the reason, also those that agree in every shape.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.hub import is_commit, is_repository, no_such_file
from foveate.core.stand_in import refuse_stand_in
from foveate.core.warnings import CallWarning
from foveate.families import registry
from foveate.families.family import Family
from foveate.families.published import PUBLISHED
from foveate.families.spec import ModelSpec, Published, WeightSource
from foveate.weights.files import files_of, is_weight_file, naming, read_weights, some
from foveate.weights.names import kind_within
from foveate.weights.stored import State


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The files of a model; `text_encoders` are folders or hub repositories, `warnings` belong to every call."""

    spec: ModelSpec
    transformer: Path
    autoencoder: Path
    text_encoders: tuple[str, ...]
    local_files_only: bool = False
    warnings: tuple[CallWarning, ...] = ()


def fetch_folder(repo: str, revision: str | None, local_files_only: bool, part: str = "") -> Path:
    """The local copy of a hub repository, or of a folder in it.

    Raises:
        FoveateError: Why the hub gave nothing.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, rarely needed

    patterns = [f"{part}/*"] if part else None
    try:
        folder = snapshot_download(repo, revision=revision, local_files_only=local_files_only, allow_patterns=patterns)
    except Exception as error:
        # The client raises what its network library raises, so nothing narrower would do.
        raise FoveateError(f"no folder {repo}, and no such model from the hub: {_first_line(error)}") from error
    return Path(folder) / part if part else Path(folder)


def fetch_model(repo: str, revision: str | None, local_files_only: bool) -> Path:
    """The local copy of a hub repository that holds one model.

    Raises:
        FoveateError: The repository is one that holds many published models, or the hub gave nothing.
    """
    shared = {name: entry.transformer for name, entry in PUBLISHED.items() if entry.transformer.path}
    names = [name for name, source in shared.items() if source.repo.lower() == repo.lower()]
    if names:
        raise FoveateError(
            f"{repo} is known by model name, and is not fetched as a whole; ask for one of {', '.join(names)}"
        )
    return fetch_folder(repo, revision, local_files_only)


def fetch_published(
    entry: Published,
    autoencoder: str | Path | None,
    text_encoder: str | Path | None,
    revision: str | None,
    local_files_only: bool,
) -> Sources:
    """The files of a published model, from the hub's cache or the hub; given ones are not fetched.

    Raises:
        FoveateError: Why the hub gave nothing.
        CheckpointError: The given autoencoder is of another model.
    """
    if autoencoder is not None:
        _refuse_pair(entry, Path(autoencoder))
        # What is missing here is said before gigabytes are fetched.
        files_of(Path(autoencoder))
    text_encoders = _text_encoders(text_encoder, entry)
    revision = entry.revision if revision is None else revision
    transformer = _fetch(entry.transformer, revision, local_files_only)
    spec = entry.spec
    if entry.facts is not None:
        facts = _facts_of(
            _fetch(WeightSource(repo=entry.transformer.repo, path=entry.facts), revision, local_files_only)
        )
        spec = replace(spec, transformer=_config_of(spec.kind, transformer, facts))
    warnings = unpinned(entry.transformer.repo, revision, transformer)
    if autoencoder is not None:
        second = Path(autoencoder)
    elif entry.autoencoder.repo == entry.transformer.repo:
        second = _fetch(entry.autoencoder, revision, local_files_only)
    else:
        # A repository of its own, in which the commits of the first one do not exist.
        second = _fetch(entry.autoencoder, None, local_files_only)
        warnings = warnings or (_loose(entry.autoencoder.repo, "give a copy of its file as autoencoder"),)
    return Sources(
        spec=spec,
        transformer=transformer,
        autoencoder=second,
        text_encoders=text_encoders,
        local_files_only=local_files_only,
        warnings=warnings,
    )


def unpinned(repo: str, revision: str | None, path: Path) -> tuple[CallWarning, ...]:
    """The warning that weights on the hub may change; none where a commit was asked for.

    Args:
        repo: Where they came from.
        revision: What was asked for.
        path: Their local copy; the cache of the hub names a folder above it by the commit.
    """
    if is_commit(revision):
        return ()
    commit = next(filter(is_commit, path.parts), "COMMIT")
    return (_loose(repo, f"ask for this version with revision={commit} (--revision)"),)


def _loose(repo: str, remedy: str) -> CallWarning:
    message = f"the weights come from {repo} without a commit, so they may change there; {remedy}"
    return CallWarning(code="weights_unpinned", message=message)


def local_sources(
    path: Path, autoencoder: str | Path | None, text_encoder: str | Path | None, local_files_only: bool
) -> Sources:
    """Published files on this disk.

    Args:
        path: A file of transformer weights, an index of shards, or a folder that holds them.
        autoencoder: The autoencoder's file; None looks beside the transformer.
        text_encoder: Folder or hub repository; None takes the published one.
        local_files_only: Whether the text encoder must have been fetched before.

    Raises:
        CheckpointError: The weights are of no known family, or a file is missing or of another model.
    """
    path = _transformer_in(path)
    family = _family_of(read_weights(path), path)
    config = _config_of(family, path, _facts_of(path.parent / "config.json"))
    entry = _published_like(family, config, path)
    found = Path(autoencoder) if autoencoder is not None else _autoencoder_beside(path, family, entry)
    if entry is not None:
        _refuse_pair(entry, found)
    # The file may be a fine-tune: under the published name its images could not be told from the original's.
    spec = _unnamed(family, config, found, path) if entry is None else replace(entry.spec, name=path.stem)
    default = entry or family.published()[0]
    text_encoders = _text_encoders(text_encoder, default)
    return Sources(
        spec=spec,
        transformer=path,
        autoencoder=found,
        text_encoders=text_encoders,
        local_files_only=local_files_only,
    )


def _text_encoders(given: str | Path | None, entry: Published) -> tuple[str, ...]:
    """Those given, or the published ones.

    Raises:
        CheckpointError: A path is given at which nothing is.
    """
    if given is None:
        return entry.text_encoders
    if not is_repository(given) and not Path(given).exists():
        raise no_such_file("text encoder", given)
    return (str(given),)


def _fetch(source: WeightSource, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - slow to import, rarely needed

    if source.is_folder:
        return fetch_folder(source.repo, revision, local_files_only, source.path)
    try:
        return Path(hf_hub_download(source.repo, source.path, revision=revision, local_files_only=local_files_only))
    except Exception as error:
        # As above.
        raise FoveateError(f"no {source.path} from {source.repo} on the hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def cloned_transformers(folder: Path) -> list[Path]:
    """Weights of transformers in folders of their own, if a folder is the copy of such a published repository."""
    places = [folder / entry.transformer.path for entry in PUBLISHED.values() if "/" in entry.transformer.path]
    return [place for place in places if place.is_file()]


def _transformer_in(path: Path) -> Path:
    """The transformer's file of a folder, or of the copy of a repository: the one that is not an autoencoder.

    Of several, one that is called a moving average is taken.
    """
    if not path.is_dir():
        return path
    files = [file for file in sorted(path.iterdir()) if is_weight_file(file) and not _is_autoencoder(file)]
    files = files or cloned_transformers(path)
    averages = [file for file in files if "ema" in re.split(r"[._-]", file.stem.lower())]
    files = averages if len(averages) == 1 else files
    indices = [file for file in files if file.name.endswith(".index.json")]
    if len(indices or files) != 1:
        names = ", ".join(file.name for file in indices or files) or "none"
        raise CheckpointError(f"{path}: the folder must hold one transformer, found {names}; name the file")
    return (indices or files)[0]


def _is_autoencoder(path: Path) -> bool:
    return _is_published_autoencoder(path.stem) or "vae" in path.stem.lower()


def _is_published_autoencoder(stem: str) -> bool:
    """Whether a file of this name, its ending aside, is taken for the published autoencoder that is called so."""
    used = (Path(entry.autoencoder.path).stem for entry in PUBLISHED.values() if entry.autoencoder.path)
    return stem in used or any(stem in family.other_autoencoders for family in registry.FAMILIES)


def _hub_name(stem: str) -> str:
    """The name that the hub has of an autoencoder under any of its published names."""
    return next((f.autoencoder_aliases[stem] for f in registry.FAMILIES if stem in f.autoencoder_aliases), stem)


def _family_of(state: State, path: Path) -> Family:
    with naming(path):
        kind = kind_within(state)
    found = next((family for family in registry.FAMILIES if family.transformer.kind == kind), None)
    if found is not None:
        return found
    if kind is not None:
        raise CheckpointError(f"{path}: the weights are an autoencoder; name the transformer")
    known = ", ".join(sorted(family.name for family in registry.FAMILIES))
    raise CheckpointError(f"{path}: unknown model family (known: {known}); the file holds {some(sorted(state))}")


def _config_of(family: Family, path: Path, facts: dict[str, Any]) -> Any:  # noqa: ANN401 - of any family
    """The transformer's configuration, from its weights and what is said beside them."""
    with naming(path):
        return family.transformer.infer(read_weights(path), facts)


def _facts_of(config: Path) -> dict[str, Any]:
    """What a config.json says; nothing if there is none."""
    refuse_stand_in(config)
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _published_like(family: Family, config: Any, path: Path) -> Published | None:  # noqa: ANN401 - of any family
    """The published model of this shape; where two have it, the one whose files are called like this one."""
    entries = [entry for entry in PUBLISHED.values() if entry.spec.family == family.name]
    alike = [entry for entry in entries if family.shape(entry.spec.transformer) == family.shape(config)]
    called = [entry for entry in alike if entry.transformer.path in (path.name, path.parent.name)]
    return next(iter(called or alike), None)


def _autoencoder_beside(path: Path, family: Family, entry: Published | None) -> Path:
    wanted = entry.autoencoder.path or entry.autoencoder.repo if entry is not None else ""
    like = entry or family.published()[0]
    if "/" in like.transformer.path and (path.parent.parent / like.autoencoder.path).is_dir():
        # As in the repository, where each network has a folder of its own.
        return path.parent.parent / like.autoencoder.path
    # Shards have a folder of their own; what belongs to them lies beside that folder.
    places = [path.parent, path.parent.parent] if path.name.endswith(".index.json") else [path.parent]
    files = [file for place in places for file in sorted(place.iterdir())]
    beside = [file for file in files if is_weight_file(file) and _is_autoencoder(file)]
    named = [file for file in beside if _hub_name(file.stem) == Path(wanted).stem]
    if named or len(beside) == 1:
        return (named or beside)[0]
    found = ", ".join(file.name for file in beside) or "none"
    raise CheckpointError(
        f"{path.name} needs {wanted or f'the autoencoder of family {family.name}'} beside it, found {found}; "
        "or give its path as autoencoder"
    )


def _refuse_pair(entry: Published, autoencoder: Path) -> None:
    """Refuses a published autoencoder of another model: some agree in all shapes and still give bad images."""
    name = _hub_name(autoencoder.stem)
    if _is_published_autoencoder(name) and entry.autoencoder.path and name != Path(entry.autoencoder.path).stem:
        raise CheckpointError(
            f"{entry.spec.name} was trained with {entry.autoencoder.path}; with {autoencoder.name} its images come "
            "out wrong"
        )


def _unnamed(family: Family, config: Any, found: Path, path: Path) -> ModelSpec:  # noqa: ANN401 - of any family
    """A fine-tune of an unpublished shape: sizes as its family has them, defaults of the family's first model."""
    with naming(found):
        autoencoder = family.autoencoder.infer(read_weights(found), {})
    like = family.published()[0].spec
    try:
        sizes = family.sizes(config, autoencoder)
        return replace(like, name=path.stem, transformer=config, autoencoder=autoencoder, **sizes)
    except CheckpointError:
        raise
    except FoveateError as error:
        raise CheckpointError(f"{path}: {error}") from None
