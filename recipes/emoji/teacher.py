"""The forward pass of training: logits of all scales at once, each scale from the true (or flipped) earlier ones.

The arithmetic is that of the blocks that generate, on a rectangle of images and tokens instead of a packed list, with
texts padded to one length, so that every shape is known to the compiler. `tests/train` holds it to the engine.
Parameters stay float32; matrix products run in `dtype`, the residual stream and the head in float32.
Axes: B images, L tokens of all scales, T text tokens after padding, C width, E text width, N heads, D head width,
Z bits, V logits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from foveate.core.schedule import ScaleSchedule
from foveate.kernels.heads import rotate, unit_heads
from foveate.models.attention import CrossAttention
from foveate.models.infinity import Infinity, InfinityBlock
from foveate.models.layers import rms_norm
from recipes.emoji.attention import attend
from recipes.emoji.crops import Crop


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedTexts:
    """Text features of a batch, padded at the end; the padding is never attended to."""

    features_BTE: Float[Tensor, "B T E"]
    is_real_BT: Bool[Tensor, "B T"]


def pad_texts(texts: Sequence[Float[Tensor, "_ E"]], length: int) -> PaddedTexts:
    """Pads texts to `length` tokens; of a longer one the end is cut off."""
    width = texts[0].shape[1]
    features_BTE = texts[0].new_zeros((len(texts), length, width))
    counts = [min(text.shape[0], length) for text in texts]
    for row, (text_TE, count) in enumerate(zip(texts, counts, strict=True)):
        features_BTE[row, :count] = text_TE[:count]
    positions_1T = torch.arange(length, device=features_BTE.device)[None]
    counts_B1 = torch.tensor(counts, device=features_BTE.device)[:, None]
    return PaddedTexts(features_BTE=features_BTE, is_real_BT=positions_1T < counts_B1)


class BlockWeights(NamedTuple):
    """The parameters of one block, as the compiled function takes them."""

    ada_6C: Tensor
    qkv: Tensor
    q_bias: Tensor
    v_bias: Tensor
    log_gain_N: Tensor
    proj: Tensor
    proj_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    cross_q: Tensor
    cross_q_bias: Tensor
    cross_kv: Tensor
    cross_v_bias: Tensor
    cross_proj: Tensor
    cross_proj_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    @classmethod
    def of(cls, block: InfinityBlock) -> "BlockWeights":
        """Reads them from a block."""
        sa, ca, ffn = block.sa, block.ca, block.ffn
        return cls(
            ada_6C=block.ada_gss[0, 0],
            qkv=sa.mat_qkv.weight,
            q_bias=sa.q_bias,
            v_bias=sa.v_bias,
            log_gain_N=sa.scale_mul_1H11.view(-1),
            proj=sa.proj.weight,
            proj_bias=sa.proj.bias,
            norm=block.ca_norm.weight,
            norm_bias=block.ca_norm.bias,
            cross_q=ca.mat_q.weight,
            cross_q_bias=ca.mat_q.bias,
            cross_kv=ca.mat_kv.weight,
            cross_v_bias=ca.v_bias,
            cross_proj=ca.proj.weight,
            cross_proj_bias=ca.proj.bias,
            up=ffn.fc1.weight,
            up_bias=ffn.fc1.bias,
            down=ffn.fc2.weight,
            down_bias=ffn.fc2.bias,
        )


class Layout(NamedTuple):
    """Where the scales of a sequence lie.

    Tokens up to `ends[0]` share one attention call, where each sees the first `seen_1l` keys; each later scale has one
    without a mask.
    `rotation_LD` holds the rotary positions.
    """

    rotation_LD: Tensor
    seen_1l: Tensor
    ends: tuple[int, ...]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _modulate(x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * factor[:, None] + shift[:, None]


def _text_heads(text: Tensor, weight: Tensor, v_bias: Tensor, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bias = torch.cat((torch.zeros_like(v_bias), v_bias))
    k, v = _linear(text, weight, bias, dtype).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return k, v


def run_block(
    x_BLC: Float[Tensor, "B L C"],
    weights: BlockWeights,
    shared_B6C: Float[Tensor, "B 6 C"],
    text_BTC: Float[Tensor, "B T C"],
    is_real_BT: Bool[Tensor, "B T"],
    layout: Layout,
    dtype: torch.dtype,
    path_B2: Float[Tensor, "B 2"] | None = None,
) -> Float[Tensor, "B L C"]:
    """One block on all scales: self-attention, cross-attention, feed-forward; float32 in and out.

    `path_B2` multiplies what self-attention and feed-forward add, image by image, see `draw_paths`.
    """
    rotation_LD, seen_1l, ends = layout
    heads = weights.log_gain_N.shape[0]
    gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = (shared_B6C + weights.ada_6C).unbind(1)
    if path_B2 is not None:
        gate_1, gate_2 = gate_1 * path_B2[:, :1], gate_2 * path_B2[:, 1:]

    x = _modulate(x_BLC, 1 + scale_1, shift_1)
    bias = torch.cat((weights.q_bias, torch.zeros_like(weights.q_bias), weights.v_bias))
    q, k, v = _linear(x, weights.qkv, bias, dtype).unflatten(-1, (3, heads, -1)).unbind(2)
    gain_N1 = weights.log_gain_N.clamp_max(math.log(100.0)).exp()[:, None]
    q = rotate(unit_heads(q) * gain_N1, rotation_LD).to(dtype).transpose(1, 2)
    k = rotate(unit_heads(k), rotation_LD).to(dtype).transpose(1, 2)
    v = v.transpose(1, 2)
    parts, begin = [], 0
    for end in ends:
        seen = seen_1l if begin == 0 else None
        parts.append(attend(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], 1.0, seen))
        begin = end
    attended = torch.cat(parts, dim=2).transpose(1, 2).flatten(2)
    x_BLC = x_BLC + _linear(attended, weights.proj, weights.proj_bias, dtype).float() * gate_1[:, None]

    x = F.layer_norm(x_BLC, x_BLC.shape[-1:], weights.norm, weights.norm_bias, eps=1e-6)
    q = _linear(x, weights.cross_q, weights.cross_q_bias, dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = _text_heads(text_BTC, weights.cross_kv, weights.cross_v_bias, heads, dtype)
    attended = attend(q, k, v, q.shape[-1] ** -0.5, is_real_BT.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
    x_BLC = x_BLC + _linear(attended, weights.cross_proj, weights.cross_proj_bias, dtype).float()

    x = _linear(_modulate(x_BLC, 1 + scale_2, shift_2), weights.up, weights.up_bias, dtype)
    x = _linear(F.gelu(x, approximate="tanh"), weights.down, weights.down_bias, dtype)
    return x_BLC + x.float() * gate_2[:, None]


RunBlock = Callable[..., Tensor]


def draw_paths(rate: float, depth: int, batch: int, rng: np.random.Generator) -> Float[Tensor, "P B 2"]:
    """Draws which sublayers an image passes over (stochastic depth, arXiv 1603.09382).

    As in Infinity's code: self-attention and feed-forward are dropped image by image and apart from each other, with a
    probability that rises linearly from 0 in the first block to `rate` in the last; cross-attention stays.

    Returns:
        0 where a sublayer adds nothing, else one over its probability of staying, so that the mean is 1.
    """
    stays_P11 = 1 - np.linspace(0.0, rate, depth)[:, None, None]
    is_kept_PB2 = rng.random((depth, batch, 2)) < stays_P11
    return torch.from_numpy(is_kept_PB2 / stays_P11).float()


@dataclass(kw_only=True)
class Teacher:
    """Runs a model on whole sequences; `run_block` may be its compiled form."""

    model: Infinity
    schedule: ScaleSchedule
    masked_tokens: int
    dtype: torch.dtype
    run_block: RunBlock = run_block
    _layouts: dict[tuple[int, Crop | None], Layout] = field(default_factory=dict)

    def compiled(self) -> "Teacher":
        """The same with its blocks compiled: one graph for all blocks, per number of scales."""
        return Teacher(
            model=self.model,
            schedule=self.schedule,
            masked_tokens=self.masked_tokens,
            dtype=self.dtype,
            run_block=torch.compile(run_block, dynamic=False),
        )

    def logits(
        self,
        texts: PaddedTexts,
        inputs: Sequence[Float[Tensor, "B Z _h _w"]],
        path_PB2: Float[Tensor, "P B 2"] | None = None,
        crop: Crop | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Float32 logits of `len(inputs) + 1` scales, two per bit.

        Args:
            texts: What is asked for.
            inputs: What each scale behind the first reads, see `Quantised.inputs`.
            path_PB2: What `draw_paths` gave; all blocks run whole if None.
            crop: Where `inputs` was cropped; nowhere if None.
        """
        model, dtype = self.model, self.dtype
        text_BTE = rms_norm(texts.features_BTE, model.text_norm.weight).to(dtype)
        pooled_BC = self._pooled(text_BTE, texts.is_real_BT)
        active_BC = F.silu(pooled_BC)
        _, shared_lin = model.shared_ada_lin
        _, head_lin = model.head_nm.ada_lin
        shared_B6C = F.linear(active_BC, shared_lin.weight, shared_lin.bias).unflatten(-1, (6, -1))  # type: ignore[arg-type]
        scale_BC, shift_BC = F.linear(active_BC, head_lin.weight, head_lin.bias).unflatten(-1, (2, -1)).unbind(1)  # type: ignore[arg-type]
        first, _, second = model.text_proj_for_ca
        text_BTC = _linear(text_BTE, first.weight, first.bias, dtype)  # type: ignore[arg-type]
        text_BTC = _linear(F.gelu(text_BTC, approximate="tanh"), second.weight, second.bias, dtype)  # type: ignore[arg-type]
        x_BLC = self._entries(pooled_BC, inputs)
        layout = self._layout(len(inputs) + 1, crop)
        for index in range(model.config.depth):
            weights = BlockWeights.of(model.block(index))
            path_B2 = None if path_PB2 is None else path_PB2[index]
            x_BLC = self.run_block(x_BLC, weights, shared_B6C, text_BTC, texts.is_real_BT, layout, dtype, path_B2)
        return F.linear(_modulate(x_BLC, 1 + scale_BC, shift_BC), model.head.weight, model.head.bias)

    def _pooled(self, text_BTE: Tensor, is_real_BT: Tensor) -> Float[Tensor, "B C"]:
        pool: CrossAttention = self.model.text_proj_for_sos.ca
        k, v = _text_heads(text_BTE, pool.mat_kv.weight, pool.v_bias, pool.heads, self.dtype)
        q_BN1D = pool.mat_q[0].to(self.dtype)[None, :, None].expand(len(text_BTE), -1, -1, -1)
        pooled_BC = attend(q_BN1D, k, v, pool.scale, is_real_BT.sum(-1, keepdim=True)).flatten(1)
        return _linear(pooled_BC, pool.proj.weight, pool.proj.bias, self.dtype).float()

    def _entries(self, pooled_BC: Tensor, inputs: Sequence[Tensor]) -> Float[Tensor, "B L C"]:
        model = self.model
        level_KC = model.lvl_embed.weight
        entries = [(pooled_BC + model.pos_start[0] + level_KC[0])[:, None]]
        for scale, input_BZhw in enumerate(inputs, start=1):
            tokens_BlZ = input_BZhw.flatten(2).transpose(1, 2)
            word_BlC = _linear(tokens_BlZ, model.word_embed.weight, model.word_embed.bias, self.dtype)
            entries.append(word_BlC.float() + level_KC[scale])
        return torch.cat(entries, dim=1)

    def _layout(self, num_scales: int, crop: Crop | None) -> Layout:
        """Built once."""
        if (num_scales, crop) not in self._layouts:
            model, grids = self.model, self.schedule.grids[:num_scales]
            rotations = [model.positions(self.schedule, s) for s in range(num_scales)]
            if crop is not None:
                rotations = [crop.of_tokens(s, grids[s], rotation) for s, rotation in enumerate(rotations)]
            counts = [len(rotation) for rotation in rotations]
            all_ends = np.cumsum(counts).tolist()
            first = max((end for end in all_ends if end <= self.masked_tokens), default=all_ends[0])
            seen = [end for end, count in zip(all_ends, counts, strict=True) if end <= first for _ in range(count)]
            self._layouts[num_scales, crop] = Layout(
                rotation_LD=torch.cat(rotations),
                seen_1l=torch.tensor([seen], device=model.device),
                ends=tuple(end for end in all_ends if end >= first),
            )
        return self._layouts[num_scales, crop]
