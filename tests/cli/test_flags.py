"""Flags of a call follow from the declarations of its options."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from foveate.cli.options import BatchFlags, CompareFlags, GenerateFlags, options_of
from foveate.core.errors import FoveateError
from foveate.pipeline.option_texts import names_of
from foveate.pipeline.options import OPTIONS


@pytest.mark.parametrize("command", ["generate", "batch", "compare"])
def test_help_has_every_option_of_a_command_under_all_its_names(run: Callable[..., Any], command: str) -> None:
    words = " ".join(re.sub(r"[\u2502\u256d-\u2570\u2500]", " ", run(command, "--help").out).split())
    for option in OPTIONS.values():
        if command in option.commands:
            assert " ".join(names_of(option)) in words


def test_what_is_not_given_is_the_default_of_the_declaration() -> None:
    for flags, command in ((GenerateFlags(), "generate"), (BatchFlags(), "batch"), (CompareFlags(), "compare")):
        expected = {name: option.default for name, option in OPTIONS.items() if command in option.commands}
        assert options_of(flags) == expected


def test_several_numbers_are_read_by_the_type_of_the_option() -> None:
    flags: Any = GenerateFlags
    found = options_of(flags(temperature=["1", "2,3"], top_k=["4"], seed=["7,8"], more_smooth=False))
    assert (found["temperature"], found["top_k"], found["seed"]) == ([1.0, 2.0, 3.0], 4, [7, 8])
    assert found["more_smooth"] is False
    with pytest.raises(FoveateError, match="^--guidance-scale must be a number"):
        options_of(flags(guidance_scale=["hot"]))
