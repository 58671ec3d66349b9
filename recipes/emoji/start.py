"""What a training run begins with: nothing, a model of the same shape, or a smaller one that it grows from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.families.spec import ModelSpec
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.weights.folder import AUTOENCODER, TRANSFORMER, read_config, read_network
from foveate.weights.infinity import load_autoencoder, load_transformer
from foveate.weights.stored import State
from recipes.emoji.growth import grown
from recipes.emoji.shared_codes import SharedCodes, fit_codes
from recipes.emoji.tokenizer import TokenizerRecipe

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a run begins with, before its first checkpoint; nothing means from random weights.

    Attributes:
        model: Folder of a model, for example the bundled one: both networks are trained further. Its transformer may
            be shallower, see `growth`. A tokenizer of another shape gives the first scales their codes, see
            `shared_codes`.
        tokenizer: Weights of a tokenizer alone, which go before those of `model`.
    """

    model: Path | None = None
    tokenizer: Path | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the tokenizer begins with weights."""
        return self.model is not None or self.tokenizer is not None

    @property
    def spec(self) -> ModelSpec | None:
        """What `model` is.

        Raises:
            FoveateError: It is not of the family that is trained here.
        """
        if self.model is None:
            return None
        spec = ModelSpec.from_json(read_config(self.model))
        if not isinstance(spec.transformer, InfinityConfig):
            raise FoveateError(f"a model to start from must be of the family infinity, {self.model} is {spec.family}")
        return spec

    def older_codes(self, recipe: TokenizerRecipe) -> SharedCodes | None:
        """What the tokenizer's first scales are held to; nothing where `model` has a tokenizer of the same shape.

        Raises:
            FoveateError: Its scales are not the first ones of the recipe.
        """
        spec = self.spec
        if spec is None or self.model is None or spec.autoencoder == recipe.shape:
            return None
        grids = spec.default_schedule.grids
        if recipe.grids[: len(grids)] != grids:
            raise FoveateError(
                f"the recipe's scales must begin with those of {self.model}, {grids}, got {recipe.grids}"
            )
        older = Autoencoder(spec.autoencoder).requires_grad_(False)
        older.load_state_dict(_read(self.model / AUTOENCODER, lambda: Autoencoder(spec.autoencoder), load_autoencoder))
        return SharedCodes(autoencoder=older.to(recipe.device).eval(), grid=grids[-1])

    def own_tokenizer(self, recipe: TokenizerRecipe, codes: SharedCodes | None) -> dict[str, Tensor] | None:
        """Weights of the recipe's shape that the tokenizer begins with; None where there are none."""
        path = self.tokenizer
        if path is None and self.model is not None and codes is None:
            path = self.model / AUTOENCODER
        return None if path is None else _read(path, lambda: Autoencoder(recipe.shape), load_autoencoder)

    def transformer(self, shape: InfinityConfig) -> dict[str, Tensor] | None:
        """Weights that the transformer begins with, those of a deeper one if need be; None where there are none."""
        spec = self.spec
        if spec is None or self.model is None:
            return None
        given = spec.transformer
        weights = _read(self.model / TRANSFORMER, lambda: Infinity(given), load_transformer)
        return weights if given == shape else grown(weights, given, shape, len(spec.default_schedule))


def fitted(
    weights: dict[str, Tensor], recipe: TokenizerRecipe, codes: SharedCodes, pixels_B3YX: Float[Tensor, "B 3 Y X"]
) -> dict[str, Tensor]:
    """Weights of a tokenizer after `fit_codes`."""
    model = Autoencoder(recipe.shape).to(recipe.device)
    model.load_state_dict(weights)
    fit_codes(model, codes, pixels_B3YX, recipe.grids)
    return model.state_dict()


def _read(path: Path, build: Callable[[], M], load: Callable[[M, State], None]) -> dict[str, Tensor]:
    """In float32 on the CPU."""
    return read_network(path, build, load, torch.float32, torch.device("cpu")).state_dict()
