"""The `foveate` command: finds the command that was asked for, and turns errors into one line and an exit code.

Exit codes: 0, 1 a bound or a check failed, 2 bad usage or input, 130 interrupted. Commands are loaded by name when they
are asked for; torch is imported when one of them runs.
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from foveate.cli.config_file import apply_config_file
from foveate.core.errors import FoveateError

BAD_USAGE = 2
INTERRUPTED = 130

_COMMANDS = {
    "generate": "Draw pictures from prompts.",
    "compare": "Measure how near a policy comes to another one, and how much time it saves.",
    "bench": "Measure time, throughput or memory of policies, or write a profile of this machine.",
    "eval": "Measure how good a bundled model is, against the art it was trained on.",
    "policies": "List the policies, their fields and presets.",
    "models": "List the models by name.",
    "env": "Say what this machine offers and what a model needs.",
    "convert": "Rewrite a published checkpoint as safetensors, with a manifest of hashes.",
    "train": "Train the bundled model again from its recipe.",
}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow to import, rarely asked for

    try:
        return version("foveate")
    except PackageNotFoundError:
        return "unknown: foveate runs from a folder and is not installed"


def build_app() -> App:
    """The command line without anything loaded; a new one for every call, as it keeps state while it parses."""
    app = App(
        name="foveate",
        help="Run next-scale image models and spend compute only where it changes the picture.",
        version=_version,
        help_format="plaintext",
        default_parameter=Parameter(negative=()),
        config=apply_config_file,
        suppress_keyboard_interrupt=False,
    )
    for name, summary in _COMMANDS.items():
        # The module of a command has its name, but no function can be called eval.
        function = {"eval": "evaluate"}.get(name, name)
        app.command(f"foveate.cli.{function}:{function}", name=name, help=summary)
    return app


def _fail(message: str, code: int = BAD_USAGE) -> int:
    sys.stderr.write(f"foveate: {' '.join(message.split())}\n")
    return code


def _usage(error: CycloptsError) -> str:
    return f"{error} See: {' '.join(('foveate', *(error.command_chain or ())))} --help"


def _of_system(error: OSError | MemoryError | RuntimeError) -> str:
    """What the machine could not do; any other error of the program itself is raised again."""
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        return f"{error.filename}: {what}" if error.filename else what
    # torch says so in words alone, and differently on every device.
    text = str(error)
    if isinstance(error, RuntimeError) and not any(word in text.lower() for word in ("memory", "allocate")):
        raise error
    first = (text.splitlines() or ["no more could be had"])[0][:200]
    return f"not enough memory ({first}); draw fewer or smaller pictures at once, or a smaller model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What follows the program's name; None takes it from the process.

    Returns:
        The exit code.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = build_app()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(_usage(error))
    except FoveateError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        return _fail(_of_system(error))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0
