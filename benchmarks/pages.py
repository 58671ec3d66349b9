"""Puts measured tables into the README and the docs, where a page asks for them."""

from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent


def fill_pages(tables: Mapping[str, str]) -> None:
    """Replaces what stands between `<!-- table:NAME -->` and `<!-- /table -->` in every page of the repository."""
    end = "<!-- /table -->"
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for name, table in tables.items():
            begin = f"<!-- table:{name} -->"
            if begin in text:
                head, rest = text.split(begin, 1)
                text = f"{head}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"
        path.write_text(text, encoding="utf-8")
