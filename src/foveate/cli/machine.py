"""This machine and what a model needs on it, as plain data."""

from pathlib import Path
from typing import Any

from foveate.bench.machine import describe_machine
from foveate.cli.env import EnvOptions
from foveate.cli.options import SizeOptions
from foveate.cli.registered import file_bytes
from foveate.families.loading import Origin, find_folder, find_spec
from foveate.families.memory import count_parameters, memory_need
from foveate.families.packaged import packaged_models
from foveate.families.residency import Residency
from foveate.kernels import switches
from foveate.kernels.invariance import describe_rows
from foveate.kernels.linear import describe_products
from foveate.pipeline.call import resolve
from foveate.pipeline.options import Options
from foveate.pipeline.pipeline import DTYPES


def describe() -> dict[str, Any]:
    """Versions, processor, devices, which code runs on them, and installed models."""
    return {
        **describe_machine(),
        "switches": switches.describe(),
        "linear_layers": describe_products(),
        "rows_of_linear_layers": describe_rows(),
        "installed_models": {name: str(folder) for name, folder in packaged_models().items()},
    }


def needs(name: str, options: EnvOptions, size: SizeOptions) -> dict[str, Any]:
    """Bytes that guided pictures take, by part, phase and dtype; no weights are loaded.

    Raises:
        FoveateError: There is no such model, policy or size.
    """
    origin = Origin(name_or_path=name)
    spec = find_spec(origin)
    is_own = (name in packaged_models() or Path(name).is_dir()) and spec.conditioning.is_own
    folder = find_folder(origin) if is_own else None
    width, height = size.width_and_height() or (None, None)
    call = Options(
        width=width, height=height, aspect_ratio=size.aspect_ratio, pixels=size.pixels, policy=options.policy
    )
    job = resolve("any", call, spec)
    rows, columns = job.schedule.grids[-1]
    residency = Residency(offload=options.offload, release_text_encoder=options.release_text_encoder)
    kinds = DTYPES if options.dtype is None else {options.dtype: DTYPES[options.dtype]}
    return {
        "name": name,
        "size": [columns * spec.stride, rows * spec.stride],
        "tokens": job.schedule.num_tokens,
        "batch": options.batch,
        "policy": job.policy.spec,
        "offload": options.offload,
        "release_text_encoder": options.release_text_encoder,
        "parameters": count_parameters(spec),
        "file_bytes": None if folder is None else file_bytes(folder),
        "quantization": options.quantization,
        "bytes": {
            dtype: memory_need(
                spec,
                kind,
                job.policy,
                options.batch,
                schedule=job.schedule,
                residency=residency,
                quantization=options.quantization,
            ).to_json()
            for dtype, kind in kinds.items()
        },
    }
