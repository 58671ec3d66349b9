"""A probe of linear layers: whether a row of a matmul has the same bits alone and in a batch.

An image in a batch is packed with the tokens of others, so it is the same as alone only if every matmul computes each
row by itself. Whether it does depends on the library, the processor, the threads and the shape: no guarantee.
Axes: n rows, i inputs, o outputs.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from foveate.kernels import native
from foveate.kernels.linear import linear, takes_onednn

COUNTS = (1, 2, 3, 5, 16, 33, 37, 42, 65)
"""Rows that are multiplied alone, from two places: few, where libraries change their code, and more than a tile."""
MORE_COUNTS = (97, 129, 193, 257, 385)
"""The same from one place."""
TOGETHER = 640
"""Rows of the matmul that they are compared with."""
MANY_COUNTS, MANY_TOGETHER = (*MORE_COUNTS, 520, 700, 736, 1024, 1800), 2600
"""Both for bfloat16 on processors with AMX, where oneDNN changes its code several times, up to thousands of rows."""
TILE_ROWS = 64
"""Rows of a tile, for layers that fail."""
_SMALL_TILES = (TILE_ROWS, 32)
_WHOLE_ROWS = (512, 384, 256)
"""Rows of the larger tiles that are tried for a layer that fails: the more, the faster."""


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
        whole_rows: As well.
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
    whole_rows: int | None = None
    num_threads: int = field(default_factory=torch.get_num_threads)
    has_onednn: bool = field(init=False)
    instructions: str | None = field(default_factory=lambda: os.environ.get("ONEDNN_MAX_CPU_ISA"))

    def __post_init__(self) -> None:
        """Looks up the library."""
        object.__setattr__(self, "has_onednn", self.device.type == "cpu" and takes_onednn(self.dtype))


@functools.cache
def is_row_independent(product: Product) -> bool:
    """Whether the first rows, and rows from the middle, have alone the bits that they have among many.

    Multiplies random numbers of its own once per product and process; global random state is left alone. Waits for the
    device.
    """
    device, dtype = product.device, product.dtype
    # Tiles of fixed sizes leave nothing to be found among many rows.
    has_many = native.has_amx_products() and dtype is torch.bfloat16 and product.tile_rows is None
    more, together = (MANY_COUNTS, MANY_TOGETHER) if has_many else (MORE_COUNTS, TOGETHER)
    random = torch.Generator(device).manual_seed(0)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        x_ni, weight_oi, bias_1o = (
            torch.randn(*shape, generator=random, dtype=torch.float32, device=device).to(dtype)
            for shape in (
                (together, product.num_inputs),
                (product.num_outputs, product.num_inputs),
                (1, product.num_outputs),
            )
        )
        bias_o = bias_1o[0] if product.has_bias else None
        tiles = product.tile_rows, product.whole_rows
        together_no = linear(x_ni, weight_oi, bias_o, *tiles)
        # In the middle neither a tile nor a thread's share begins.
        parts = [slice(first, first + count) for count in COUNTS for first in (0, together // 2 + 13)]
        parts += [slice(count) for count in more]
        return all(torch.equal(linear(x_ni[rows], weight_oi, bias_o, *tiles), together_no[rows]) for rows in parts)


def tiles_of(products: Sequence[Product]) -> tuple[int | None, int | None]:
    """`tile_rows` and `whole_rows` with which the rows of all these are independent, at the least price that is known.

    Small tiles cost up to two thirds of a fast library's speed where there are many rows, so most rows run in large
    ones, whose rows have the same bits. As all matmuls then have one of two sizes, the promise holds for any number of
    rows. None of both where none is needed.

    Args:
        products: Those of one layer.
    """
    if all(is_row_independent(product) for product in products):
        return None, None
    for whole in _WHOLE_ROWS:
        for tile in (*_SMALL_TILES, whole):
            if all(is_row_independent(replace(p, tile_rows=tile, whole_rows=whole)) for p in products):
                return tile, whole
    return TILE_ROWS, None


def products_of(layer: nn.Linear, dtype: torch.dtype | None = None) -> list[Product]:
    """What a layer multiplies; none for weights of a class of their own (quantised ones).

    Args:
        layer: Without a bias it may be run with one that its module puts together.
        dtype: What it multiplies in, where that is not the dtype of its weights (`models.layers.linear32`).
    """
    if type(layer.weight) not in (Tensor, nn.Parameter):
        return []
    return [
        Product(
            num_outputs=layer.out_features,
            num_inputs=layer.in_features,
            dtype=dtype or layer.weight.dtype,
            device=layer.weight.device,
            has_bias=has_bias,
        )
        for has_bias in ((True, False) if layer.bias is None else (True,))
    ]


def describe_rows() -> str:
    """For people: whether linear layers of this machine compute each row by itself, as far as two shapes tell."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    shapes = ((1024, 256), (256, 1024))
    found = []
    for name, dtype in kinds.items():
        device = torch.device("cpu")
        products = (Product(num_outputs=o, num_inputs=i, dtype=dtype, device=device) for o, i in shapes)
        tiles = {tiles for tiles in (tiles_of([product]) for product in products) if tiles[0] is not None}
        found += [f"{name} {_described(*pair)}" for pair in sorted(tiles, key=str)]
    return " and ".join(found) or "independent"


def _described(tile_rows: int | None, whole_rows: int | None) -> str:
    """For people: how many rows the tiles of a layer have."""
    large = "" if whole_rows in (None, tile_rows) else f"{whole_rows} and "
    return f"in tiles of {large}{tile_rows}"


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
        if layer.weight.device.type != "cpu":
            continue
        tiles = tiles_of(products_of(layer, dtype))
        if tiles[0] is not None:
            layer.tile_rows, layer.whole_rows = tiles  # type: ignore[assignment]
            found[f"{layer.in_features}x{layer.out_features} ({_described(*tiles)})"] = None
    return tuple(found)
