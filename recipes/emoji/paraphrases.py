"""Ways to ask for a drawing in words that no caption of the corpus uses, and the label of what is meant."""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Paraphrase:
    """A prompt, and the label of the drawing that it asks for."""

    text: str
    label: str


def bundled_paraphrases() -> tuple[Paraphrase, ...]:
    """Returns the paraphrases that come with this package."""
    text = (Path(__file__).parent / "data" / "paraphrases.tsv").read_text(encoding="utf-8")
    pairs = [line.split("\t") for line in text.splitlines() if line]
    return tuple(Paraphrase(text=text, label=label) for text, label in pairs)


def unseen(paraphrases: tuple[Paraphrase, ...], labels: Set[str], captions: Set[str]) -> tuple[Paraphrase, ...]:
    """Keeps what can be asked of a model fairly.

    Args:
        paraphrases: All of them.
        labels: What the model was trained to generate; a paraphrase of anything else is left out.
        captions: What it was trained to read, in lower case; a paraphrase among them is left out.
    """
    return tuple(one for one in paraphrases if one.label in labels and one.text.lower() not in captions)
