"""The convolutional autoencoder behind both tokenizers: pixels to latents and latents to pixels.

Pixels are float RGB in [-1, 1], (B, 3, Y, X); latents are (B, Z, H, W) with Y = H * stride. The module names follow the
published autoencoders. Two switches of the configuration cover what is published:

- `codebook_size` > 0 (VAR, Switti) is the layout of VQGAN: attention at the lowest resolution, a convolution on either
  side of the quantiser, and the quantiser's weights, which `vq` uses. 0 (Infinity) has none of these.
- `patch` puts a pixel-unshuffle in front and a pixel-shuffle behind (1 in the published models): all convolutions then
  run at 1/patch of the resolution, which is what makes the bundled model fast on a CPU.

Axes: c channels, (y, x) the grid of a layer, p positions of it.
Source: Infinity (arXiv 2412.04431), the layout of Flux's autoencoder without attention; VAR (arXiv 2404.02905), the
layout of VQGAN (arXiv 2012.09841) as in latent diffusion's VQ-f16.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.core.layers import Conv2d, Embedding
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
    """Shape of an autoencoder; `stride` pixels of a side become one latent.

    `codebook_size` is 0 without a codebook; with one, `num_refiners` convolutions refine the residuals of all scales.
    """

    latent_channels: int
    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int = 2
    patch: int = 1
    codebook_size: int = 0
    num_refiners: int = 4

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

    @property
    def has_codebook(self) -> bool:
        """Whether the quantiser has weights, and the network the attention that comes with them."""
        return self.codebook_size > 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every resolution, the highest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)


VQ_F16 = AutoencoderConfig(
    latent_channels=32, base_channels=160, channel_multipliers=(1, 1, 2, 2, 4), codebook_size=4096
)
"""The published one of VAR, Switti and HART."""


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


class Attention(StripLayer):
    """Every position looks at all others, with one head, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c y x"]:
        """Runs the layer."""
        q_Bpc, k_Bpc, v_Bpc = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed_Bpc = F.scaled_dot_product_attention(q_Bpc, k_Bpc, v_Bpc)
        return x + self.proj_out(mixed_Bpc.transpose(1, 2).unflatten(-1, x.shape[-2:]))

    def in_strips(self, x: Float[Tensor, "1 c y x"]) -> Float[Tensor, "1 c y x"]:
        """Runs the layer at once: it is for coarse maps, and all positions need each other."""
        return self(x)


class Middle(LayerChain):
    """Two residual blocks at the lowest resolution, with attention between them if asked."""

    def __init__(self, channels: int, has_attention: bool) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        if has_attention:
            self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def layers(self) -> Iterator[nn.Module]:
        """All of them, in the order in which they were made."""
        return self.children()


class Level(LayerChain):
    """The residual blocks of one resolution, each followed by attention if asked, and the change to the next one."""

    def __init__(
        self, channels: Sequence[int], has_attention: bool, resample: nn.Module | None, resample_name: str
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(channels))
        self.attn = nn.ModuleList(Attention(width) for width in channels[1:] if has_attention)
        self.resample_name = resample_name if resample is not None else ""
        if resample is not None:
            self.add_module(resample_name, resample)

    def layers(self) -> Iterator[nn.Module]:
        """Blocks, attention and the change of resolution, in order."""
        for i, block in enumerate(self.block):
            yield block
            if len(self.attn):
                yield self.attn[i]
        if self.resample_name:
            yield self.get_submodule(self.resample_name)


class Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, has_attention = config.widths, config.has_codebook
        lowest = len(widths) - 1
        self.patch = config.patch
        self.conv_in = Conv2d(3 * config.patch**2, config.base_channels, 3, padding=1)
        levels: list[Level] = []
        previous = config.base_channels
        for i, width in enumerate(widths):
            down = Downsample(width) if i < lowest else None
            channels = [previous] + [width] * config.num_res_blocks
            levels.append(Level(channels, has_attention and i == lowest, down, "downsample"))
            previous = width
        self.down = nn.ModuleList(levels)
        self.mid = Middle(previous, has_attention)
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
        widths, has_attention = config.widths, config.has_codebook
        lowest = len(widths) - 1
        self.patch = config.patch
        self.conv_in = Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], has_attention)
        levels: list[Level] = []
        previous = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            up = Upsample(width) if i > 0 else None
            channels = [previous] + [width] * (config.num_res_blocks + 1)
            levels.insert(0, Level(channels, has_attention and i == lowest, up, "upsample"))
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


class Quantiser(nn.Module):
    """Holds the codebook and the convolutions that refine residuals, under their published names."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.latent_channels
        self.embedding = Embedding(config.codebook_size, channels)
        refiners = nn.ModuleList(Conv2d(channels, channels, 3, padding=1) for _ in range(config.num_refiners))
        self.quant_resi = nn.ModuleDict({"qresi_ls": refiners})

    def refiner(self, index: int) -> tuple[Float[Tensor, "Z Z 3 3"], Float[Tensor, " Z"]]:
        """Weight and bias of one of the convolutions."""
        name = f"quant_resi.qresi_ls.{index}"
        return self.get_parameter(f"{name}.weight"), self.get_parameter(f"{name}.bias")


class Autoencoder(nn.Module):
    """Encoder and decoder; with a codebook also the weights of the quantiser and a convolution on either side of it."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.has_codebook:
            self.quantize = Quantiser(config)
            self.quant_conv = Conv2d(channels, channels, 3, padding=1)
            self.post_quant_conv = Conv2d(channels, channels, 3, padding=1)

    def settle(self, dtype: torch.dtype, decoder_dtype: torch.dtype) -> None:
        """Puts what decodes, and everything else, each into its dtype, channels last."""
        decoding = ("post_quant_conv", "decoder")
        for name, part in self.named_children():
            settle(part, decoder_dtype if name in decoding else dtype)

    def encode(self, pixels: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B Z H W"]:
        """Pixels in [-1, 1] to continuous latents."""
        latent_BZHW = self.encoder(pixels)
        return self.quant_conv(latent_BZHW) if self.config.has_codebook else latent_BZHW

    def decode(self, latent_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Latents to pixels around [-1, 1], not clamped."""
        return self.decoder(self._decoder_input(latent_BZHW))

    def decode_in_strips(self, latent_1ZHW: Float[Tensor, "1 Z H W"]) -> Float[Tensor, "1 3 Y X"]:
        """What `decode` gives for one image, up to rounding, in less memory and time; no gradients."""
        return self.decoder.in_strips(self._decoder_input(latent_1ZHW))

    def _decoder_input(self, latent_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B Z H W"]:
        return self.post_quant_conv(latent_BZHW) if self.config.has_codebook else latent_BZHW

    @torch.inference_mode()
    def images(self, f_hat_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Float32 pixels, clamped to [-1, 1]; one image at a time, so that none depends on its batch mates."""
        dtype = self.decoder.conv_in.weight.dtype
        images = [self.decode_in_strips(latent[None].to(dtype)).float() for latent in f_hat_BZHW]
        return torch.cat(images).clamp_(-1, 1)
