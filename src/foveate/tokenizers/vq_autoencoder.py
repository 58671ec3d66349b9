"""The convolutional autoencoder behind the VQ tokenizer: pixels to latents and back, with attention where it is coarse.

Pixels are float RGB in [-1, 1], (B, 3, Y, X); latents are (B, Z, H, W) with Y = H * stride. The module names are those
of the published checkpoints, which hold the quantiser's weights too; what is done with those is in `vq`.
Axes: c channels, (y, x) the grid of a layer, p positions of it.
Source: VAR (arXiv 2404.02905); the layout is that of VQGAN (arXiv 2012.09841), as in latent diffusion's VQ-f16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.core.layers import Conv2d, Embedding
from foveate.tokenizers.autoencoder import Downsample, ResBlock, Upsample
from foveate.tokenizers.strips import LayerChain, StripLayer, convolve, run_in_strips, settle


@dataclass(frozen=True, kw_only=True, slots=True)
class VQAutoencoderConfig:
    """Shape of an autoencoder and its codebook; `num_refiners` convolutions refine the residuals of all scales."""

    latent_channels: int = 32
    base_channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    codebook_size: int = 4096
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
        return 2 ** (len(self.channel_multipliers) - 1)


class Attention(StripLayer):
    """Every position looks at all others, with one head, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
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
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c y x"]:
        """Runs all three."""
        return self.block_2(self.attn_1(self.block_1(x)))

    def layers(self) -> list[nn.Module]:
        """All three, in order."""
        return [self.block_1, self.attn_1, self.block_2]


class Level(LayerChain):
    """The residual blocks of one resolution, each followed by attention at the lowest, and the change to the next."""

    def __init__(
        self, channels: Sequence[int], has_attention: bool, resample: nn.Module | None, resample_name: str
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in pairwise(channels))
        self.attn = nn.ModuleList(Attention(width) for width in channels[1:] if has_attention)
        self.resample_name = resample_name if resample is not None else ""
        if resample is not None:
            self.add_module(resample_name, resample)

    def forward(self, x: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c2 y2 x2"]:
        """Runs the level."""
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return self.get_submodule(self.resample_name)(x) if self.resample_name else x

    def layers(self) -> list[nn.Module]:
        """Blocks, attention and the change of resolution, in order."""
        pairs = zip(self.block, self.attn, strict=True) if len(self.attn) else ((block,) for block in self.block)
        last = [self.get_submodule(self.resample_name)] if self.resample_name else []
        return [*(layer for pair in pairs for layer in pair), *last]


class Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, config: VQAutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        lowest = len(widths) - 1
        self.conv_in = Conv2d(3, config.base_channels, 3, padding=1)
        levels: list[Level] = []
        previous = config.base_channels
        for i, width in enumerate(widths):
            down = Downsample(width) if i < lowest else None
            levels.append(Level([previous] + [width] * config.num_res_blocks, i == lowest, down, "downsample"))
            previous = width
        self.down = nn.ModuleList(levels)
        self.mid = Middle(previous)
        self.norm_out = nn.GroupNorm(32, previous, eps=1e-6)
        self.conv_out = Conv2d(previous, config.latent_channels, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B Z H W"]:
        """Encodes pixels in [-1, 1]."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: VQAutoencoderConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        lowest = len(widths) - 1
        self.conv_in = Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        levels: list[Level] = []
        previous = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            up = Upsample(width) if i > 0 else None
            levels.insert(0, Level([previous] + [width] * (config.num_res_blocks + 1), i == lowest, up, "upsample"))
            previous = width
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, previous, eps=1e-6)
        self.conv_out = Conv2d(previous, 3, 3, padding=1)

    def forward(self, latent_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Decodes to pixels around [-1, 1], not clamped."""
        x = self.mid(self.conv_in(latent_BZHW))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))

    def in_strips(self, latent_1ZHW: Float[Tensor, "1 Z H W"]) -> Float[Tensor, "1 3 Y X"]:
        """What `forward` gives for one image, up to rounding, in less memory and time; no gradients."""
        x = self.conv_in(latent_1ZHW.contiguous(memory_format=torch.channels_last))
        return convolve(run_in_strips((self.mid, *reversed(self.up)), x), self.norm_out, self.conv_out)


class Quantiser(nn.Module):
    """Holds the codebook and the convolutions that refine residuals, under their published names."""

    def __init__(self, config: VQAutoencoderConfig) -> None:
        super().__init__()
        channels = config.latent_channels
        self.embedding = Embedding(config.codebook_size, channels)
        refiners = nn.ModuleList(Conv2d(channels, channels, 3, padding=1) for _ in range(config.num_refiners))
        self.quant_resi = nn.ModuleDict({"qresi_ls": refiners})

    def refiner(self, index: int) -> tuple[Float[Tensor, "Z Z 3 3"], Float[Tensor, " Z"]]:
        """Weight and bias of one of the convolutions."""
        name = f"quant_resi.qresi_ls.{index}"
        return self.get_parameter(f"{name}.weight"), self.get_parameter(f"{name}.bias")


class VQAutoencoder(nn.Module):
    """Encoder, decoder, and the weights of the quantiser between them."""

    def __init__(self, config: VQAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
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
        return self.quant_conv(self.encoder(pixels))

    def decode(self, latent_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Latents to pixels around [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latent_BZHW))

    def decode_in_strips(self, latent_1ZHW: Float[Tensor, "1 Z H W"]) -> Float[Tensor, "1 3 Y X"]:
        """What `decode` gives for one image, up to rounding, in less memory and time; no gradients."""
        return self.decoder.in_strips(self.post_quant_conv(latent_1ZHW))
