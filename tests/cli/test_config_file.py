"""`--config`: flags on top and in sections, and what would be lost in silence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.cli import compare, generate
from foveate.cli.config_file import COMMANDS, read_mapping
from foveate.cli.main import build_app
from foveate.core.errors import FoveateError

Seen = dict[str, Any]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What `generate` and `compare` were asked to do; nothing runs."""
    found: Seen = {}

    def keep(*arguments: object) -> int:
        found.clear()
        for given in arguments:
            names = getattr(type(given), "__slots__", ())
            found.update(given if isinstance(given, dict) else {name: getattr(given, name) for name in names})
        return 0

    monkeypatch.setattr(generate, "_draw", keep)
    monkeypatch.setattr(compare, "_compare", keep)
    return found


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], None]:
    """Writes the file that the tests name."""
    return lambda text: (tmp_path / "c.yaml").write_text(text, encoding="utf-8") and None


def test_flags_on_top_and_in_a_section_both_apply(
    run: Callable[..., Any], config: Callable[[str], None], seen: Seen
) -> None:
    config(
        "model: toy\nguidance_scale: 3\nseed: 5\ntop-k: 4\nquiet: true\n"
        "generate:\n  cfg: [1, 2]\n  num-images: 2\n  seed: [7, 8]\n"
        "compare:\n  policy: drop-branch\n  runs: 5\nbench:\n"
    )
    assert run("generate", "a", "--config", "c.yaml", "--top-k", 9).code == 0
    assert (seen["model"], seen["guidance_scale"], seen["seed"]) == ("toy", [1.0, 2.0], [7, 8])
    assert (seen["num_images_per_prompt"], seen["top_k"], seen["quiet"]) == (2, 9, True)
    assert run("compare", "--config", "c.yaml").code == 0
    assert (seen["model"], seen["guidance_scale"], seen["seed"]) == ("toy", 3.0, 5)
    assert (seen["policy"], seen["runs"], seen["quiet"]) == (["drop-branch"], 5, True)


def test_values_are_what_is_written(run: Callable[..., Any], config: Callable[[str], None], seen: Seen) -> None:
    config(
        "aspect_ratio: 4:3\nsize: 1M\nnegative-prompt: no\nseed: 010\npolicy: ~\noffload: on\nquiet: off\n"
        "revision: 1.10\nmodel: 2024-01-01\n"
    )
    assert run("generate", "a", "--config", "c.yaml").code == 0
    assert (seen["aspect_ratio"], seen["negative_prompt"], seen["seed"]) == ("4:3", "no", 10)
    assert (seen["policy"], seen["offload"], seen["quiet"]) == ("full", True, False)
    assert (seen["revision"], seen["model"]) == ("1.10", "2024-01-01")


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_may_have_a_byte_order_mark(run: Callable[..., Any], tmp_path: Path, seen: Seen, codec: str) -> None:
    (tmp_path / "c.yaml").write_bytes("# \u7ea2\r\nmodel: \u7ea2\r\nnegative_prompt: \u7ea2\r\n".encode(codec))
    assert run("generate", "a", "--config", "c.yaml").code == 0
    assert (seen["model"], seen["negative_prompt"]) == ("\u7ea2", "\u7ea2")


def test_anchors_are_merged_and_may_be_overridden(
    run: Callable[..., Any], config: Callable[[str], None], seen: Seen
) -> None:
    config("generate: &base {seed: 1, policy: full}\ncompare:\n  <<: *base\n  seed: 2\n")
    assert run("compare", "--config", "c.yaml").code == 0
    assert (seen["policy"], seen["seed"]) == (["full"], 2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("polici: full", ['generate has no flag "polici". Did you mean --policy?', "c.yaml"]),
        ("generate: {gidance_scale: 1}", ['"gidance_scale". Did you mean --guidance-scale?']),
        ("runs: 5\ngenerate: {seed: 1}", ['"runs"', "Flags of one command alone stand in a section of its name"]),
        ("xyzzy: 5", ['"xyzzy". See: foveate generate --help']),
        ("genrate: {seed: 1}", ["no command 'genrate'; did you mean generate?", "c.yaml"]),
        ("generate: 3", ["the section generate must map flags to values, got '3'"]),
        ("generate: {seed: {a: 1}}", ["seed takes a value, got a mapping"]),
        ("seed: 1\nseed: 2", ["'seed' is there twice"]),
        ("generate: {seed: 1}\ngenerate: {top_k: 2}", ["'generate' is there twice"]),
        ("top_k: 1\ntop-k: 2", ["--top-k is there twice, the second time as top-k"]),
        ("cfg: 1\nguidance_scale: 2", ["--guidance-scale is there twice, the second time as guidance_scale"]),
        ("config: d.yaml", ["a configuration cannot name another one"]),
        ("prompt: a cat", ["prompts stand in the command, or one a line"]),
        ('output: "a\\0b"', ["output holds a NUL character"]),
        ("seed: !!python/object:os.system 1", ["is not YAML"]),
        ("a: 1\n---\nb: 2", ["is not YAML"]),
        ("[" * 5000, ["is not YAML"]),
        ("3", ["must map flags to values, got a str"]),
    ],
)
def test_what_would_be_lost_is_refused(
    run: Callable[..., Any], config: Callable[[str], None], seen: Seen, text: str, parts: list[str]
) -> None:
    config(text)
    run("generate", "a", "--config", "c.yaml").assert_refused(*parts)
    assert seen == {}


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"seed: 1\nmodel: caf\xe9\n")
    with pytest.raises(FoveateError, match="cannot read the configuration .*c.yaml: line 2 is not UTF-8"):
        read_mapping(tmp_path / "c.yaml")


def test_sections_are_the_commands_that_take_the_flag() -> None:
    app = build_app()
    takers = []
    for name in app:
        if not name.startswith("-") and name != "train":
            arguments = app[name].assemble_argument_collection()
            takers += [name for argument in arguments if argument.name == "--config"]
    assert set(takers) == set(COMMANDS)
