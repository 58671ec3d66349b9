"""How good the bundled model is: the figures and the sheet of its model card, from one command.

    python benchmarks/model_report.py --corpus RUN/corpus --out docs/results

Needs the corpus that `foveate train` built. Forty prompts go into an unselected sheet, 100 are scored: the nearest
drawing of the whole corpus (EfficientNet-lite0 features, white ground) should be the one that was asked for. The same
score of the tokenizer's reconstructions of those drawings is the ceiling.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from foveate.conditioning.minilm import TextEncoder
from foveate.eval.features import features, load_network
from foveate.eval.fidelity import foreground_psnr, psnr
from foveate.eval.quality import TextMatch, kid, nearest
from foveate.families.loading import Origin, find_folder
from foveate.pipeline import Pipeline, stack_uint8
from foveate.pipeline_output import to_uint8
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.bsq import BSQTokenizer
from foveate.train.captions import all_captions, framed_captions
from foveate.train.corpus import Corpus, load_corpus
from foveate.train.recipe import save_sheet
from foveate.train.tokenizer import composite, reconstruct

HERE = Path(__file__).parent


def pictures(corpus: Corpus, split: str | None = None) -> tuple[np.ndarray, list[str]]:
    """Drawings on white as uint8, and their labels."""
    drawings = [d for d in corpus.drawings if split is None or d.split == split]
    pixels = composite(np.ascontiguousarray(corpus.images_NYXc[[d.index for d in drawings]]))
    return to_uint8(pixels), [d.label for d in drawings]


def rebuilt(autoencoder: Autoencoder, images: np.ndarray, grids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The tokenizer's reconstructions, uint8."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return np.concatenate([to_uint8(reconstruct(autoencoder, part, grids)) for part in pixels.split(8)])


def draw(pipe: Pipeline, prompts: Sequence[str], seed: int) -> np.ndarray:
    """Pictures of all prompts, in batches of eight."""
    parts = [pipe.generate(prompts[i : i + 8], seed=seed, output_type="np") for i in range(0, len(prompts), 8)]
    return np.concatenate([stack_uint8(part.images) for part in parts])


def share(found: np.ndarray, labels: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the pictures whose nearest drawing has the wanted label."""
    return float(np.mean([labels[i] == label for i, label in zip(found, wanted, strict=True)]))


def autoencoder_of(pipe: Pipeline) -> Autoencoder:
    """The bundled model's autoencoder; no other family is reported here."""
    assert isinstance(pipe.model.tokenizer, BSQTokenizer)
    return pipe.model.tokenizer.autoencoder


def tokenizer_figures(pipe: Pipeline, corpus: Corpus) -> dict[str, float]:
    """PSNR of the tokenizer alone, whole picture and foreground, on seen and on held-out drawings."""
    grids = tuple((n, n) for n in (1, 2, 4, 6, 8, 12, 16))
    figures = {}
    for split in ("train", "test"):
        images, _ = pictures(corpus, split)
        again = rebuilt(autoencoder_of(pipe), images, grids)
        figures[f"tokenizer_psnr_{split}"] = float(np.mean(psnr(again, images)))
        figures[f"tokenizer_foreground_psnr_{split}"] = float(np.mean(foreground_psnr(again, images)))
    return figures


def model_figures(pipe: Pipeline, corpus: Corpus, model: str, seed: int) -> dict[str, float]:
    """Nearest drawing, text match, distance of distributions and paraphrases."""
    network = load_network()
    images, labels = pictures(corpus)
    real = features(images, network=network)
    train = [d.label for d in corpus.drawings if d.split == "train"]
    wanted = [train[int(i * len(train) / 100)] for i in range(100)]
    drawn = features(draw(pipe, wanted, seed), network=network)
    grids = tuple((n, n) for n in (1, 2, 4, 6, 8, 12, 16))
    originals = images[[labels.index(label) for label in wanted]]
    again = features(rebuilt(autoencoder_of(pipe), originals, grids), network=network)
    texts = TextEncoder.from_folder(find_folder(Origin(name_or_path=model))).pooled(labels).numpy()
    heads, targets = TextMatch.bundled(), np.array([labels.index(label) for label in wanted])
    lines = (HERE / "paraphrases.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [(line.split("\t")[0], line.split("\t")[1]) for line in lines]
    trained = {caption.lower() for d in corpus.drawings for caption in all_captions(d) + framed_captions(d)}
    pairs = [(text, label) for text, label in pairs if text.lower() not in trained]
    reworded = features(draw(pipe, [text for text, _ in pairs], seed), network=network)
    return {
        "nearest_drawing": share(nearest(drawn, real), labels, wanted),
        "nearest_drawing_reconstructions": share(nearest(again, real), labels, wanted),
        "nearest_drawing_paraphrases": share(nearest(reworded, real), labels, [label for _, label in pairs]),
        "text_match_drawn": heads.r_at_1(drawn, texts, targets),
        "text_match_real": heads.r_at_1(real[targets], texts, targets),
        "kid": kid(drawn, real),
    }


def main() -> None:
    """Prints the figures as JSON and writes the sheets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    corpus = load_corpus(given.corpus)
    pipe = Pipeline.from_pretrained(given.model)
    pipe.set_progress_bar_config(disable=True)
    given.out.mkdir(parents=True, exist_ok=True)
    forty = (HERE / "forty.txt").read_text(encoding="utf-8").splitlines()
    sheet = torch.from_numpy(draw(pipe, forty, given.seed)).permute(0, 3, 1, 2).float() / 127.5 - 1
    save_sheet(torch.nn.functional.avg_pool2d(sheet, 2), 8, given.out / "forty.png")
    figures = tokenizer_figures(pipe, corpus) | model_figures(pipe, corpus, given.model, given.seed)
    print(json.dumps(figures, indent=1))
    (given.out / "model.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
