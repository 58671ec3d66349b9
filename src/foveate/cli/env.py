"""`foveate env`: versions, processor, device and number formats of this machine, and what a model needs."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from cyclopts import Parameter

from foveate.cli.console import in_units, print_facts, print_json
from foveate.cli.options import Quantization, SizeOptions
from foveate.core.errors import FoveateError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class EnvOptions:
    """What is said; everything but `as_json` is about a model.

    Attributes:
        model: Also say what this model needs for pictures with guidance, without loading it.
        dtype: What it computes in; by default every dtype is shown.
        quantization: With weights of its blocks in eight bits.
        batch: Pictures drawn at once.
        policy: Decides how much runs: a name, a spec such as skip-scales:count=2, or a YAML file.
        offload: Only the part that works is on the device.
        release_text_encoder: The text encoder is in memory only while prompts are encoded.
        as_json: Print one JSON object.
    """

    model: Annotated[str | None, Parameter(name=["--model", "-m"])] = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantization: Quantization | None = None
    batch: Annotated[int, Parameter(name=["--batch", "-n"])] = 1
    policy: Annotated[str, Parameter(name=["--policy", "-p"])] = "full"
    offload: bool = False
    release_text_encoder: bool = False
    as_json: Annotated[bool, Parameter(name="--json")] = False


_OPTIONS, _SIZE = EnvOptions(), SizeOptions()


def env(*, options: EnvOptions = _OPTIONS, size: SizeOptions = _SIZE) -> int:
    """Say what this machine offers and what a model needs.

    Args:
        options: What is said.
        size: How large the pictures are.
    """
    if options.model is None and (replace(options, as_json=False) != _OPTIONS or size != _SIZE):
        raise FoveateError("--model is missing: every other flag of env but --json is about what a model needs")
    if options.batch < 1:
        raise FoveateError(f"--batch must be 1 or more, got {options.batch}")
    from foveate.cli import machine  # noqa: PLC0415 - torch is loaded when the command runs

    found = machine.describe()
    if options.model is not None:
        found["model"] = machine.needs(options.model, options, size)
    if options.as_json:
        print_json(found)
    else:
        print_facts((name, text) for group, values in found.items() for name, text in _lines(group, values))
    return 0


def _lines(group: str, values: object) -> list[tuple[str, str]]:
    """One line per value; nested names are joined with a dot."""
    if isinstance(values, dict):
        return [line for name, value in values.items() for line in _lines(f"{group}.{name}", value)]
    if isinstance(values, list):
        return [(group, ", ".join(str(value) for value in values) or "none")]
    if isinstance(values, int) and not isinstance(values, bool) and "bytes" in group:
        return [(group, in_units(values, "B"))]
    return [(group, "none" if values is None else str(values))]
