"""Position tagger: marks the tokens of a prompt with the position and size that the prompt gives their objects.

MiniLM knows which side "a cat to the left of a dog" gives the dog, but hardly says so in the features of "dog": a model
of images that reads them paints a mixture of both things on both sides. The tagger reads an earlier block and adds
one direction of the features for above and below, one for left and right and one for small and big. The features of a
prompt without positions and sizes stay bit for bit the same.

Axes: `B` rows, `T` text tokens, `E` text width, `F` width of the tagger, `A` the axes y, x and size.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.conditioning.bert import BertBlock, require_sizes
from foveate.core.atomic import replace_file
from foveate.core.errors import CheckpointError
from foveate.core.layers import Linear, empty_module

PLACES_NAME = "text_places.safetensors"

NUM_AXES = 3
"""Up and down, left and right, size."""
CLASSES = 3
"""Above, left or small; no word of it; below, right or big."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacesConfig:
    """The sizes of the tagger.

    Attributes:
        text_width: Width E of the encoder.
        tap: After how many blocks of the encoder it reads; later ones forget who is where.
        width: Its own width F, a multiple of `num_heads`.
        num_heads: Attention heads.
        num_blocks: Transformer blocks.
    """

    text_width: int = 384
    tap: int = 2
    width: int = 128
    num_heads: int = 4
    num_blocks: int = 2

    def __post_init__(self) -> None:
        require_sizes(asdict(self))


class Places(nn.Module):
    """Position tagger: reads positions from the features of a middle block and adds them to those of the last.

    Attributes:
        config: The sizes it was built with.
        direction_AE: What a token gets for "below", "right" and "big"; its negative for "above", "left" and "small".
    """

    def __init__(self, config: PlacesConfig) -> None:
        super().__init__()
        self.config = config
        self.inward = Linear(config.text_width, config.width)
        self.blocks = nn.ModuleList(
            BertBlock(config.width, config.num_heads, 2 * config.width) for _ in range(config.num_blocks)
        )
        self.outward = Linear(config.width, NUM_AXES * CLASSES)
        self.direction_AE = nn.Parameter(torch.zeros(NUM_AXES, config.text_width))

    def fits(self, text_width: int, num_blocks: int) -> bool:
        """Whether it can read an encoder of this width and number of blocks."""
        return self.config.text_width == text_width and self.config.tap <= num_blocks

    def logits(self, middle_BTE: Float[Tensor, "B T E"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T A 3"]:
        """Scores the three classes of every token along each axis.

        Args:
            middle_BTE: Features behind block `config.tap` of the encoder.
            mask_BT: True at real tokens; at least one in each row.
        """
        x_BTF = self.inward(middle_BTE)
        for block in self.blocks:
            x_BTF = block(x_BTF, mask_BT)
        scores_BTAc: Tensor = self.outward(x_BTF).unflatten(-1, (NUM_AXES, CLASSES))
        return scores_BTAc

    def marked(
        self, x_BTE: Float[Tensor, "B T E"], states: Sequence[Tensor], mask_BT: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T E"]:
        """Token features with positions and sizes added.

        Args:
            x_BTE: The features, which are returned as they are where neither is given.
            states: What the encoder computed in front of its first block and behind each, shape (B, T, E).
            mask_BT: As `logits` takes it.
        """
        place_BTA = self.logits(states[self.config.tap], mask_BT).argmax(-1) - 1
        marked_BTE = x_BTE + place_BTA.to(x_BTE.dtype) @ self.direction_AE
        return torch.where(place_BTA.any(-1, keepdim=True), marked_BTE, x_BTE)

    def save(self, path: Path) -> None:
        """Writes `text_places.safetensors` into a folder, float16; a file of this name is replaced."""
        weights = {name: w.detach().cpu().half().contiguous() for name, w in self.state_dict().items()}
        with replace_file(path / PLACES_NAME) as partial:
            save_file(weights, partial, metadata={"config": json.dumps(asdict(self.config))})

    @classmethod
    def from_folder(cls, path: Path) -> "Places | None":
        """Reads what `save` wrote, in float32 on the CPU; None if there is no such file.

        Raises:
            CheckpointError: If the file is damaged, or its weights do not fit its configuration.
        """
        file = path / PLACES_NAME
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                metadata: Mapping[str, str] = opened.metadata() or {}
            weights = {name: w.float() for name, w in load_file(file).items()}
            config = PlacesConfig(**json.loads(metadata["config"]))
            places = empty_module(partial(cls, config), torch.float32, torch.device("cpu"))
            places.load_state_dict(weights)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{file}: not a readable position tagger, fetch it again ({reason})") from error
        return places
