"""What a stranger meets first: the bundled model, the pages and their links, and the README's examples."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

import foveate as fv
from foveate.families.packaged import packaged_models
from foveate.pipeline.pipeline import Pipeline, stack_uint8

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "recipes/emoji/README.md", ROOT / "packages/foveate-emoji/README.md"]


@pytest.fixture(scope="module")
def emoji() -> Pipeline:
    pipe = Pipeline.from_pretrained("emoji-tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_tables_are_filled(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / link).exists(), link
    assert not re.search(r"<!-- table:\S+ -->\s*<!-- /table -->|<!-- notes:|to be written", text)


def test_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:src/foveate|benchmarks|[a-z]+)/[\w<>/]+\.py)`", text)
    missing = [
        path
        for path in named
        if not any(where.glob(path.replace("<name>", "*")) for where in (ROOT, ROOT / "src/foveate"))
    ]
    assert len(named) > 15
    assert not missing


def test_the_site_has_every_page() -> None:
    def pages(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages(entry)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md"))


def test_the_model_card_and_the_notice_travel_with_the_weights() -> None:
    card = (packaged_models()["emoji-tiny"] / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "memorises" in card
    assert "to be written" not in card
    assert "Microsoft" in (packaged_models()["emoji-tiny"] / "NOTICE").read_text(encoding="utf-8")


def test_the_bundled_model_draws_a_picture_that_depends_on_the_prompt(emoji: Pipeline) -> None:
    pictures = stack_uint8(emoji(["hamburger", "cactus"], seed=7).images)
    assert pictures.shape == (2, 256, 256, 3)
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 10
    corners = pictures[:, [4, 4, -4, -4], [4, -4, 4, -4]]
    assert corners.mean() > 235, "drawings stand on white"


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code[1], "README.md", "exec"), scope)
    assert (tmp_path / "apple.png").stat().st_size > 1000
    assert isinstance(scope["pipe"], fv.Pipeline)


def test_the_shipped_card_is_the_one_that_the_recipe_exports() -> None:
    shipped = (packaged_models()["emoji-tiny"] / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert shipped == (ROOT / "recipes/emoji/configs/emoji_tiny_card.md").read_text(encoding="utf-8")
