"""`--config file.yaml`: values for the flags of a command; a flag that is given wins over the file.

The file maps names of flags to values, with hyphens or underscores, or names of commands to such mappings.
"""

from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection

from foveate.core.errors import FoveateError


def apply_config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fills arguments that the command line left open, as a configuration source of cyclopts.

    Raises:
        FoveateError: The file cannot be read or is no mapping, or holds prompts itself.
    """
    given = [a for a in arguments if a.name == "--config" and a.field_info.name == "config" and a.tokens]
    if not given:
        return
    from cyclopts.config import Dict  # noqa: PLC0415 - `--help` must answer without it

    path = Path(given[0].tokens[0].value)
    data = read_mapping(path)
    section = data.get(commands[-1]) if commands else None
    values = section if isinstance(section, dict) else data
    if "prompt" in values or isinstance(values.get("prompts"), list):
        raise FoveateError(f"{path}: prompts stand in the command, or one a line in a file that `prompts:` names")
    source = Dict({str(k): v for k, v in values.items() if v is not None}, source=str(path), use_commands_as_keys=False)
    source(app, commands, arguments)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping; an empty file is an empty mapping.

    Raises:
        FoveateError: The file cannot be read or holds something else.
    """
    import yaml  # noqa: PLC0415

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FoveateError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FoveateError(f"the configuration {path} is not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise FoveateError(f"the configuration {path} must map flags to values, got a {type(data).__name__}")
    return data
