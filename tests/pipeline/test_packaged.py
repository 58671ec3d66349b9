"""Models of installed packages: found by their entry points; what is missing or broken is said."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from foveate.core.errors import CheckpointError, FoveateError
from foveate.families import packaged
from foveate.families.loading import Origin, find_folder, model_names
from foveate.families.packaged import DEMO_NAMES, packaged_models
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import save_image

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Replaces what is installed by names and the values of their entry points, `module:attribute`."""

    def install(**entries: str) -> None:
        found = [EntryPoint(name, value, "foveate.models") for name, value in entries.items()]
        monkeypatch.setattr(packaged, "entry_points", lambda group: found if group == "foveate.models" else [])
        packaged_models.cache_clear()

    yield install
    monkeypatch.undo()
    packaged_models.cache_clear()


def _config(name: str) -> dict[str, object]:
    config: dict[str, object] = json.loads((packaged_models()[name] / "config.json").read_text(encoding="utf-8"))
    return config


def test_the_demonstration_package_brings_emoji() -> None:
    folder = packaged_models()["emoji"]
    assert folder == packaged_models()["emoji-tiny"]
    assert _config("emoji")["format"] == 1
    assert model_names()[:3] == ["emoji", "emoji-tiny", "emoji-eight"]
    assert _config("emoji-eight")["budgets"] == ["0.25M"]


def test_a_package_adds_a_model_under_its_name(
    install: Install, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_models.py").write_text(f"from pathlib import Path\nTOY = Path({str(toy_folder)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    install(sketch="toy_models:TOY")
    assert find_folder(Origin(name_or_path="sketch")) == toy_folder
    out = Pipeline.from_pretrained("sketch")("a cat", seed=1, output_type="np").images
    assert (out == Pipeline.from_pretrained(toy_folder)("a cat", seed=1, output_type="np").images).all()
    with pytest.raises(FoveateError, match="sketch is not one, leave it out"):
        find_folder(Origin(name_or_path="sketch", revision="main"))


def test_without_the_package_the_error_says_what_to_install(install: Install) -> None:
    install()
    for name in DEMO_NAMES:
        with pytest.raises(FoveateError, match=r'not installed: pip install "foveate\[demo\]"'):
            Pipeline.from_pretrained(name)
    assert "emoji" not in model_names()


def test_broken_packages_are_named_in_one_warning_each_and_left_out(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_models.py").write_text(f"NUMBER = 3\nEMPTY = {str(tmp_path)!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    install(gone="no_such_module:X", number="odd_models:NUMBER", empty="odd_models:EMPTY")
    with pytest.warns(UserWarning, match="was left out") as caught:
        assert packaged_models() == {"empty": tmp_path}
    assert len(caught) == 2
    assert "model package gone (no_such_module:X) was left out: No module named" in str(caught[0].message)
    assert "it is not the path of a folder: 3" in str(caught[1].message)
    with pytest.raises(CheckpointError, match=r"lacks config\.json; install the package of empty again"):
        find_folder(Origin(name_or_path="empty"))


def test_listings_work_without_any_package(toy_pipe: Pipeline, tmp_path: Path) -> None:
    """In a process that sees no entry points of models, as after `pip install foveate`."""
    output, image = toy_pipe("a cat", seed=1), tmp_path / "a.png"
    save_image(output.images[0], image, {**output.row_config(0), "model": "emoji-tiny"})
    code = (
        "import importlib.metadata as m\nreal = m.entry_points\n"
        "m.entry_points = lambda **k: [] if k.get('group') == 'foveate.models' else real(**k)\n"
        "from foveate.cli.main import main\n"
        "assert main(['models']) == 0\nsys_code = main(['generate', 'x'])\nassert sys_code == 2, sys_code\n"
        f"assert main(['generate', '--from', {str(image)!r}]) == 2\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count('not installed: pip install "foveate[demo]"') == len(DEMO_NAMES)
    remedy = 'comes in a package of its own, which is not installed: pip install "foveate[demo]"'
    assert [f"{name} {remedy}" in ran.stderr for name in DEMO_NAMES[:2]] == [True, True]
