"""What a record of a family says: its networks, its text, its guidance, its sizes and its published models.

A record is a `Family` in a file of its own, listed in `families.registry`. Everything else asks the record, so that
nothing outside a family's own files knows which families there are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate.conditioning.text import Conditioner
from foveate.core.guidance import GuidanceSchedule
from foveate.core.protocols import Refiner, ScaleTokenizer
from foveate.weights.stored import State

if TYPE_CHECKING:
    from foveate.families.spec import Published


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """One of the two networks of a family: its configuration, the module, and how published weights become it.

    Attributes:
        kind: Its weight kind (`weights.key_map.WeightKind`).
        config: The configuration's class.
        build: Makes the module of a configuration.
        load: Fills the module with published weights.
        infer: Reads the configuration off weights, and off the facts of a config.json beside them.
        plain: Published weights under the module's own names.
        unseen: Facts that leave no trace in weights and change none, with a value to check weights with.
    """

    kind: str
    config: type
    build: Callable[[Any], Any]
    load: Callable[[Any, State], None]
    infer: Callable[[State, Mapping[str, Any]], Any]
    plain: Callable[[State], State]
    unseen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderFiles:
    """Where text encoders are read from, and how.

    `places` are folders or hub repositories; `config` is the transformer's configuration.
    """

    model: str
    config: Any
    places: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    local_files_only: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditioning:
    """What makes conditions of prompts.

    Attributes:
        name: As `config.json` holds it.
        parameters: Of its text encoders, word embeddings included.
        float32_parameters: Those of them that stay in float32 beside float16.
        read: Reads it from published files; None where its weights lie in the model's own folder, in float32.
        has_places: Whether it has a position tagger.
        names_classes: Whether prompts name classes, by an index too.
    """

    name: str
    parameters: int = 0
    float32_parameters: int = 0
    read: Callable[[TextEncoderFiles], Conditioner] | None = None
    has_places: bool = False
    names_classes: bool = False

    @property
    def is_own(self) -> bool:
        """Whether its weights lie in the model's own folder."""
        return self.read is None

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Of the weights of its text encoders in a model that computes in this dtype."""
        if self.is_own:
            return self.parameters * 4
        wide = self.float32_parameters if dtype is torch.float16 else 0
        return (self.parameters - wide) * dtype.itemsize + wide * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TextShape:
    """What a transformer reads of a prompt: tokens at most, and their width; nothing by default."""

    tokens: int = 0
    width: int = 0


def _no_text(_config: object) -> TextShape:
    return TextShape()


def _no_modules(_autoencoder: nn.Module) -> tuple[nn.Module, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Family:
    """What the models of a family share. Configurations and modules are those of its two networks.

    Attributes:
        name: As `config.json` holds it.
        transformer: The transformer.
        autoencoder: The network of the tokenizer.
        tokenizer: Makes the tokenizer from its network and the latents along a side of a token.
        refiner: Makes the step between sampling and commit from transformer and tokenizer; None where there is none.
        symbols: What a token of either network holds, in words that agree where the two belong together.
        guidance: Weights from the published `cfg` of every scale, and the window in which guidance acts.
        conditionings: What can make its conditions.
        random_conditioner: Stands in for it beside random weights; made from the transformer's configuration.
        sizes: Fields of the spec that follow from both configurations, for a model that nobody has published.
        published: The published models, the one whose defaults fine-tunes take first.
        shape: The transformer's configuration without what leaves no trace in images.
        text: What the transformer reads of a prompt.
        has_negatives: Whether a negative prompt can replace the unconditional branch.
        is_fixed_size: Whether a model generates one size alone, its own grids, and no template of the published ratios.
        can_smooth: Whether the published sampler offers `more_smooth`.
        smooths_after_draw: Whether smoothing follows a draw of ids and their filters (`engine.sample.SmoothSampler`).
        holds_last: Whether smoothing is as sharp at the last scale as at the one before it.
        null_prompt: The prompt that stands for none, where the model has learned no other; None if it has.
        codebook: The modules of the autoencoder that every scale reads, not only the decoder at the end.
        other_autoencoders: Published file names, without their ending, of autoencoders that no entry uses.
        autoencoder_aliases: Other names of published autoencoders, to the one of the hub; without endings.
        adapter: Import path of the adapter of the official class, `module:class`; None if there is none.
    """

    name: str
    transformer: Network
    autoencoder: Network
    tokenizer: Callable[[Any, int], ScaleTokenizer]
    symbols: Callable[[Any, Any, int], tuple[str, str]]
    guidance: Callable[[tuple[float, ...], tuple[int, int | None]], GuidanceSchedule]
    conditionings: tuple[Conditioning, ...]
    random_conditioner: Callable[[Any, torch.device], Conditioner]
    sizes: Callable[[Any, Any], Mapping[str, Any]]
    published: Callable[[], "tuple[Published, ...]"]
    shape: Callable[[Any], Any]
    refiner: Callable[[Any, Any], Refiner] | None = None
    text: Callable[[Any], TextShape] = _no_text
    has_negatives: bool = True
    is_fixed_size: bool = True
    can_smooth: bool = True
    smooths_after_draw: bool = False
    holds_last: bool = False
    null_prompt: str | None = None
    codebook: Callable[[Any], tuple[nn.Module, ...]] = _no_modules
    other_autoencoders: tuple[str, ...] = ()
    autoencoder_aliases: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None

    @property
    def title(self) -> str:
        """Its name in messages."""
        return self.transformer.kind
