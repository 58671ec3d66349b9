"""`foveate env`: versions, processor, device and number formats of this machine, and what a model needs."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from foveate.cli.console import in_units, print_facts, print_json
from foveate.cli.options import Quantization


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class EnvOptions:
    """What is said.

    Attributes:
        model: Also say what this model needs for one picture with guidance.
        quantization: With weights of its blocks in eight bits.
        as_json: Print one JSON object.
    """

    model: Annotated[str | None, Parameter(name=["--model", "-m"])] = None
    quantization: Quantization | None = None
    as_json: Annotated[bool, Parameter(name="--json")] = False


_DEFAULTS = EnvOptions()


def env(*, options: EnvOptions = _DEFAULTS) -> int:
    """Say what this machine offers and what a model needs.

    Args:
        options: What is said.
    """
    from foveate.cli import machine  # noqa: PLC0415 - torch is loaded when the command runs

    found = machine.describe(options.model, options.quantization)
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
    if isinstance(values, int) and "bytes" in group:
        return [(group, in_units(values, "B"))]
    return [(group, "none" if values is None else str(values))]
