"""A probe of linear layers: whether a row of a matmul has the same bits alone and in a batch.

An image in a batch is packed with the tokens of others, so it is the same as alone only if every matmul computes each
row by itself. Whether it does depends on the library, the processor, the threads and the shape: no guarantee.
Axes: n rows, i inputs, o outputs.
"""

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foveate.kernels.linear import linear, takes_onednn

COUNTS = (1, 2, 3, 16, 65)
"""Rows that are multiplied alone: few, where libraries change their code, and more than a tile."""
TOGETHER = 520
"""Rows of the matmul that they are compared with."""
TILE_ROWS = 64
"""Rows of a tile, for layers that fail."""

LayerKey = tuple[int, int, torch.dtype]
"""Outputs, inputs, and the dtype that a layer multiplies in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A linear layer as far as its code depends on it; the last three say where it runs and are filled in.

    Attributes:
        num_outputs: Rows of the weight.
        num_inputs: Columns of the weight.
        dtype: Of rows, weight and result.
        device: Of all.
        has_bias: Whether a bias is added.
        tile_rows: As `linear` takes it.
        num_threads: Those of torch.
        has_onednn: Whether `linear` multiplies by oneDNN, else by what torch picks.
        instructions: What oneDNN is held to by its environment variable; None if by nothing.
    """

    num_outputs: int
    num_inputs: int
    dtype: torch.dtype
    device: torch.device
    has_bias: bool = True
    tile_rows: int | None = None
    num_threads: int = field(default_factory=torch.get_num_threads)
    has_onednn: bool = field(init=False)
    instructions: str | None = field(default_factory=lambda: os.environ.get("ONEDNN_MAX_CPU_ISA"))

    def __post_init__(self) -> None:
        """Looks up the library."""
        object.__setattr__(self, "has_onednn", self.device.type == "cpu" and takes_onednn(self.dtype))


@functools.cache
def is_row_independent(product: Product) -> bool:
    """Whether the first rows, and rows from the middle, have alone the bits that they have among all `TOGETHER`.

    Multiplies random numbers of its own once per product and process; global random state is left alone. Waits for the
    device.
    """
    device, dtype = product.device, product.dtype
    random = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        x_ni, weight_oi, bias_1o = (
            torch.randn(*shape, generator=random, dtype=torch.float32, device=device).to(dtype)
            for shape in (
                (TOGETHER, product.num_inputs),
                (product.num_outputs, product.num_inputs),
                (1, product.num_outputs),
            )
        )
        bias_o = bias_1o[0] if product.has_bias else None
        together_no = linear(x_ni, weight_oi, bias_o, product.tile_rows)
        # In the middle neither a tile nor a thread's share begins.
        parts = [slice(first, first + count) for count in COUNTS for first in (0, TOGETHER // 2 + 13)]
        return all(
            torch.equal(linear(x_ni[rows], weight_oi, bias_o, product.tile_rows), together_no[rows]) for rows in parts
        )


def failing_layers(
    layers: Iterable[nn.Linear], dtype: torch.dtype | None = None, tile_rows: int | None = None
) -> frozenset[LayerKey]:
    """The shapes of those layers whose rows depend on the rows beside them, with the threads that torch has now.

    Layers with weights of a class of their own (quantised ones) are left out.

    Args:
        layers: Any; several of one shape are probed once.
        dtype: What they multiply in, where that is not the dtype of their weights (`models.layers.linear32`).
        tile_rows: As `linear` takes it: whether such tiles would help.
    """
    plain = [layer for layer in layers if type(layer.weight) in (Tensor, nn.Parameter)]
    products = {
        Product(
            num_outputs=layer.out_features,
            num_inputs=layer.in_features,
            dtype=dtype or layer.weight.dtype,
            device=layer.weight.device,
            has_bias=has_bias,
            tile_rows=tile_rows,
        )
        for layer in plain
        # A layer without a bias may be run with one that its module puts together.
        for has_bias in ((True, False) if layer.bias is None else (True,))
    }
    return frozenset((p.num_outputs, p.num_inputs, p.dtype) for p in products if not is_row_independent(p))


def describe_rows() -> str:
    """For people: whether linear layers of this machine compute each row by itself, as far as one shape tells."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    failing = [
        name
        for name, dtype in kinds.items()
        if not is_row_independent(Product(num_outputs=1024, num_inputs=256, dtype=dtype, device=torch.device("cpu")))
    ]
    return "independent" if not failing else f"{' and '.join(failing)} in tiles of {TILE_ROWS}"


def tile_failing_(blocks: Iterable[nn.Module], heads: Iterable[nn.Linear] = ()) -> tuple[str, ...]:
    """Makes every linear layer whose rows depend on the rows beside them run in tiles; on a CPU.

    Elsewhere nothing is probed: there an image that shall not depend on its batch runs by itself.

    Args:
        blocks: Their linear layers are probed in the dtype of their weights.
        heads: Layers that run in float32 whatever their weights are (`models.layers.linear32`).

    Returns:
        The shapes that run in tiles now, for people.
    """
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    named = ((layer, None) for layer in layers), ((layer, torch.float32) for layer in heads)
    found: dict[str, None] = {}
    for layer, dtype in (pair for group in named for pair in group):
        if layer.weight.device.type == "cpu" and failing_layers([layer], dtype):
            layer.tile_rows = TILE_ROWS  # type: ignore[assignment]
            found[f"{layer.in_features}x{layer.out_features}"] = None
    return tuple(found)
