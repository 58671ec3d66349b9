"""`foveate convert`: a published checkpoint as safetensors, with a manifest of hashes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from foveate.cli.console import in_units, print_facts, print_json
from foveate.cli.options import Dtype


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """How weights are written.

    Attributes:
        dtype: Dtype of all weights; default: what each one has.
        as_json: Print one JSON object.
    """

    dtype: Dtype | None = None
    as_json: Annotated[bool, Parameter(name="--json")] = False


_DEFAULTS = ConvertOptions()


def convert(source: Path, target: Path, /, *, options: ConvertOptions = _DEFAULTS) -> int:
    """Rewrite a published checkpoint as safetensors, with a manifest of hashes.

    Args:
        source: A transformer's or autoencoder's weights: .pth, .safetensors, an index of shards, or their folder.
        target: A .safetensors file, or a folder for shards of 5 GiB; nothing is overwritten.
        options: How it is written.
    """
    from foveate.families.convert import convert as rewrite  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.pipeline.placement import DTYPES  # noqa: PLC0415 - as above

    done = rewrite(source, target, None if options.dtype is None else DTYPES[options.dtype])
    if options.as_json:
        files = [str(path) for path in done.files]
        print_json({"kind": done.kind, "files": files, "tensors": done.num_tensors, "bytes": done.num_bytes})
    else:
        facts = [("kind", done.kind), ("tensors", str(done.num_tensors)), ("size", in_units(done.num_bytes, "B"))]
        print_facts([*facts, *(("file", str(path)) for path in done.files)])
    return 0
