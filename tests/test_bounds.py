"""What `make bounds` installs is what pyproject.toml promises."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def first_of(version: str) -> str:
    """A version without trailing zeros: 5.4 and 5.4.0 are the same."""
    return re.sub(r"(\.0)+$", "", version)


def lowest_here() -> dict[str, set[str]]:
    """Versions by name, one per marker."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.partition(";")[0].strip().split("==")
            found.setdefault(name, set()).add(first_of(version))
    return found


def test_the_lowest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = lowest_here()
    bounds = [*project["dependencies"], *project["optional-dependencies"]["eval"]]
    for requirement in bounds:
        name, version = re.match(r"([\w-]+)(?:>=|==)([\d.]+)", requirement).groups()
        assert first_of(version) in found.pop(name), requirement
    assert found == {}, "nothing else is held down"


def test_the_demo_extra_names_the_version_of_the_package_beside_it() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    package = tomllib.loads((ROOT / "packages/foveate-emoji/pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra["demo"] == [f"{package['name']}=={package['version']}"]
