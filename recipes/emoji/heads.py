"""Text match ("emoji-CLIP"): whether an image shows what its caption says, by two linear heads on frozen features.

1280 -> 256 on EfficientNet-lite0 features and 384 -> 256 on MiniLM sentence embeddings, trained with the contrastive
loss of CLIP on real art only, so no generated image ever influenced it.

Axes: n images, t texts, F image features, E text width, J joint width.

Source: CLIP, https://arxiv.org/abs/2103.00020.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from foveate.core.atomic import replace_file
from foveate.core.errors import FoveateError
from recipes.emoji.quality import unit_rows

DATA = Path(__file__).parent / "data"
TEXT_MATCH_FORMAT = "foveate-text-match-1"
JOINT_WIDTH = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextMatch:
    """Two linear heads that bring features of images and of texts into one space.

    Attributes:
        image_weight: Applied to EfficientNet-lite0 features.
        image_bias: Added behind it.
        text_weight: Applied to MiniLM sentence embeddings (masked mean, unit length).
        text_bias: Added behind it.
    """

    image_weight: Float32[np.ndarray, "J F"]
    image_bias: Float32[np.ndarray, " J"]
    text_weight: Float32[np.ndarray, "J E"]
    text_bias: Float32[np.ndarray, " J"]

    def __post_init__(self) -> None:
        shapes = [array.shape for array in (self.image_weight, self.image_bias, self.text_weight, self.text_bias)]
        if [len(shape) for shape in shapes] != [2, 1, 2, 1] or len({shape[0] for shape in shapes}) != 1:
            raise FoveateError(f"text match needs two heads of one output width, got the shapes {shapes}")

    @classmethod
    def load(cls, path: str | Path) -> "TextMatch":
        """Reads heads that `save` wrote.

        Args:
            path: A safetensors file.

        Returns:
            The heads in float32.

        Raises:
            FoveateError: If the file is missing, is not a safetensors file, or holds something else.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FoveateError(f"cannot read text-match heads from {path}: {error}") from error
        if sorted(tensors) != sorted(cls.__slots__):
            raise FoveateError(
                f"{path} does not hold text-match heads: expected {sorted(cls.__slots__)}, got {sorted(tensors)}"
            )
        return cls(**{name: tensor.astype(np.float32) for name, tensor in tensors.items()})

    @classmethod
    def bundled(cls) -> "TextMatch":
        """Returns the heads that come with this recipe, trained on five styles of real emoji art."""
        return cls.load(DATA / "text_match.safetensors")

    def save(self, path: str | Path) -> None:
        """Writes the heads as float16 safetensors (about 0.85 MB).

        Args:
            path: File to write; an existing one is replaced, missing folders are made.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(getattr(self, name), dtype=np.float16) for name in self.__slots__}
        with replace_file(path) as partial:
            save_file(tensors, partial, metadata={"format": TEXT_MATCH_FORMAT})

    def similarity(
        self,
        image_features: Float[np.ndarray, "n F"],
        text_features: Float[np.ndarray, "t E"],
    ) -> Float[np.ndarray, "n t"]:
        """Cosine of every image with every text in the joint space.

        Args:
            image_features: EfficientNet-lite0 features.
            text_features: MiniLM sentence embeddings.

        Returns:
            Values in [-1, 1].
        """
        images = unit_rows(image_features @ self.image_weight.T + self.image_bias)
        texts = unit_rows(text_features @ self.text_weight.T + self.text_bias)
        return np.asarray(images @ texts.T)

    def r_at_1(
        self,
        image_features: Float[np.ndarray, "n F"],
        text_features: Float[np.ndarray, "t E"],
        targets: Int[np.ndarray, " n"] | None = None,
    ) -> float:
        """Share of the images whose own text is nearer than every other text (t-way retrieval; chance is 1/t).

        A tie with another text counts as a miss, so heads that map everything to one point score 0.

        Args:
            image_features: EfficientNet-lite0 features.
            text_features: MiniLM sentence embeddings, at least two and all different.
            targets: Index of each image's own text; if None, image i belongs to text i.

        Returns:
            A share in [0, 1].

        Raises:
            FoveateError: If there are fewer than two texts, no images, or targets that do not fit.
        """
        if targets is None:
            targets = np.arange(len(image_features))
        if len(text_features) < 2 or len(targets) == 0:
            raise FoveateError(
                f"r_at_1 needs images and two texts, got {len(targets)} images and {len(text_features)} texts"
            )
        if len(targets) != len(image_features) or targets.min() < 0 or targets.max() >= len(text_features):
            raise FoveateError(
                f"each image needs one of {len(text_features)} texts, got {len(image_features)} images and "
                f"{len(targets)} targets from {targets.min()} to {targets.max()}"
            )
        scores = self.similarity(image_features, text_features)
        rows = np.arange(len(scores))
        own = scores[rows, targets].copy()
        scores[rows, targets] = -np.inf
        return float((own > scores.max(axis=1)).mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class TextMatchTraining:
    """Settings of `train_text_match`.

    Attributes:
        num_steps: Optimiser steps.
        batch_size: Concepts in a batch; one image and one text of each.
        learning_rate: Peak of a one-cycle cosine schedule.
        weight_decay: Decoupled decay of the two weight matrices.
        feature_dropout: Share of input features that are dropped, [0, 1).
        temperature: Divides the cosines, in (0, 1].
        seed: Of everything random.
    """

    num_steps: int = 1500
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 1.0
    feature_dropout: float = 0.2
    temperature: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 2:
            raise FoveateError(
                f"training needs num_steps >= 1 and batch_size >= 2, got {self.num_steps} and {self.batch_size}"
            )
        if not 0 <= self.feature_dropout < 1:
            raise FoveateError(f"feature_dropout must be in [0, 1), got {self.feature_dropout}")
        if not 0 < self.temperature <= 1:
            raise FoveateError(f"temperature must be in (0, 1], got {self.temperature}")


def train_text_match(
    image_features: Float[np.ndarray, "n F"],
    text_features: Float[np.ndarray, "t E"],
    concept_ids: Int[np.ndarray, " n"],
    *,
    text_concept_ids: Int[np.ndarray, " t"] | None = None,
    settings: TextMatchTraining | None = None,
) -> TextMatch:
    """Trains the two heads with the symmetric contrastive loss, on the CPU in float32.

    A batch holds each concept once, with one of its images and one of its texts drawn at random, so nothing in it is a
    false negative.

    Args:
        image_features: EfficientNet-lite0 features of real art.
        text_features: MiniLM sentence embeddings.
        concept_ids: Concept of each image.
        text_concept_ids: Concept of each text, so that a concept can have several; if None, row i is the text of
            concept i.
        settings: How to train; the defaults if None.

    Returns:
        The heads, with the standardisation of the inputs folded in.

    Raises:
        FoveateError: If the ids do not pair up with the rows, or fewer than two concepts have both an image and a text.
    """
    settings = TextMatchTraining() if settings is None else settings
    if text_concept_ids is None:
        text_concept_ids = np.arange(len(text_features))
    if len(concept_ids) != len(image_features) or len(text_concept_ids) != len(text_features):
        raise FoveateError(
            f"each row needs one concept, got {len(image_features)} images with {len(concept_ids)} "
            f"and {len(text_features)} texts with {len(text_concept_ids)}"
        )
    images_of, texts_of = _rows_by_concept(concept_ids), _rows_by_concept(text_concept_ids)
    concepts = sorted(set(images_of) & set(texts_of))
    if len(concepts) < 2:
        raise FoveateError(f"text match needs two concepts with an image and a text each, got {len(concepts)}")

    rng = np.random.default_rng(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    image_head = _Head.fitted(image_features, generator)
    text_head = _Head.fitted(text_features, generator)
    parameters = [image_head.weight, image_head.bias, text_head.weight, text_head.bias]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.num_steps)
    for _ in range(settings.num_steps):
        chosen = rng.permutation(concepts)[: settings.batch_size]
        image_rows = [rng.choice(images_of[int(concept)]) for concept in chosen]
        text_rows = [rng.choice(texts_of[int(concept)]) for concept in chosen]
        joint_images = image_head.project(image_features[image_rows], settings.feature_dropout, generator)
        joint_texts = text_head.project(text_features[text_rows], settings.feature_dropout, generator)
        logits = joint_images @ joint_texts.T / settings.temperature
        own = torch.arange(len(chosen))
        loss = cross_entropy(logits, own) + cross_entropy(logits.T, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    image_weight, image_bias = image_head.folded()
    text_weight, text_bias = text_head.folded()
    return TextMatch(image_weight=image_weight, image_bias=image_bias, text_weight=text_weight, text_bias=text_bias)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Head:
    """One head while it is trained, with the standardisation of its input apart."""

    mean: Float32[Tensor, " F"]
    scale: Float32[Tensor, " F"]
    weight: Float32[Tensor, "J F"]
    bias: Float32[Tensor, " J"]

    @classmethod
    def fitted(cls, rows: Float[np.ndarray, "n F"], generator: torch.Generator) -> "_Head":
        values = torch.from_numpy(np.asarray(rows, dtype=np.float32))
        width = values.shape[1]
        weight = torch.randn(JOINT_WIDTH, width, generator=generator) * width**-0.5
        return cls(
            mean=values.mean(dim=0),
            scale=1 / values.std(dim=0, correction=0).clamp(min=1e-3),
            weight=weight.requires_grad_(),
            bias=torch.zeros(JOINT_WIDTH, requires_grad=True),
        )

    def project(
        self, rows: Float[np.ndarray, "b F"], feature_dropout: float, generator: torch.Generator
    ) -> Float32[Tensor, "b J"]:
        values = (torch.from_numpy(np.asarray(rows, dtype=np.float32)) - self.mean) * self.scale
        is_kept = torch.rand(values.shape, generator=generator) >= feature_dropout
        return normalize((values * is_kept / (1 - feature_dropout)) @ self.weight.T + self.bias, dim=1)

    def folded(self) -> tuple[Float32[np.ndarray, "J F"], Float32[np.ndarray, " J"]]:
        weight = (self.weight * self.scale).detach()
        bias = self.bias.detach() - weight @ self.mean
        return weight.numpy(), bias.numpy()


def _rows_by_concept(concept_ids: Int[np.ndarray, " n"]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, concept in enumerate(concept_ids):
        rows.setdefault(int(concept), []).append(row)
    return rows
