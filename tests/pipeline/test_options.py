"""Options are declared once: what follows from a declaration, and that a user's own script is typed."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast, get_type_hints

import numpy as np
import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.families.spec import Defaults
from foveate.pipeline import options as declared
from foveate.pipeline.options import OPTIONS, Options, checked
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import regenerate, save_image

USER_SCRIPT = """
import numpy as np
from PIL import Image
from torch import Tensor
from typing_extensions import assert_type

import foveate as fv

pipe = fv.Pipeline.from_pretrained("emoji-tiny")
out = pipe("a", seed=1)
assert_type(out.images, list[Image.Image])
out.images[0].save("a.png")
assert_type(pipe(["a", "b"], output_type="pil", seed=[1, 2], top_k=np.int64(3)).images, list[Image.Image])
array = pipe("a", output_type="np", guidance_scale=[1.0] * 7, policy=fv.SkipScales()).images
print(array.shape, out.report.flops_ratio, out.seeds)
assert_type(pipe("a", output_type="latent").images, Tensor)
for event in pipe.stream("a"):
    assert_type(event.images, list[Image.Image] | None)
    assert_type(event.image, Image.Image | None)
    if event.output is not None:
        out = event.output
for arrays in pipe.stream("a", 0, output_type="np"):
    assert_type(arrays.images, np.ndarray | None)
for tensors in pipe.stream("a", output_type="pt", seed=1):
    assert_type(tensors.image, Tensor | None)
shared: fv.CallOptions = {"seed": 1, "top_k": 2}
assert_type(pipe("a", **shared).images, list[Image.Image])
kept: fv.Options = {"seed": 1, "output_type": "pt"}
assert_type(pipe("a", **kept).images, list[Image.Image] | np.ndarray | Tensor)
for either in pipe.stream("a", **kept):
    assert_type(either.images, list[Image.Image] | np.ndarray | Tensor | None)
    print(either.image)
pipe("a", sed=1)  # error
pipe("a", seed="1")  # error
pipe("a", rng="dice")  # error
pipe("a", return_dict=False)  # error
"""

PAGE = Path(__file__).parents[2] / "docs/python.md"
DOCUMENTED = "".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
"""The examples of the page, one behind the other as a reader types them."""


@pytest.mark.soak
@pytest.mark.parametrize("script", [pytest.param(USER_SCRIPT, id="here"), pytest.param(DOCUMENTED, id="docs")])
def test_a_users_script_is_typed(tmp_path: Path, script: str) -> None:
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "script.py"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.stdout.endswith(("no issues found in 1 source file\n", "(checked 1 source file)\n")), ran.stderr
    wrong = [number for number, line in enumerate(script.splitlines(), start=1) if line.endswith("# error")]
    found = {int(line.split(":")[1]) for line in ran.stdout.splitlines() if ": error:" in line}
    assert found == set(wrong), ran.stdout


def test_every_option_is_declared_with_a_type_and_a_help() -> None:
    hints = get_type_hints(Options, {**vars(declared), "torch": torch, "Policy": Policy})
    assert list(hints) == list(OPTIONS)
    for name, option in OPTIONS.items():
        assert (option.name, option.help[-1]) == (name, ".")
        if option.per_scale and option.alias_of is None:
            assert hasattr(Defaults(), name), "its default is the model's own"


def test_what_is_given_is_completed_with_defaults_and_aliases_are_resolved() -> None:
    call = checked({"cfg": 3.0, "tau": [1.0], "seed": 4})
    assert set(call) == set(OPTIONS) - {"cfg", "tau"}
    assert (call["guidance_scale"], call["temperature"], call["seed"], call["rng"]) == (3.0, [1.0], 4, "keyed")
    with pytest.raises(FoveateError, match="^give temperature or its alias tau, not both$"):
        checked({"tau": 1.0, "temperature": 1.0})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"more_smooth": "no"}, "more_smooth must be True, False or None, got 'no'"),
        ({"more_smooth": 0}, "more_smooth must be True, False or None, got 0"),
        ({"trace": "no"}, "trace must be True or False, got 'no'"),
        ({"batch_invariant": None}, "batch_invariant must be True or False, got None"),
        ({"batch_invariant": np.ones(2, bool)}, "batch_invariant must be True or False, got array"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, or None, got 3"),
    ],
)
def test_switches_and_callbacks_are_what_they_are_declared_as(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=f"^{re.escape(message)}"):
        checked(cast(Options, given))


def test_switches_of_numpy_do() -> None:
    given = cast(Options, {"trace": np.True_, "more_smooth": np.False_, "batch_invariant": False})
    call = checked(given)
    assert (call["trace"], call["more_smooth"], call["batch_invariant"]) == (True, False, False)
    assert type(call["trace"]) is type(call["more_smooth"]) is bool


def test_an_option_of_a_later_version_is_left_out_of_older_files(toy_pipe: Pipeline, tmp_path: Path) -> None:
    output = toy_pipe("a cat", seed=3)
    kept = [name for name, option in OPTIONS.items() if option.is_kept]
    assert set(kept) <= set(output.config)
    older: dict[str, Any] = output.row_config(0)
    del older["more_smooth"]
    again = regenerate(save_image(output.images[0], tmp_path / "a.png", older), toy_pipe)
    assert (again.is_identical, again.differences) == (True, ("more_smooth: None then, False now",))
    del older["top_k"]
    with pytest.raises(FoveateError, match="damaged, KeyError"):
        regenerate(save_image(output.images[0], tmp_path / "a.png", older), toy_pipe)
