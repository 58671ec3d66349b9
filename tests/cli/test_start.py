"""The program itself: how fast help comes, what it imports, and names of files."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.cli.staging import Staging, slug

COMMANDS = ("generate", "compare", "sweep", "tune", "bench", "policies", "models", "env", "convert")


def foveate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def write_one_and_fail(staging: Staging) -> None:
    staging.path("a").write_text("1")
    staging.path("b").read_text()


def seconds_of(*arguments: str) -> float:
    """Processor time of a program, the least of five runs, as other tests run beside this one."""
    seconds = []
    for _ in range(5):
        before = os.times()
        assert foveate(*arguments).returncode == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(seconds)


def test_help_is_quick() -> None:
    """Processors differ by a factor of two, so the yardstick is the parser's own import."""
    arguments = ("-m", "foveate", "generate", "--help")
    assert "--guidance-scale" in foveate(*arguments).stdout
    assert seconds_of(*arguments) < 5 * seconds_of("-c", "import cyclopts")


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = "import sys\nfrom foveate.cli.main import main\n"
    code += f"codes = [main([c, '--help']) for c in {COMMANDS}] + [main(['--help'])]\n"
    code += f"assert codes == [0] * {len(COMMANDS) + 1}\n"
    code += "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
    ran = foveate("-c", code)
    assert (ran.returncode, ran.stderr) == (0, "")
    for command in COMMANDS:
        assert command in ran.stdout


def test_help_of_generate_shows_groups_in_order_and_examples_that_run(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = run("generate", "--help").out
    groups = ["Image", "Policy", "Output", "Model", "Dtypes", "Machine"]
    assert re.findall(r"\u256d\u2500 ([A-Z][a-z ]+) \u2500", text) == groups
    words = " ".join(re.sub(r"[\u2502\u256d-\u2570\u2500]", " ", text).split())
    for taught in (
        "--seed STR... One seed, or one per prompt with commas: 7,8; default: random.",
        "1 is off for Infinity, 0 for VAR, Switti and HART",
        "Keep the k likeliest values; 0 keeps all",
        "Dtype of the decoder; default: --dtype.",
    ):
        assert taught in words
    examples = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  foveate ")]
    assert len(examples) == 2
    for example in examples:
        ran = run(*example)
        assert ran.code == 0, ran.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_no_default_of_a_switch_and_no_flag_of_a_position(run: Callable[..., Any], command: str) -> None:
    text = run(command, "--help").out
    assert "[default: False]" not in text
    assert "[default: None]" not in text
    assert not re.search(r"--(kind|what|source|target|name|prompt)\b", text)


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


def test_staging_publishes_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(FileNotFoundError), Staging(target) as staging:
        write_one_and_fail(staging)
    assert list(tmp_path.iterdir()) == []
    with Staging(target) as staging:
        staging.path("a").write_text("1")
        staging.publish()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["deep", "deep/out", "deep/out/a"]
