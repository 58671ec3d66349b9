"""`--config file.yaml`: values for the flags of a command; a flag that is given wins over the file.

The file maps names of flags to values, with hyphens or underscores, and names of commands to such mappings. Flags on
top are for every command that reads the file; those in the section of the command win over them.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclopts import App, Argument, ArgumentCollection

from foveate.cli.arguments import for_system
from foveate.core.errors import FoveateError, unknown
from foveate.core.text_file import read_text

COMMANDS = ("generate", "batch", "compare", "sweep", "tune", "bench", "serve")
"""Commands that take such a file, and so may have a section in it."""

_SWITCHES = {"on": "true", "off": "false"}
"""What YAML calls a switch beside true, yes, false and no."""


def apply_config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fills arguments that the command line left open, as a configuration source of cyclopts.

    Raises:
        FoveateError: The file cannot be read or is not a mapping, holds prompts itself, or a flag that does not exist.
    """
    given = [a for a in arguments if a.name == "--config" and a.field_info.name == "config" and a.tokens]
    if not given:
        return
    from cyclopts.config import Dict  # noqa: PLC0415 - `--help` must answer without it

    path = Path(given[0].tokens[0].value)
    data = read_mapping(path)
    top = {key: value for key, value in data.items() if key not in COMMANDS and not isinstance(value, dict)}
    for name, section in data.items():
        if name not in top and name not in COMMANDS:
            raise unknown("command", name, COMMANDS, f"; {path} may have a section for each of them")
        if name in COMMANDS and not isinstance(section, dict | None):
            raise FoveateError(f"{path}: the section {name} must map flags to values, got {section!r}")
    command = commands[-1]
    flags = {name[2:]: argument for argument in arguments for name in argument.names if name.startswith("--")}
    values = _by_flag(path, command, top, flags) | _by_flag(path, command, data.get(command) or {}, flags)
    source = Dict(
        {key: value for key, value in values.items() if value is not None}, source=str(path), use_commands_as_keys=False
    )
    source(app, commands, arguments)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping; an empty file is an empty mapping.

    Values are the text that stands in the file, as on a command line, so that 4:3 is a ratio and not a number of base
    60. Nothing at all, `null` and `~` are None.

    Raises:
        FoveateError: The file cannot be read, holds something else, or has a key twice.
    """
    import yaml  # noqa: PLC0415

    class Loader(yaml.SafeLoader):
        """Reads scalars as text, and refuses what would be lost."""

        yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
            first: [entry for entry in entries if entry[0].endswith((":null", ":merge"))]
            for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            """Refuses a key that comes twice; what `<<` merges in may be overridden."""
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise FoveateError(f"{path}: {twice!r} is there twice; one of them would be lost")
            return super().construct_mapping(node, deep=deep)

    try:
        data = yaml.load(read_text(path, "the configuration"), Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise FoveateError(f"the configuration {path} is not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise FoveateError(f"the configuration {path} must map flags to values, got a {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def _by_flag(path: Path, command: str, values: Mapping[str, Any], flags: Mapping[str, Argument]) -> dict[str, Any]:
    """The values by the first name of their flags."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("_", "-")
        if name == "prompt" or (name == "prompts" and isinstance(value, list)):
            raise FoveateError(f"{path}: prompts stand in the command, or one a line in a file that `prompts:` names")
        if name == "config":
            raise FoveateError(f"{path}: a configuration cannot name another one; leave out {key}")
        if name not in flags:
            raise _no_flag(path, command, str(key), flags)
        if isinstance(value, dict):
            raise FoveateError(f"{path}: {key} takes a value, got a mapping; sections are {', '.join(COMMANDS)}")
        first = flags[name].name.removeprefix("--")
        if first in found:
            raise FoveateError(f"{path}: --{first} is there twice, the second time as {key}; leave one out")
        found[first] = _as_typed(path, str(key), value, flags[name])
    return found


def _no_flag(path: Path, command: str, key: str, flags: Mapping[str, Argument]) -> FoveateError:
    close = difflib.get_close_matches(key.replace("_", "-").lower(), flags, n=1)
    hint = f"Did you mean --{close[0]}?" if close else f"See: foveate {command} --help;"
    return FoveateError(
        f'{path}: {command} has no flag "{key}". {hint} Flags of one command alone stand in a section of its name.'
    )


def _as_typed(path: Path, key: str, value: object, argument: Argument) -> object:
    """A value as the command line would have it."""
    if isinstance(value, list):
        return [_as_typed(path, key, entry, argument) for entry in value]
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise FoveateError(f"{path}: {key} holds a NUL character, {value!r}; leave it out")
    return for_system(_SWITCHES.get(value.lower(), value) if argument.is_flag() else value)
