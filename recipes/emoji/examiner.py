"""Quality of a trained model: every figure of a model card, measured on the model, its corpus and fixed seeds.

Each figure is measured on what the model generated and, where it can be, on real art under the same check: that is its
ceiling. Axes: n images, F features, E text width, Y = X pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from foveate.conditioning.minilm import TextEncoder
from foveate.core.errors import FoveateError
from foveate.core.schedule import Grid
from foveate.pipeline.options import PerScale
from foveate.pipeline.output import to_uint8
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.tokenizers.bsq import BSQTokenizer, quantise
from recipes.emoji.captions import Drawing, all_captions, framed_captions, with_style
from recipes.emoji.composition import (
    Axis,
    Thing,
    background_of,
    crop,
    is_in_order,
    side_at,
    side_of,
    size_of,
    things_of,
)
from recipes.emoji.contrast import rim_contrast
from recipes.emoji.corpus import Corpus
from recipes.emoji.features import Judge, features, load_network
from recipes.emoji.figures import MIN_PROMPTS, Figure
from recipes.emoji.heads import TextMatch
from recipes.emoji.memorisation import COPY_DB, THUMBNAIL, copied_share, nearest_neighbours, thumbnail_psnr
from recipes.emoji.paraphrases import bundled_paraphrases, unseen
from recipes.emoji.quality import kid, nearest
from recipes.emoji.scenes import Kind, Scene, SceneConfig, draw_scene, render
from recipes.emoji.style import fit_style_probe
from recipes.emoji.texts import bundled_encoder
from recipes.emoji.tokenizer import composite
from recipes.emoji.tokens import BATCH, Images, bit_figures, spread, tokenizer_figures

NUM_WAYS = 500

JUDGES: dict[Judge, str] = {"lite0": "", "lite2": ", second judge"}
"""What the figures of each are called; `features` says why there are two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Images of one style: the model's own, real ones of the same scenes, and real ones of others."""

    own: Images
    real: Images
    others: Images


