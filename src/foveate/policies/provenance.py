"""Where a policy file's setting comes from: on which model it keeps which bound, and the command that measured that.

The key `provenance` stands beside the fields of a policy file, or in an entry of its own where the file is a list.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from foveate.core.errors import FoveateError

KEY = "provenance"
_KNOWN = ("summary", "bound", "model", "sha256", "command")


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What was measured of a setting; None where nothing was.

    Attributes:
        summary: What the setting is for.
        bound: What it keeps, as `--fail-if` and `--subject-to` write it.
        model: The model that it was measured on.
        sha256: Of that model's weights.
        command: What measured it.
        rest: Anything else that the file says, as plain data.
    """

    summary: str | None = None
    bound: tuple[str, ...] = ()
    model: str | None = None
    sha256: str | None = None
    command: str | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Provenance":
        """Reads the mapping of a file.

        Raises:
            FoveateError: A value is not a text, or `bound` no list of them.
        """
        texts = {name: data.get(name) for name in _KNOWN if name != "bound"}
        bound = data.get("bound")
        bounds = [] if bound is None else bound if isinstance(bound, list) else [bound]
        for name, value in [*texts.items(), *(("bound", entry) for entry in bounds)]:
            if not isinstance(value, str) and (name == "bound" or value is not None):
                raise FoveateError(f"{KEY}: {name} must be a text or null, got {value!r}")
        rest = {str(name): value for name, value in data.items() if name not in _KNOWN}
        return cls(bound=tuple(bounds), rest=rest, **texts)

    def is_of(self, model: str, sha256: str) -> bool:
        """Whether it was measured on these weights; where it names none, any will do."""
        return self.model is None or (self.model == model and self.sha256 in (None, sha256))


def read_policy_file(path: Path) -> tuple[list[dict[str, Any]], Provenance | None]:
    """The entries of a policy file, each with the key `policy`, and its provenance.

    Raises:
        FoveateError: The file cannot be read, or has another form.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise FoveateError(f"cannot read policy file {path}: {str(error).splitlines()[0]}") from None
    entries, found = data if isinstance(data, list) else [data], None
    policies = []
    for entry in entries:
        if not isinstance(entry, dict) or not {"policy", KEY} & set(entry):
            raise FoveateError(f"policy file {path} needs a mapping with the key policy, or a list of them")
        if KEY in entry:
            found = _only(path, found, entry[KEY])
        if "policy" in entry:
            policies.append({str(key): value for key, value in entry.items() if key != KEY})
    if not policies:
        raise FoveateError(f"policy file {path} needs a mapping with the key policy, or a list of them")
    return policies, found


def _only(path: Path, found: Provenance | None, data: object) -> Provenance:
    if found is not None or not isinstance(data, dict):
        raise FoveateError(f"policy file {path}: {KEY} must be one mapping")
    return Provenance.from_data(data)
