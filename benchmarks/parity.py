"""Runs recorded cases of the reference implementations and compares: `python benchmarks/parity.py DIR [--strict]`.

A case is a `.json` (what was run) and a `.safetensors` (what came out); weights follow from their names. Each family
has a file of its own here (`parity_FAMILY.py`) and a line in `FAMILIES`.
Prints one JSON line per case. Exit code 1 if a case fails (with `--strict` also if one is not supported), 2 if there
is none.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import parity_hart
import parity_infinity
import parity_switti
import parity_var
from parity_common import Case, Record, Result
from safetensors.torch import load_file

from foveate.core.errors import UnsupportedError

FAMILIES: dict[str, Callable[[str, Case, Record], Result]] = {
    "hart": parity_hart.run,
    "infinity": parity_infinity.run,
    "switti": parity_switti.run,
    "var": parity_var.run,
}
"""What runs a case of a family: from its name, what was run and what came out."""
PLANNED = {"hart", "infinity"}
"""Families whose runner knows cases with a policy."""


def run_case(path: Path) -> Result:
    """Runs the case of one `.json`; what cannot run fails with a reason in one line."""
    try:
        case = json.loads(path.read_text(encoding="utf-8"))
        family, policy = case["family"], case.get("policy")
        if family not in FAMILIES:
            return Result(case=path.stem, status="unsupported", reason=f"family {family} not available")
        if policy is not None and family not in PLANNED:
            return Result(case=path.stem, status="unsupported", reason=f"policy {policy['name']} not available")
        return FAMILIES[family](path.stem, case, load_file(path.with_suffix(".safetensors")))
    except UnsupportedError as error:
        return Result(case=path.stem, status="unsupported", reason=str(error))
    except Exception as error:  # one case that cannot be read or run must not hide the others
        first = (str(error).splitlines() or [""])[0]
        return Result(case=path.stem, status="fail", reason=f"{type(error).__name__}: {first}")


def as_line(result: Result) -> str:
    """The result as a line of JSON, which has no infinity: an error without a number is null."""
    values = asdict(result)
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases of a folder; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compares with recorded numbers of the reference implementations.")
    parser.add_argument("folder", type=Path, help="holds one .json and one .safetensors per case")
    parser.add_argument("--strict", action="store_true", help="a case that is not supported fails")
    options = parser.parse_args(arguments)
    paths = sorted(options.folder.glob("*.json"))
    if not paths:
        sys.stderr.write(f"{options.folder}: there is no case (.json) here\n")
        return 2
    bad = {"fail", "unsupported"} if options.strict else {"fail"}
    exit_code = 0
    for path in paths:
        result = run_case(path)
        sys.stdout.write(as_line(result) + "\n")
        sys.stdout.flush()
        exit_code = 1 if result.status in bad else exit_code
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
