"""Position binding of a text-to-image model: loss under false captions, and generated images.

    python -m recipes.emoji.binding --corpus RUN/corpus

Images of two things are encoded, and the true bits of every scale are read back under three captions: the true one,
the same with "left" and "right" (or "above" and "below") exchanged, and that of another image of the kind, nearly
always on the same background. A model that binds things to places loses more under the exchanged caption; one that only
knows which things there are does not notice. The first row is the loss per bit in nats, the others are what a false
caption adds. Below stands how many images, generated from the true captions, lie nearer to the scene than to the same
scene with its two things exchanged, pixel by pixel: half of them by chance.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foveate.models.infinity import Infinity
from foveate.pipeline.pipeline import Pipeline
from foveate.tokenizers.bsq import BSQTokenizer, quantise
from recipes.emoji.contrast import rim_contrast
from recipes.emoji.corpus import Corpus, load_corpus
from recipes.emoji.scenes import Kind, Scene, SceneConfig, draw_scene, render
from recipes.emoji.teacher import Teacher, pad_texts
from recipes.emoji.transformer import bit_loss

EXCHANGED: dict[Kind, tuple[str, str]] = {
    "beside": ("to the left of", "to the right of"),
    "stacked": ("above", "below"),
}
BATCH = 32


def exchanged(caption: str, words: tuple[str, str]) -> str:
    """The caption with one word of a pair in the place of the other; unchanged if it holds neither."""
    one, other = words
    return caption.replace(one, other) if one in caption else caption.replace(other, one)


def loss_per_scale(
    teacher: Teacher, texts: Sequence[Tensor], latents_BZHW: Tensor, grids: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Mean loss per bit of each scale in nats, shape (scales,)."""
    total, length = np.zeros(len(grids)), max(text.shape[0] for text in texts)
    for first in range(0, len(texts), BATCH):
        part = slice(first, first + BATCH)
        own = latents_BZHW[part]
        quantised = quantise(own, grids)
        logits = teacher.logits(pad_texts(texts[part], length), quantised.inputs)
        total += bit_loss(logits, quantised, 0.5)[1].numpy() * len(own)
    return total / len(texts)


def scenes_of(kind: Kind, words: tuple[str, str], count: int, seed: int, corpus: Corpus) -> list[Scene]:
    """Scenes of two things whose captions say which is where, in order of their backgrounds."""
    found: list[Scene] = []
    drawings, contrast_NK = corpus.split("train"), rim_contrast(corpus.images_NYXc)
    number = 0
    while len(found) < count:
        rng = np.random.default_rng([seed, number])
        scene = draw_scene(drawings, rng, SceneConfig(), kind=kind, contrast_NK=contrast_NK)
        number += 1
        if any(word in scene.caption for word in words):
            found.append(scene)
    return sorted(found, key=lambda scene: scene.background)


def turned(scene: Scene) -> Scene:
    """The scene with its two drawings exchanged; places and sizes stay."""
    one, other = scene.things
    return replace(scene, things=(replace(one, drawing=other.drawing), replace(other, drawing=one.drawing)))


def draw(pipe: Pipeline, scenes: Sequence[Scene], seed: int) -> Tensor:
    """Images of the captions in [0, 1], shape (scenes, 3, height, width)."""
    images = pipe([scene.caption for scene in scenes], seed=seed, output_type="pt").images
    assert isinstance(images, Tensor)
    return images


def in_order(drawn_BcYX: Tensor, scenes: Sequence[Scene], images_NYXc: Tensor) -> int:
    """How many images in [0, 1] lie nearer to their scene than to the turned one, by mean squared error."""
    size = (drawn_BcYX.shape[-2], drawn_BcYX.shape[-1])
    true_B, false_B = (
        (render(given, images_NYXc, size).add(1).div(2) - drawn_BcYX).square().mean((1, 2, 3))
        for given in (scenes, [turned(scene) for scene in scenes])
    )
    return int((true_B < false_B).sum())


@torch.no_grad()
def main() -> None:
    """Prints one table per kind of scene."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    pipe = Pipeline.from_pretrained(given.model, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    model = pipe.model
    if not isinstance(model.transformer, Infinity) or not isinstance(model.tokenizer, BSQTokenizer):
        raise SystemExit(f"{given.model} is not of the Infinity family; take one that reads texts and bits")
    grids, corpus = model.spec.default_schedule.grids, load_corpus(given.corpus)
    teacher = Teacher(
        model=model.transformer, schedule=model.spec.default_schedule, masked_tokens=121, dtype=torch.float32
    )
    images_NYXc, side = torch.from_numpy(corpus.images_NYXc), corpus.images_NYXc.shape[1]
    for kind, words in EXCHANGED.items():
        scenes = scenes_of(kind, words, given.scenes, given.seed, corpus)
        captions = [scene.caption for scene in scenes]
        batches = [scenes[first : first + BATCH] for first in range(0, len(scenes), BATCH)]
        pixels = (render(batch, images_NYXc, (side, side)) for batch in batches)
        latents_BZHW = torch.cat([model.tokenizer.autoencoder.encode(part) for part in pixels])

        def loss(texts: list[str], latents_BZHW: Tensor = latents_BZHW) -> np.ndarray:
            features = [condition for condition in model.text.encode(texts) if isinstance(condition, Tensor)]
            return loss_per_scale(teacher, features, latents_BZHW, grids)

        true = loss(captions)
        false = {
            f'"{words[0]}" and "{words[1]}" exchanged': [exchanged(caption, words) for caption in captions],
            "caption of the next scene": [*captions[1:], captions[0]],
        }
        print(f"\n| {kind}, {len(scenes)} scenes | " + " | ".join(f"{h}x{w}" for h, w in grids) + " |")
        print("|---|" + "---|" * len(grids))
        print("| loss per bit | " + " | ".join(f"{x:.4f}" for x in true) + " |")
        for name, own in false.items():
            print(f"| {name} | " + " | ".join(f"{x:+.4f}" for x in loss(own) - true) + " |", flush=True)
        right = sum(in_order(draw(pipe, part, given.seed), part, images_NYXc) for part in batches)
        print(f"\nin order as generated: {right / len(scenes):.0%} of {len(scenes)}", flush=True)


if __name__ == "__main__":
    main()