@dataclass(kw_only=True)
class Examiner:
    """Generates with a model and measures; everything follows from the seed.

    Attributes:
        pipe: The model, of the Infinity family.
        corpus: What it was trained on.
        num_prompts: Images per figure.
        seed: Of prompts and images.
        log: Receives a line before each figure.
        texts: The text encoder of the scorer.
    """

    pipe: Pipeline
    corpus: Corpus
    num_prompts: int = 200
    seed: int = 0
    log: Callable[[str], None] = lambda _: None
    texts: TextEncoder = field(default_factory=bundled_encoder)
    heads: TextMatch = field(default_factory=TextMatch.bundled)
    _networks: dict[Judge, nn.Module] = field(default_factory=dict, init=False, repr=False)
    _tokens: BSQTokenizer = field(init=False, repr=False)
    _corpus_features: dict[Judge, Float[np.ndarray, "n F"]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks what was given.

        Raises:
            FoveateError: If there are too few prompts, or the model is of another family.
        """
        if self.num_prompts < MIN_PROMPTS:
            raise FoveateError(f"--prompts must be at least {MIN_PROMPTS}, got {self.num_prompts}")
        if not isinstance(self.pipe.model.tokenizer, BSQTokenizer):
            raise FoveateError("this report is for Infinity models; this one is of another family")
        self._tokens = self.pipe.model.tokenizer

    def figures(self) -> Iterator[Figure]:
        """Measures one figure after the other."""
        parts: dict[str, Callable[[], Iterator[Figure]]] = {
            "tokenizer": partial(tokenizer_figures, self),
            "bits": partial(bit_figures, self),
            "text match": self._text,
            "paraphrases": self._reworded,
            "held-out pairs": self._pairs,
            "style": self._styles,
            "distance": self._distance,
            "composition": self._composition,
            "memorisation": self._memorisation,
        }
        for name, part in parts.items():
            self.log(name)
            yield from part()

    def draw(
        self, prompts: Sequence[str], guidance_scale: PerScale | None = None, temperature: PerScale | None = None
    ) -> Images:
        """Images of prompts, in batches; that of prompt i on has the seed `seed + i`. None is the model's default."""
        parts = [
            self.pipe(
                list(prompts[i : i + BATCH]),
                seed=self.seed + i,
                guidance_scale=guidance_scale,
                temperature=temperature,
                output_type="np",
            )
            for i in range(0, len(prompts), BATCH)
        ]
        return np.concatenate([stack_uint8(part.images) for part in parts])

    def scenes(self, kind: Kind, count: int, drawings: Sequence[Drawing] | None = None, **shares: float) -> list[Scene]:
        """Scenes of one kind, by default from the training split; they were not necessarily trained on."""
        # The first numbers of the sequence are those of training.
        rng = np.random.default_rng([self.seed, 2**31])
        config = SceneConfig(**({"style_share": self.corpus.style_share, "framed_share": 0.0} | shares))
        cast = self.train if drawings is None else drawings
        return [draw_scene(cast, rng, config, kind=kind, contrast_NK=self._contrast) for _ in range(count)]

    def real(self, scenes: Sequence[Scene]) -> Images:
        """Rendered real scenes, as the ceiling of each figure."""
        images_NYXc = torch.from_numpy(self.corpus.images_NYXc)
        side = self.corpus.images_NYXc.shape[1]
        return np.concatenate(
            [to_uint8(render(scenes[i : i + BATCH], images_NYXc, (side, side))) for i in range(0, len(scenes), BATCH)]
        )

    def prompt_of(self, drawing: Drawing) -> str:
        """Label, and style where there are several."""
        return with_style(drawing.label, drawing.style) if self._is_multi_style else drawing.label

    @property
    def train(self) -> tuple[Drawing, ...]:
        """The drawings that were trained on."""
        return self.corpus.split("train")

    @cached_property
    def _contrast(self) -> Float[np.ndarray, "N K"]:
        return rim_contrast(self.corpus.images_NYXc)

    @property
    def _real_features(self) -> Float[np.ndarray, "n F"]:
        return self._features_of_corpus("lite0")

    def _features_of_corpus(self, judge: Judge) -> Float[np.ndarray, "n F"]:
        """Features of all drawings on white, in the order of the corpus; computed once."""
        if judge not in self._corpus_features:
            parts = [self.features(self.on_white(part), judge) for part in _chunks(self.corpus.drawings, 64)]
            self._corpus_features[judge] = np.concatenate(parts)
        return self._corpus_features[judge]

    @cached_property
    def _single(self) -> tuple[list[Drawing], Images, Float[np.ndarray, "n F"]]:
        """Evenly spread drawings of the training split, what the model makes of their labels, and its features."""
        chosen = spread(self.train, self.num_prompts)
        drawn = self.draw([self.prompt_of(one) for one in chosen])
        return chosen, drawn, self.features(drawn)

    @property
    def _is_multi_style(self) -> bool:
        return len({one.style for one in self.corpus.drawings}) > 1

    def features(self, images: Images, judge: Judge = "lite0") -> Float[np.ndarray, "n F"]:
        """EfficientNet features of images; a judge is loaded when it is first asked."""
        if judge not in self._networks:
            self._networks[judge] = load_network(judge=judge)
        return features(images, network=self._networks[judge])

    def on_white(self, drawings: Sequence[Drawing]) -> Images:
        """Drawings as the corpus has them, on white."""
        rgba = np.ascontiguousarray(self.corpus.images_NYXc[[one.index for one in drawings]])
        return to_uint8(composite(rgba))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The scales of the model."""
        return self.pipe.model.spec.default_schedule.grids

    def encoded(self, images: Images) -> Float[Tensor, "n Z H W"]:
        """Continuous latents in float32, whatever the model computes in."""
        weight = self._tokens.autoencoder.encoder.conv_in.weight
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            return self._tokens.autoencoder.encode(pixels.to(weight.device, weight.dtype)).float()

    def rebuilt(self, images: Images) -> Images:
        """Reconstructions by the tokenizer."""
        parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        latents = [quantise(self.encoded(part), self.grids).f_hat_BZHW for part in parts]
        return np.concatenate([to_uint8(self._tokens.decode(latent)) for latent in latents])

    def _text(self) -> Iterator[Figure]:
        chosen, drawn, drawn_nF = self._single
        labels = list(dict.fromkeys([one.label for one in chosen] + [one.label for one in self.corpus.drawings]))
        labels = labels[: max(NUM_WAYS, len({one.label for one in chosen}))]
        texts_tE = self.texts.pooled(labels).numpy()
        targets = np.array([labels.index(one.label) for one in chosen])
        real_nF = self._real_features[[one.index for one in chosen]]
        own, best = (self.heads.r_at_1(rows, texts_tE, targets) for rows in (drawn_nF, real_nF))
        yield Figure(
            name=f"text match R@1 of {len(labels)} labels",
            value=own,
            ceiling=best,
            note=f"{len(chosen)} prompts; real art: the drawings asked for, trained on",
        )
        yield Figure(name="text match, share of real art's", value=own / best if best else None, target=0.4)
        yield from self._nearest(chosen, drawn, self.rebuilt(self.on_white(chosen)))

    def _nearest(self, chosen: Sequence[Drawing], drawn: Images, again: Images) -> Iterator[Figure]:
        """Whether the nearest drawing is the one asked for, by both judges, and by group."""
        for judge, suffix in JUDGES.items():
            real_nF = self._features_of_corpus(judge)
            hits, ceiling = (self._hits(self.features(images, judge), real_nF, chosen) for images in (drawn, again))
            yield Figure(
                name=f"nearest drawing is the right one{suffix}",
                value=float(np.mean(hits)),
                ceiling=float(np.mean(ceiling)),
                target=0.7,
                note="the ceiling is the tokenizer's own reconstructions",
            )
            for group in dict.fromkeys(one.group for one in chosen):
                own_hits = [hit for hit, one in zip(hits, chosen, strict=True) if one.group == group]
                name = f"the same, {group}{suffix}"
                yield Figure(name=name, value=float(np.mean(own_hits)), note=f"{len(own_hits)} prompts")

    def _hits(
        self, drawn_nF: Float[np.ndarray, "n F"], real_NF: Float[np.ndarray, "N F"], asked: Sequence[Any]
    ) -> list[bool]:
        found = nearest(drawn_nF, real_NF)
        return [self.corpus.drawings[i].label == one.label for i, one in zip(found, asked, strict=True)]

    def _reworded(self) -> Iterator[Figure]:
        trained = {text.lower() for one in self.train for text in all_captions(one) + framed_captions(one)}
        asked = unseen(bundled_paraphrases(), {one.label for one in self.train}, trained)
        name = "nearest drawing is the right one, paraphrases"
        if not asked:
            yield Figure(name=name, value=None, note="none of what was trained on has one")
            return
        drawn = self.draw([one.text for one in asked])
        note = f"{len(asked)} prompts in words that were never trained on"
        for judge, suffix in JUDGES.items():
            hits = self._hits(self.features(drawn, judge), self._features_of_corpus(judge), asked)
            yield Figure(name=f"{name}{suffix}", value=float(np.mean(hits)), target=0.35, note=note)

    def _pairs(self) -> Iterator[Figure]:
        known = {one.label for one in self.train}
        pairs = [one for one in self.corpus.split("test") if one.label in known]
        if not self._is_multi_style or not pairs:
            note = "the corpus has no held-out split" if self._is_multi_style else "one style: there are none"
            yield Figure(name="held-out pairs of concept and style", value=None, note=note)
            return
        asked = spread(pairs, self.num_prompts)
        labels = sorted({one.label for one in self.corpus.drawings})
        texts_tE = self.texts.pooled(labels).numpy()
        rows = np.array([labels.index(one.label) for one in asked])
        drawn_nF = self.features(self.draw([self.prompt_of(one) for one in asked]))
        yield Figure(
            name="held-out pairs of concept and style",
            value=self.heads.r_at_1(drawn_nF, texts_tE, rows),
            ceiling=self.heads.r_at_1(self._real_features[[one.index for one in asked]], texts_tE, rows),
            target=0.5,
        )

    def _styles(self) -> Iterator[Figure]:
        if not self._is_multi_style:
            yield Figure(name="style", value=None, note="one style: nothing to tell apart")
            return
        chosen, _, drawn_nF = self._single
        is_train = np.array([one.split == "train" for one in self.corpus.drawings])
        styles = np.array([one.style for one in self.corpus.drawings])
        probe = fit_style_probe(self._real_features[is_train], styles[is_train].tolist())
        ceiling = None
        if not is_train.all():
            ceiling = probe.accuracy(self._real_features[~is_train], styles[~is_train].tolist())
        value = probe.accuracy(drawn_nF, [one.style for one in chosen])
        yield Figure(name="style", value=value, ceiling=ceiling, target=0.9)

    def _distance(self) -> Iterator[Figure]:
        for style in dict.fromkeys(one.style for one in self.train):
            seen, held_out = ([d for d in self.corpus.split(part) if d.style == style] for part in ("train", "test"))
            scenes = self.scenes("single", 2 * self.num_prompts, seen)
            asked, others = scenes[: self.num_prompts], scenes[self.num_prompts :]
            # Too few drawings would be held against themselves again and again.
            is_held_out = len(held_out) >= MIN_PROMPTS
            if is_held_out:
                others = self.scenes("single", self.num_prompts, held_out)
            note = f"to composites of drawings {'held out' if is_held_out else 'trained on, as none are held out'}"
            images = Compared(
                own=self.draw([scene.caption for scene in asked]), real=self.real(asked), others=self.real(others)
            )
            for judge, suffix in JUDGES.items():
                yield from self._kid(images, judge, f"{style}{suffix}", note)

    def _kid(self, images: Compared, judge: Judge, where: str, note: str) -> Iterator[Figure]:
        own_nF, real_nF, again_nF, other_nF = (
            self.features(part, judge) for part in (images.own, images.real, self.rebuilt(images.real), images.others)
        )
        best = 1000 * kid(real_nF, other_nF)
        for rows_nF, name, target, remark in (
            (own_nF, where, 55.0, note),
            (again_nF, f"{where}, reconstructions", 35.0, "what the tokenizer alone costs"),
        ):
            yield Figure(
                name=f"KID x 1000, {name}",
                value=1000 * kid(rows_nF, other_nF),
                ceiling=best,
                # Distances of another network are another scale: the targets are those of the first judge.
                target=target if judge == "lite0" else None,
                is_share=False,
                lower_is_better=True,
                note=remark,
            )

    def _composition(self) -> Iterator[Figure]:
        scenes = self.scenes("single", self.num_prompts, white_share=0.08)
        asked = [scene.background for scene in scenes]
        yield self._checked("background colour", scenes, asked, [background_of] * len(scenes), 1.0)
        scenes = self.scenes("count", self.num_prompts)
        numbers = [len(scene.things) for scene in scenes]
        counts = [lambda image: len(things_of(image))] * len(scenes)
        yield self._checked("number of things", scenes, numbers, counts, 0.95)
        kinds: tuple[Kind, Kind] = ("beside", "stacked")
        for kind in kinds:
            scenes = [scene for scene in self.scenes(kind, 2 * self.num_prompts) if "next to" not in scene.caption]
            scenes = scenes[: self.num_prompts]
            name = {"beside": "left and right", "stacked": "above and below"}[kind]
            checks = [self._order_of(scene) for scene in scenes]
            yield self._checked(f"relation of two things, {name}", scenes, [True] * len(scenes), checks, 0.7)
        scenes = [scene for scene in self.scenes("sized", 4 * self.num_prompts) if len(scene.things) == 1]
        scenes = scenes[: self.num_prompts]
        sizes = ["big" if scene.things[0].size > 0.5 else "small" for scene in scenes]
        yield self._checked("one big or small thing", scenes, sizes, [size_of] * len(scenes), 0.9)
        scenes = self.scenes("single", self.num_prompts, centred_share=0.0, placed_share=1.0)
        scenes = [scene for scene in scenes if f"the {side_at(scene.things[0].centre)}" in scene.caption]
        sides = [side_at(scene.things[0].centre) for scene in scenes]
        yield self._checked("one thing at a side", scenes, sides, [side_of] * len(scenes), 0.92)

    def _checked(
        self,
        name: str,
        scenes: Sequence[Scene],
        asked: Sequence[Any],
        checks: Sequence[Callable[[UInt8[np.ndarray, "Y X 3"]], Any]],
        target: float | None = None,
    ) -> Figure:
        def share(images: Images) -> float:
            found = [check(image) for check, image in zip(checks, images, strict=True)]
            return float(np.mean([a == b for a, b in zip(found, asked, strict=True)]))

        drawn = self.draw([scene.caption for scene in scenes])
        return Figure(name=name, value=share(drawn), ceiling=share(self.real(scenes)), target=target)

    def _order_of(self, scene: Scene) -> Callable[[UInt8[np.ndarray, "Y X 3"]], bool]:
        """A check of whether the scene's first thing lies before its second."""
        by_index = {one.index: one.label for one in self.train}
        names = [by_index[thing.drawing] for thing in scene.things]
        axis: Axis = "x" if scene.kind == "beside" else "y"

        def check(image: UInt8[np.ndarray, "Y X 3"]) -> bool:
            found = things_of(image)[:2]
            if len(found) < 2:
                return False
            pair: tuple[Thing, Thing] = (found[0], found[1])
            crops_nF = np.concatenate([self.features(crop(image, one)[None]) for one in pair])
            similarity_22 = self.heads.similarity(crops_nF, self.texts.pooled(names).numpy())
            return is_in_order(pair, similarity_22, axis)

        return check

    def _memorisation(self) -> Iterator[Figure]:
        chosen, drawn, drawn_nF = self._single
        train = self.train
        real_nF = self._real_features[[one.index for one in train]]
        own_n = np.array([train.index(one) for one in chosen])
        ours, art = nearest_neighbours(drawn_nF, real_nF), nearest_neighbours(real_nF[own_n], real_nF, own_n)
        ours_n, art_n = (
            thumbnail_psnr(images, self.on_white([train[i] for i in found.index]))
            for images, found in ((drawn, ours), (self.on_white(chosen), art))
        )
        yield Figure(
            name="nearest training drawing, cosine of features",
            value=float(np.median(ours.cosine)),
            ceiling=float(np.median(art.cosine)),
            is_share=False,
            note=f"median; {np.quantile(ours.cosine, 0.9):.3f} for the nearest tenth; real art: its nearest other",
        )
        yield Figure(
            name=f"the same drawing, PSNR dB at {THUMBNAIL} px",
            value=float(np.median(ours_n)),
            ceiling=float(np.median(art_n)),
            is_share=False,
            note=f"median; {np.quantile(ours_n, 0.9):.1f} for the nearest tenth",
        )
        yield Figure(
            name="copies of a training drawing",
            value=copied_share(ours_n),
            ceiling=copied_share(art_n),
            note=f"from {COPY_DB:g} dB on: an error of a tenth of the range",
        )


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
