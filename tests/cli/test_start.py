"""The program itself: how fast help comes, what it imports, and names of files."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.cli.staging import Staging, slug, unique_names

COMMANDS = ("generate", "compare", "bench", "eval", "policies", "models", "env", "convert", "train")


def foveate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def write_one_and_fail(staging: Staging) -> None:
    staging.path("a").write_text("1")
    staging.path("b").read_text()


def test_help_is_quick() -> None:
    arguments = ("-m", "foveate", "generate", "--help")
    foveate(*arguments)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        ran = foveate(*arguments)
        seconds.append(time.perf_counter() - began)
        assert ran.returncode == 0
    assert "--guidance-scale" in ran.stdout
    # What else runs on the machine only ever adds time.
    assert min(seconds) < 0.3


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = "import sys\nfrom foveate.cli.main import main\n"
    code += f"codes = [main([c, '--help']) for c in {COMMANDS}] + [main(['--help'])]\n"
    code += f"assert codes == [0] * {len(COMMANDS) + 1}\n"
    code += "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
    ran = foveate("-c", code)
    assert (ran.returncode, ran.stderr) == (0, "")
    for command in COMMANDS:
        assert command in ran.stdout


def test_unknown_command_is_one_line() -> None:
    ran = foveate("-m", "foveate", "generat", "a cat")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith('foveate: Unknown command "generat". Did you mean "generate"?')
    assert ran.stderr.count("\n") == 1


def test_no_command_prints_help(run: Callable[..., Any]) -> None:
    ran = run()
    assert ran.code == 0
    assert "generate" in ran.out


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red apple!", "a-red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("\u7ea2\u82f9\u679c", "\u7ea2\u82f9\u679c"),
        ("\u2764", "image"),
        ("x" * 100, "x" * 60),
    ],
)
def test_slug(prompt: str, name: str) -> None:
    assert slug(prompt) == name


def test_repeated_names_get_numbers() -> None:
    assert unique_names(["a", "a", "a-2", "a"]) == ["a", "a-2", "a-2-2", "a-3"]


def test_staging_publishes_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(FileNotFoundError), Staging(target) as staging:
        write_one_and_fail(staging)
    assert list(tmp_path.iterdir()) == []
    with Staging(target) as staging:
        staging.path("a").write_text("1")
        staging.publish()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["deep", "deep/out", "deep/out/a"]
