"""The `foveate` command: finds the command that was asked for, and turns errors into one line and an exit code.

Exit codes: 0, 1 a bound or a check failed, 2 bad usage or input, 130 interrupted, 143 ended by SIGTERM (129 by SIGHUP).
Commands are loaded by name when they are asked for; torch is imported when one of them runs.
"""

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from foveate.cli.arguments import decode_texts, prepared
from foveate.cli.config_file import apply_config_file
from foveate.cli.console import note
from foveate.cli.signals import FIRST_CODE, signals_raised
from foveate.cli.streams import forgiving_streams
from foveate.core.errors import FoveateError, is_out_of_memory

BAD_USAGE = 2
INTERRUPTED = 130

_COMMANDS = {
    "generate": "Generate images from prompts.",
    "batch": "Generate an image or more for every row of a file, resumable, into shards with a manifest.",
    "compare": "Compare policies with another one: image fidelity and speedup.",
    "sweep": "Compare a policy at many settings, and plot the frontier.",
    "tune": "Find the fastest setting of a policy that holds a bound, and write it as YAML.",
    "bench": "Measure time, throughput or memory of policies, load on a server, or a profile of this machine.",
    "serve": "Serve images over HTTP, behind OpenAI's images API.",
    "policies": "List the policies, their fields and presets.",
    "models": "List the models by name.",
    "env": "Show what this machine offers and what a model needs.",
    "convert": "Rewrite a published checkpoint as safetensors, with a manifest of hashes.",
}

# Written out, as the module that defines the figures imports torch; a test compares them.
_FIGURES = """Figures of bounds:
  psnr.mean, psnr.p10, psnr.min, foreground_psnr.mean, foreground_psnr.p10, foreground_psnr.min,
  ssim.mean, ssim.p10, ssim.min, ms_ssim.mean, ms_ssim.p10, ms_ssim.min, flip.mean, flip.p90, flip.max,
  speedup.transformer, speedup.decoder, speedup.end_to_end, each also with .p10 and .p90 behind it,
  latency_ms.median, latency_ms.p10, latency_ms.p90, transformer_ms.median, transformer_ms.p10, transformer_ms.p90,
  flops_ratio, beats_controls_by_db, yardstick_psnr, identical, constant.images, constant.references, n, runs
Those of images and the medians of speedups also with .low and .high behind them, the ends of their 95 % interval;
judges add their name with .mean, .p10 and .min, or .mean, .p90 and .max where less is better."""

_EPILOGUES = {
    "generate": """Examples:
  foveate generate "green apple" owl --seed 7,8 --policy ld-pruning -o out/
  foveate generate --from out/owl-8.png""",
    "batch": """Examples:
  foveate batch prompts.jsonl -o out/ --policy ld-pruning
  foveate batch prompts.parquet -o out/ --column prompt=caption --dry-run
  foveate batch prompts.txt -o out/ --shard 3/8

Exit codes: 0, 1 if rows failed (failed.jsonl), 2 bad usage or input, 130 interrupted, 143 terminated; the same command
goes on where it ended.""",
    "compare": f"""Examples:
  foveate compare -p ld-pruning -p drop-branch:count=1 --fail-if "ssim.p10 < 0.9" --html report.html
  foveate compare --manifest full/ --manifest fovea/ --html report.html

{_FIGURES}

Exit codes: 0, 1 if a --fail-if holds, 2 bad usage or input, 130 interrupted, 143 terminated.""",
    "sweep": f"""Example:
  foveate sweep -p ld-pruning --over energy_share=0.8..0.95:0.05 --over sats=true,false --controls --plot frontier.png

{_FIGURES}

Exit codes: 0, 1 if a --fail-if holds, 2 bad usage or input, 130 interrupted, 143 terminated.""",
    "tune": f"""Example:
  foveate tune -p drop-branch --over count=0..4 --subject-to "psnr.p10 >= 27" -o tuned.yaml

{_FIGURES}

Exit codes: 0, 1 if no setting holds the bounds, 2 bad usage or input, 130 interrupted, 143 terminated.""",
}
"""What help says below the flags."""


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow to import, rarely asked for

    try:
        return version("foveate")
    except PackageNotFoundError:
        return "unknown: foveate runs from a folder and is not installed"


def _default(value: object) -> str | None:
    """A default as help shows it: that a switch is off says its name, and None is explained in words."""
    return None if value is None or value is False else str(value)


def build_app() -> App:
    """The command line without anything loaded; a new one for every call, as it keeps state while it parses."""
    app = App(
        name="foveate",
        help="Run next-scale image models and spend compute only where it changes the image.",
        version=_version,
        help_format="plaintext",
        default_parameter=Parameter(negative=(), show_default=_default),
        config=(apply_config_file, decode_texts),
        suppress_keyboard_interrupt=False,
    )
    for name, summary in _COMMANDS.items():
        app.command(f"foveate.cli.{name}:{name}", name=name, help=summary, help_epilogue=_EPILOGUES.get(name))
    return app


def _fail(message: str, code: int = BAD_USAGE) -> int:
    note(message)
    return code


def _usage(error: CycloptsError) -> str:
    return f"{error} See: {' '.join(('foveate', *(error.command_chain or ())))} --help"


def _of_system(error: OSError | MemoryError | RuntimeError) -> str:
    """The message of a system error; any other error is raised again."""
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        return f"{error.filename}: {what}" if error.filename else what
    if not is_out_of_memory(error):
        raise error
    first = (str(error).splitlines() or ["the allocation failed"])[0][:200]
    return f"not enough memory ({first}); generate fewer or smaller images at once, or use a smaller model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What follows the program's name; None takes it from the process.

    Returns:
        The exit code.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    with forgiving_streams() as streams, signals_raised() as came:
        try:
            code = streams.settle(_run(tokens))
        except KeyboardInterrupt:
            code = _fail("terminated" if came else "interrupted", INTERRUPTED)
    return FIRST_CODE + came[0] if came else code


def _run(tokens: Sequence[str]) -> int:
    """One command, whose errors become a line and a code."""
    try:
        app, found = build_app(), prepared(tokens)
        result = app(found, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(_usage(error))
    except FoveateError as error:
        return _fail(str(error))
    except UnicodeEncodeError as error:
        return _fail(f"{error.object!r} cannot be written as {error.encoding}; use UTF-8, or set PYTHONUTF8=1")
    except BrokenPipeError:
        # Whoever read our output has enough; only a stream that is not the process's own gets here.
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        return _fail(_of_system(error))
    return result if isinstance(result, int) else 0
