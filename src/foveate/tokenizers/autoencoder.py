"""The convolutional autoencoder behind the BSQ tokenizer: pixels to latents and latents to pixels.

Pixels are float RGB in [-1, 1], (B, 3, Y, X); latents are (B, Z, H, W) with Y = H * stride. The module names follow the
published Infinity autoencoders, so their weights load after `models.checkpoint` has removed the wrapper names. `patch`
puts a pixel-unshuffle in front and a pixel-shuffle behind (1 in the published models): all convolutions then run at
1/patch of the resolution, which is what makes the bundled model fast on a CPU.
Source: Infinity (arXiv 2412.04431); the layout is that of Flux's autoencoder without attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.core.layers import Conv2d
from foveate.tokenizers.strips import (
    LayerChain,
    MapNorm,
    StripLayer,
    convolve,
    convolved,
    enlarge,
    one_late,
    run_in_strips,
    settle,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Shape of an autoencoder; `stride` pixels of a side become one latent."""

    latent_channels: int
    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int = 2
    patch: int = 1

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be built."""
        for multiplier in self.channel_multipliers:
            if (self.base_channels * multiplier) % 32:
                raise FoveateError(
                    f"base_channels * multiplier must be divisible by 32, got {self.base_channels} * {multiplier}"
                )

    @property
    def stride(self) -> int:
        """Pixels per latent along a side."""
        return self.patch * 2 ** (len(self.channel_multipliers) - 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(StripLayer):
    """Norm, SiLU, convolution, twice, plus the input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = Conv2d(in_channels, out_channels, 1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c2 y x"]:
        """Runs the block."""
        change = self.conv1(F.silu(self.norm1(x)))
        change = self.conv2(F.silu(self.norm2(change)))
        return (self.nin_shortcut(x) if self.has_shortcut else x) + change

    def in_strips(self, x: Float[Tensor, "1 c y x"]) -> Float[Tensor, "1 c2 y x"]:
        """Runs the block; its sum takes the place of what the first convolution gave."""
        change = convolve(x, self.norm1, self.conv1)
        for (top, end), part in one_late(convolved(change, MapNorm.of(self.norm2, change), self.conv2)):
            straight = x[:, :, top:end]
            torch.add(part, self.nin_shortcut(straight) if self.has_shortcut else straight, out=change[:, :, top:end])
        return change


class Downsample(nn.Module):
    """Halves the resolution with a stride-2 convolution, padded right and bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c y2 x2"]:
        """Runs the layer."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(StripLayer):
    """Doubles the resolution by repetition and smooths with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c y2 x2"]:
        """Runs the layer."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def in_strips(self, x: Float[Tensor, "1 c y x"]) -> Float[Tensor, "1 c y2 x2"]:
        """Runs the layer."""
        return enlarge(x, self.conv)


class Middle(LayerChain):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c y x"]:
        """Runs both blocks."""
        return self.block_2(self.block_1(x))

    def layers(self) -> list[nn.Module]:
        """Both blocks."""
        return [self.block_1, self.block_2]


class Level(LayerChain):
    """The residual blocks of one resolution and the change to the next one, if there is one."""

    def __init__(self, channels: Sequence[int], resample: nn.Module | None, resample_name: str) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(channels))
        self.resample_name = resample_name if resample is not None else ""
        if resample is not None:
            self.add_module(resample_name, resample)

    def forward(self, x: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c2 y2 x2"]:
        """Runs the level."""
        for block in self.block:
            x = block(x)
        return self.get_submodule(self.resample_name)(x) if self.resample_name else x

    def layers(self) -> list[nn.Module]:
        """The blocks and the change of resolution, in order."""
        return [*self.block, *([self.get_submodule(self.resample_name)] if self.resample_name else [])]


class Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.patch = config.patch
        self.conv_in = Conv2d(3 * config.patch**2, config.base_channels, 3, padding=1)
        levels: list[Level] = []
        previous = config.base_channels
        for i, width in enumerate(widths):
            down = Downsample(width) if i < len(widths) - 1 else None
            levels.append(Level([previous] + [width] * config.num_res_blocks, down, "downsample"))
            previous = width
        self.down = nn.ModuleList(levels)
        self.mid = Middle(previous)
        self.norm_out = _norm(previous)
        self.conv_out = Conv2d(previous, config.latent_channels, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B Z H W"]:
        """Encodes pixels in [-1, 1]."""
        x = self.conv_in(F.pixel_unshuffle(pixels, self.patch) if self.patch > 1 else pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.patch = config.patch
        self.conv_in = Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        levels: list[Level] = []
        previous = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            up = Upsample(width) if i > 0 else None
            levels.insert(0, Level([previous] + [width] * (config.num_res_blocks + 1), up, "upsample"))
            previous = width
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(previous)
        self.conv_out = Conv2d(previous, 3 * config.patch**2, 3, padding=1)

    def forward(self, latent_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Decodes to pixels around [-1, 1], not clamped."""
        x = self.mid(self.conv_in(latent_BZHW))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x

    def in_strips(self, latent_1ZHW: Float[Tensor, "1 Z H W"]) -> Float[Tensor, "1 3 Y X"]:
        """What `forward` gives for one image, up to rounding, in less memory and time; no gradients."""
        x = self.conv_in(latent_1ZHW.contiguous(memory_format=torch.channels_last))
        x = convolve(run_in_strips((self.mid, *reversed(self.up)), x), self.norm_out, self.conv_out)
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class Autoencoder(nn.Module):
    """Encoder and decoder; the quantiser between them (`bsq`) has no weights."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def settle(self, dtype: torch.dtype, decoder_dtype: torch.dtype) -> None:
        """Puts encoder and decoder each into its dtype, channels last."""
        settle(self.encoder, dtype)
        settle(self.decoder, decoder_dtype)

    def encode(self, pixels: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B Z H W"]:
        """Pixels in [-1, 1] to continuous latents."""
        return self.encoder(pixels)

    def decode(self, latent_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Latents to pixels around [-1, 1], not clamped."""
        return self.decoder(latent_BZHW)

    def decode_in_strips(self, latent_1ZHW: Float[Tensor, "1 Z H W"]) -> Float[Tensor, "1 3 Y X"]:
        """What `decode` gives for one image, up to rounding, in less memory and time; no gradients."""
        return self.decoder.in_strips(latent_1ZHW)
