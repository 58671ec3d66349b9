"""`foveate env`: versions, processor, device and dtypes of this machine, and what a model needs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from foveate.cli.console import in_units, print_facts, print_json
from foveate.cli.options import (
    FORMATS,
    MACHINE,
    MODEL,
    PICTURE,
    Dtype,
    JsonFlag,
    PolicyFlag,
    Quantization,
    SizeOptions,
)
from foveate.core.errors import FoveateError


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True, slots=True)
class EnvOptions:
    """What is said; everything but `as_json` is about a model.

    Attributes:
        batch: Images generated at once.
        policy: Decides how much runs: a name, a spec such as skip-scales:count=2, or a YAML file.
        as_json: Print one JSON object.
        model: Also say what this model needs for images with guidance, without loading it.
        dtype: Dtype of the model; default: all are shown.
        quantization: With weights of its blocks in int8 or fp8.
        offload: Only the module in use is on the device.
        release_text_encoder: The text encoder is in memory only while prompts are encoded.
    """

    batch: Annotated[int, Parameter(name=["--batch", "-n"], group=PICTURE)] = 1
    policy: PolicyFlag = "full"
    as_json: JsonFlag = False
    model: Annotated[str | None, Parameter(name=["--model", "-m"])] = None
    dtype: Annotated[Dtype | None, Parameter(group=FORMATS)] = None
    quantization: Annotated[Quantization | None, Parameter(group=FORMATS)] = None
    offload: Annotated[bool, Parameter(group=MACHINE)] = False
    release_text_encoder: Annotated[bool, Parameter(group=MACHINE)] = False


_OPTIONS, _SIZE = EnvOptions(), SizeOptions()


def env(*, options: EnvOptions = _OPTIONS, size: SizeOptions = _SIZE) -> int:
    """Show what this machine offers and what a model needs.

    Args:
        options: What is said.
        size: How large the images are.
    """
    if options.model is None and (replace(options, as_json=False) != _OPTIONS or size != _SIZE):
        raise FoveateError("--model is missing: all other flags of env but --json describe what a model needs")
    if options.batch < 1:
        raise FoveateError(f"--batch must be 1 or more, got {options.batch}")
    found = _describe()
    if options.model is not None:
        found["model"] = _needs(options.model, options, size)
    if options.as_json:
        print_json(found)
    else:
        print_facts((name, text) for group, values in found.items() for name, text in _lines(group, values))
    return 0


def _describe() -> dict[str, Any]:
    """Versions, processor, devices, which code runs on them, and installed models."""
    from foveate.bench.machine import describe_machine  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.families.packaged import packaged_models  # noqa: PLC0415
    from foveate.kernels import switches  # noqa: PLC0415
    from foveate.kernels.invariance import describe_rows  # noqa: PLC0415
    from foveate.kernels.linear import describe_products  # noqa: PLC0415

    return {
        **describe_machine(),
        "switches": switches.describe(),
        "linear_layers": describe_products(),
        "rows_of_linear_layers": describe_rows(),
        "installed_models": {name: str(folder) for name, folder in packaged_models().items()},
    }


def _needs(name: str, options: EnvOptions, size: SizeOptions) -> dict[str, Any]:
    """Bytes that guided images take, by part, phase and dtype; no weights are loaded.

    Raises:
        FoveateError: There is no such model, policy or size.
    """
    from foveate.families.loading import Origin, find_folder, find_spec  # noqa: PLC0415 - torch is loaded here
    from foveate.families.memory import count_parameters, memory_need  # noqa: PLC0415
    from foveate.families.packaged import packaged_models  # noqa: PLC0415
    from foveate.families.residency import Residency  # noqa: PLC0415
    from foveate.pipeline.call import resolve  # noqa: PLC0415
    from foveate.pipeline.placement import DTYPES  # noqa: PLC0415
    from foveate.weights.folder import file_bytes  # noqa: PLC0415

    origin = Origin(name_or_path=name)
    spec = find_spec(origin)
    is_own = (name in packaged_models() or Path(name).is_dir()) and spec.conditioning.is_own
    folder = find_folder(origin) if is_own else None
    job = resolve("any", {**size.options(), "policy": options.policy}, spec)
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


def _lines(group: str, values: object) -> list[tuple[str, str]]:
    """One line per value; nested names are joined with a dot."""
    if isinstance(values, dict):
        return [line for name, value in values.items() for line in _lines(f"{group}.{name}", value)]
    if isinstance(values, list):
        return [(group, ", ".join(str(value) for value in values) or "none")]
    if isinstance(values, int) and not isinstance(values, bool) and "bytes" in group:
        return [(group, in_units(values, "B"))]
    return [(group, "none" if values is None else str(values))]
