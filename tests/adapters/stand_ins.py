"""Objects that look like those of the official code: its attribute, argument and weight names over toys of ours.

They cannot draw: what their method returns says that it was the official one.
"""

import re

import torch
from torch import Tensor, nn

from tests.toys import Toy

OFFICIAL = "drawn by the official code"


class Node(nn.Module):
    """A part of an object; its children come from the names of the weights."""


def plant(root: nn.Module, weights: dict[str, Tensor]) -> None:
    """Adds copies of weights under names with dots."""
    for key, tensor in weights.items():
        *path, leaf = key.split(".")
        node = root
        for name in path:
            if name not in node._modules:
                node.add_module(name, Node())
            node = node._modules[name]
        node.register_parameter(leaf, nn.Parameter(tensor.clone()))


class OfficialVQ(nn.Module):
    """The autoencoder of a VAR object."""

    def __init__(self, subject: Toy) -> None:
        super().__init__()
        plant(self, subject.tokenizer.autoencoder.state_dict())
        sides = tuple(h for h, _ in subject.schedule.grids)
        self.quantize.quant_resi_ratio = 0.5
        self.quantize.v_patch_nums = sides
        self.quantize.register_buffer("ema_vocab_hit_SV", torch.zeros(len(sides), 48))


class OfficialVAR(nn.Module):
    """A VAR object."""

    def __init__(self, subject: Toy) -> None:
        super().__init__()
        plant(self, subject.model.state_dict())
        for block in self.blocks.children():
            block.attn.register_buffer("zero_k_bias", torch.zeros(64))
        self.register_buffer("lvl_1L", torch.zeros(1, 66, dtype=torch.long))
        self.register_buffer("attn_bias_for_masking", torch.zeros(1, 1, 66, 66))
        self.head_nm.ln_wo_grad = nn.LayerNorm(64, eps=1e-6, elementwise_affine=False)
        vae = OfficialVQ(subject)
        self.vae_proxy, self.vae_quant_proxy = (vae,), (vae.quantize,)
        self.patch_nums = vae.quantize.v_patch_nums
        self.num_classes = 10
        self.uniform_prob = torch.full((1, 10), 0.1)
        self.rng = torch.Generator()

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False):
        return OFFICIAL


class OfficialAutoencoder(nn.Module):
    """The autoencoder of an Infinity object; convolutions and norms sit in wrappers."""

    def __init__(self, subject: Toy) -> None:
        super().__init__()
        state = subject.tokenizer.autoencoder.state_dict()
        plant(self, {re.sub(r"((conv|norm|nin)\w*)\.(weight|bias)$", _wrap, key): t for key, t in state.items()})
        self.quantizer = Node()
        self.quantizer.z_interplote_up = "trilinear"
        self.quantizer.register_buffer("mask", torch.arange(8))


def _wrap(match: re.Match[str]) -> str:
    wrapper = "norm" if match[2] == "norm" else "conv"
    return f"{match[1]}.{wrapper}.{match[3]}"


class OfficialInfinity(nn.Module):
    """An Infinity object; `chunks` of 1 names blocks as the official code does then, flash turns the gains."""

    def __init__(self, subject: Toy, *, chunks: int = 5, is_flash: bool = False, is_fused: bool = True) -> None:
        super().__init__()
        size = 5 // chunks

        def rename(match: re.Match[str]) -> str:
            index = int(match[1])
            return f"block_chunks.{index // size}.module.{index % size}." if chunks > 1 else f"blocks.{index}."

        weights = {}
        for key, tensor in subject.model.state_dict().items():
            is_turned = is_flash and key.endswith("scale_mul_1H11")
            name = re.sub(r"^block_chunks\.0\.module\.(\d+)\.", rename, key)
            weights[name] = tensor.transpose(1, 2) if is_turned else tensor
        plant(self, weights)
        if chunks > 1:
            self.unregistered_blocks = [b for chunk in self.block_chunks.children() for b in chunk.module.children()]
        else:
            self.unregistered_blocks = list(self.blocks.children())
        for block in self.unregistered_blocks:
            block.fused_norm_func = torch.nn.functional.layer_norm if is_fused else None
            block.sa.register_buffer("zero_k_bias", torch.zeros(64))
        self.use_bit_label = self.rope2d_each_sa_layer = self.add_lvl_embeding_only_first_block = 1
        self.rope2d_normalized_by_hw = 2
        self.norm_eps = 1e-6
        self.apply_spatial_patchify = int(subject.schedule.patch == 2)
        self.top_k = self.top_p = 0
        self.rng = torch.Generator()

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, vae=None, scale_schedule=None, label_B_or_BLT=None, B=1, negative_label_B_or_BLT=None,
        force_gt_Bhw=None, g_seed=None, cfg_list=(), tau_list=(), cfg_sc=3, top_k=0, top_p=0.0, returns_vemb=0,
        ratio_Bl1=None, gumbel=0, norm_cfg=False, cfg_exp_k=0.0, cfg_insertion_layer=(-5,), vae_type=0,
        softmax_merge_topk=-1, ret_img=False, trunk_scale=1000, gt_leak=0, gt_ls_Bl=None, inference_mode=False,
        save_img_path=None, sampling_per_bits=1, newer_than_we_are=0,
    ):  # fmt: skip
        return OFFICIAL
