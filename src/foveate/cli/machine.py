"""This machine and what a model needs on it, as plain data."""

from pathlib import Path
from typing import Any

from foveate.bench.machine import describe_machine
from foveate.cli.registered import file_bytes
from foveate.families.loading import BUNDLED, DATA, Origin, find_folder, find_spec
from foveate.families.memory import count_parameters, memory_need
from foveate.folder import CONFIG_NAME
from foveate.pipeline import DTYPES
from foveate.policies.full import Full


def describe(model: str | None = None, quantization: str | None = None) -> dict[str, Any]:
    """Versions, processor, devices and bundled models; with a model also what it needs.

    Raises:
        FoveateError: There is no such model.
    """
    folders = [DATA / name for name in dict.fromkeys(BUNDLED.values())]
    found = {
        **describe_machine(),
        "bundled_models": [str(folder) for folder in folders if (folder / CONFIG_NAME).is_file()],
    }
    return found if model is None else {**found, "model": needs(model, quantization)}


def needs(name: str, quantization: str | None = None) -> dict[str, Any]:
    """Bytes that one guided picture of the default size takes under the full policy, by part and dtype.

    Raises:
        FoveateError: There is no such model.
    """
    origin = Origin(name_or_path=name)
    spec = find_spec(origin)
    folder = find_folder(origin) if (name in BUNDLED or Path(name).is_dir()) and spec.conditioner == "minilm" else None
    height, width = spec.default_schedule.grids[-1]
    return {
        "name": name,
        "size": [width * spec.stride, height * spec.stride],
        "tokens": spec.default_schedule.num_tokens,
        "parameters": count_parameters(spec),
        "file_bytes": None if folder is None else file_bytes(folder),
        "quantization": quantization,
        "bytes": {
            dtype: memory_need(spec, kind, Full(), quantization=quantization).to_json()
            for dtype, kind in DTYPES.items()
        },
    }
