"""Layers of a decoder on a large map, strip of rows by strip of rows: the same numbers in less memory and time.

A layer takes a whole map and gives a whole map; between the two only a strip exists of anything else. Norms take their
statistics over the whole map before, and a strip is read with the rows that its convolution needs above and below, so
that strips leave no seams and results differ from those of the plain layers by rounding alone.
Axes: one image, c channels, (y, x) the grid of a layer, n rows of a strip, G groups of a norm.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CPU_VALUES, GPU_VALUES = 2**20, 2**25
"""Of a strip. On a CPU it stays in the caches (4 MiB in float32); a GPU wants more work per kernel launch."""

Rows = tuple[int, int]
"""First row of a strip, and the one behind it."""

Part = TypeVar("Part")


class StripLayer(nn.Module, ABC):
    """A layer that can also run in strips."""

    @abstractmethod
    def in_strips(self, x: Float[Tensor, "1 c y x"]) -> Float[Tensor, "1 c2 y2 x2"]:
        """What `forward` gives, up to rounding; a new map, channels last. No gradients."""


def settle(module: nn.Module, dtype: torch.dtype) -> None:
    """Changes a module's dtype and puts its convolutions channels last, the faster layout on CPUs and GPUs alike."""
    module.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


class LayerChain(nn.Module, ABC):
    """Layers that run one after the other."""

    @abstractmethod
    def layers(self) -> Iterable[nn.Module]:
        """The layers, in order; those of a decoder are of `StripLayer`."""

    def forward(self, x: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c2 y2 x2"]:
        """Runs all layers."""
        for layer in self.layers():
            x = layer(x)
        return x


def run_in_strips(chains: Iterable[nn.Module], x: Float[Tensor, "1 c y x"]) -> Float[Tensor, "1 c2 y2 x2"]:
    """Runs all layers of some chains, a map of one strip at once: bookkeeping would cost more than it saves there.

    Each map is freed as soon as the next layer is through.
    """
    for chain in chains:
        assert isinstance(chain, LayerChain), "decoders are made of chains"
        for layer in chain.layers():
            assert isinstance(layer, StripLayer), "chains of decoders are made of such layers"
            x = layer.in_strips(x) if len(strips_of(x)) > 1 else layer(x)
    return x


def strips_of(map_1cyx: Float[Tensor, "1 c y x"]) -> list[Rows]:
    """The strips of a map, from the top."""
    values = GPU_VALUES if map_1cyx.is_cuda else CPU_VALUES
    channels, height, width = map_1cyx.shape[1:]
    step = max(values // (channels * width), 1)
    return [(top, min(top + step, height)) for top in range(0, height, step)]


def empty_map(like: Float[Tensor, "1 c y x"], channels: int, height: int, width: int) -> Float[Tensor, "1 c2 y2 x2"]:
    """A map without values, channels last."""
    shape = (1, channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MapNorm:
    """A group norm whose statistics are those of a whole map; mean and variance are those of the channel's group."""

    layer: nn.GroupNorm
    mean_c: Float[Tensor, " c"]
    variance_c: Float[Tensor, " c"]

    @classmethod
    def of(cls, layer: nn.GroupNorm, map_1cyx: Float[Tensor, "1 c y x"]) -> "MapNorm":
        """Takes the statistics strip by strip: sums in float32 within a strip, in float64 over all of them."""
        strips = strips_of(map_1cyx)
        # Around some value near the mean, so that the sum of squares does not drown what is asked for.
        pivot_1c11 = map_1cyx[:, :, slice(*strips[0])].float().mean((2, 3), keepdim=True)
        sum_c = torch.zeros(map_1cyx.shape[1], dtype=torch.float64, device=map_1cyx.device)
        squares_c = torch.zeros_like(sum_c)
        for top, end in strips:
            part_1cnx = map_1cyx[:, :, top:end] - pivot_1c11
            sum_c += part_1cnx.sum((0, 2, 3))
            squares_c += part_1cnx.square_().sum((0, 2, 3))
        pixels = map_1cyx.shape[2] * map_1cyx.shape[3]
        offset_c = sum_c / pixels
        mean_Gc = (offset_c + pivot_1c11.flatten()).view(layer.num_groups, -1)
        variance_Gc = (squares_c / pixels - offset_c.square()).view(layer.num_groups, -1)
        mean_G1 = mean_Gc.mean(1, keepdim=True)
        variance_G1 = (variance_Gc + (mean_Gc - mean_G1).square()).mean(1, keepdim=True)
        return cls(
            layer=layer,
            mean_c=mean_G1.expand_as(mean_Gc).flatten().float(),
            variance_c=variance_G1.expand_as(mean_Gc).flatten().float(),
        )

    def activate(self, part_1cnx: Float[Tensor, "1 c n x"]) -> Float[Tensor, "1 c n x"]:
        """Norm and SiLU; a new tensor. Known statistics make a group norm what a batch norm is at inference."""
        weight_c, bias_c = self.layer.weight.float(), self.layer.bias.float()
        normed = F.batch_norm(part_1cnx, self.mean_c, self.variance_c, weight_c, bias_c, eps=self.layer.eps)
        return F.silu(normed, inplace=True)


def with_edges(map_1cyx: Float[Tensor, "1 c y x"], rows: Rows, norm: MapNorm | None) -> Float[Tensor, "1 c n x"]:
    """A strip and one more row on either side, normed and activated if asked; rows outside of the map are zero."""
    height = map_1cyx.shape[2]
    top, end = rows[0] - 1, rows[1] + 1
    inside = map_1cyx[:, :, max(top, 0) : min(end, height)]
    inside = inside if norm is None else norm.activate(inside)
    return F.pad(inside, (0, 0, max(-top, 0), max(end - height, 0))) if top < 0 or end > height else inside


def convolved(
    map_1cyx: Float[Tensor, "1 c y x"], norm: MapNorm, conv: nn.Conv2d
) -> Iterator[tuple[Rows, Float[Tensor, "1 c2 n x"]]]:
    """Norm, SiLU and a 3x3 convolution, strip by strip; a strip reads the map when it is asked for."""
    for rows in strips_of(map_1cyx):
        yield rows, F.conv2d(with_edges(map_1cyx, rows, norm), conv.weight, conv.bias, padding=(0, 1))


def convolve(map_1cyx: Float[Tensor, "1 c y x"], norm: nn.GroupNorm, conv: nn.Conv2d) -> Float[Tensor, "1 c2 y x"]:
    """Norm, SiLU and a 3x3 convolution as a new map, channels last."""
    changed = empty_map(map_1cyx, conv.out_channels, *map_1cyx.shape[2:])
    for (top, end), part in convolved(map_1cyx, MapNorm.of(norm, map_1cyx), conv):
        changed[:, :, top:end] = part
    return changed


def one_late(parts: Iterator[Part]) -> Iterator[Part]:
    """Hands each part out once the next one has been computed, so that it may overwrite what that one has read."""
    previous = next(parts)
    for part in parts:
        yield previous
        previous = part
    yield previous


def enlarging_weight(weight_oi33: Float[Tensor, "o i 3 3"]) -> Float[Tensor, "i o 4 4"]:
    """The weight of a transposed convolution with stride 2 that is doubling by repetition and a 3x3 convolution.

    A doubled pixel meets two or one of three weights, so their sums meet the pixel itself: 4/9 of the products. The
    sums are taken in float32 and rounded once.
    """
    first, middle, last = weight_oi33.float().unbind(2)
    rows_oi43 = torch.stack((last, middle + last, first + middle, first), dim=2)
    first, middle, last = rows_oi43.unbind(3)
    weight_oi44 = torch.stack((last, middle + last, first + middle, first), dim=3)
    return weight_oi44.transpose(0, 1).to(weight_oi33.dtype).contiguous(memory_format=torch.channels_last)


def enlarge(map_1cyx: Float[Tensor, "1 c y x"], conv: nn.Conv2d) -> Float[Tensor, "1 c2 y2 x2"]:
    """Doubling by repetition and a 3x3 convolution; the doubled map never exists."""
    height, width = map_1cyx.shape[2:]
    weight_io44 = enlarging_weight(conv.weight)
    large = empty_map(map_1cyx, conv.out_channels, 2 * height, 2 * width)
    for rows in strips_of(map_1cyx):
        # Padding of three cuts what the rows above and below would add outside of the strip.
        part = F.conv_transpose2d(with_edges(map_1cyx, rows, None), weight_io44, conv.bias, stride=2, padding=(3, 1))
        large[:, :, 2 * rows[0] : 2 * rows[1]] = part
    return large
