"""A transformer that begins with the weights of a shallower one, with fewer scales.

The blocks of the shallower one are spread over the depth, in order. Each block between is a copy of the one before it
whose outputs are zero: at first it adds nothing, so the deeper model draws what the shallower one drew, and it learns
from there. The embeddings of scales that the shallower one never had begin as that of its last scale.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.models.infinity import Infinity, InfinityConfig

_OUTPUTS = ("sa.proj", "ca.proj", "ffn.fc2")


def grown(
    weights: Mapping[str, Tensor], shape: InfinityConfig, target: InfinityConfig, scales: int
) -> dict[str, Tensor]:
    """Weights of the deeper model.

    Args:
        weights: Those of the shallower one; they are left as they are.
        shape: Of the shallower one.
        target: Of the deeper one; all but the depth must be equal.
        scales: Number of scales that the shallower one was trained on.

    Raises:
        FoveateError: The shapes differ in more than depth, or the target is shallower.
    """
    if replace(shape, depth=target.depth, chunks=target.chunks) != target or shape.depth > target.depth:
        raise FoveateError(f"a model grows in depth only: the recipe has {target}, the model to start from {shape}")
    model, given = Infinity(target), Infinity(shape)
    given.load_state_dict(dict(weights))
    state = {name: value for name, value in given.state_dict().items() if not name.startswith("block_chunks.")}
    model.load_state_dict(state, strict=False)
    source_of = [index * shape.depth // target.depth for index in range(target.depth)]
    with torch.no_grad():
        for index, source in enumerate(source_of):
            block = model.block(index)
            block.load_state_dict(given.block(source).state_dict())
            if index and source == source_of[index - 1]:
                for name in _OUTPUTS:
                    for parameter in block.get_submodule(name).parameters():
                        parameter.zero_()
        levels = model.lvl_embed.weight
        levels[scales:] = levels[scales - 1]
    return model.state_dict()
