"""Objects of the official Infinity class: their weights, arguments and answers.

The autoencoder comes with every call. Text comes as the official code encodes it: features of all prompts behind each
other, their lengths, and two numbers that follow from those.
Axes: B images, T text tokens, E text width, (Y, X) pixels.
Source: the published code of Infinity (arXiv 2412.04431), of which nothing is copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from foveate.adapters.adapter import Adapter, generator_of, seeded
from foveate.adapters.sharing import Follower, attribute, refuse_mixed, require_settings, share
from foveate.core.errors import FoveateError, UnsupportedError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, ReferenceSampler
from foveate.engine.state import Request
from foveate.families.infinity import FAMILY
from foveate.models.infinity import Infinity
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.bsq import BSQTokenizer
from foveate.weights.infinity import (
    autoencoder_state,
    infer_autoencoder_config,
    infer_infinity_config,
    transformer_tensors,
)
from foveate.weights.stored import State

_SETTINGS: dict[str, object] = {
    "use_bit_label": 1,
    "add_lvl_embeding_only_first_block": 1,
    "rope2d_each_sa_layer": 1,
    "rope2d_normalized_by_hw": 2,
    "norm_eps": 1e-6,
}
"""Settings of the official constructor that leave no trace in weights, as the published inference scripts have them."""


class OfficialInfinity(Adapter):
    """An Infinity object, and the autoencoder of the latest call."""

    reads = (
        "vae", "scale_schedule", "label_B_or_BLT", "B", "negative_label_B_or_BLT", "g_seed", "cfg_list", "tau_list",
        "top_k", "top_p", "cfg_insertion_layer", "vae_type", "ret_img", "trunk_scale", "gt_leak",
    )  # fmt: skip
    ignores = (
        "force_gt_Bhw", "cfg_sc", "returns_vemb", "ratio_Bl1", "gumbel", "norm_cfg", "cfg_exp_k", "softmax_merge_topk",
        "gt_ls_Bl", "inference_mode", "save_img_path", "sampling_per_bits",
    )  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        """Checks the object.

        Raises:
            FoveateError: It is not what the official code makes, or cannot be shared.
        """
        self.model = model
        self._transformer = Follower(_share_transformer)
        self._autoencoder = Follower(_share_autoencoder)
        self._transformer.over(model)

    @property
    def _patch(self) -> int:
        """Latents along a side of a token."""
        return 2 if attribute(self.model, "apply_spatial_patchify") else 1

    def engine(self, arguments: Mapping[str, Any]) -> Engine:
        """Our networks over the weights of the object and of the autoencoder `vae`."""
        vae = arguments["vae"]
        if not isinstance(vae, nn.Module):
            raise FoveateError(f"vae must be the official autoencoder, got {type(vae).__name__}")
        transformer, autoencoder = self._transformer.over(self.model), self._autoencoder.over(vae)
        wanted, offered = FAMILY.symbols(transformer.config, autoencoder.config, self._patch)
        if wanted != offered:
            raise FoveateError(f"the object wants {wanted}, vae offers {offered}; they do not fit")
        refuse_mixed(transformer)
        refuse_mixed(autoencoder)
        return Engine(transformer, BSQTokenizer(autoencoder, self._patch), obeys_autocast=True)

    def request(self, arguments: Mapping[str, Any], engine: Engine) -> Request:
        """Text, grids and settings."""
        schedule = ScaleSchedule.from_grids(_grids(arguments["scale_schedule"]), patch=self._patch)
        num_scales, num_images = len(schedule), int(arguments["B"])
        _refuse_unsupported(arguments, num_scales)
        texts = _texts("label_B_or_BLT", arguments["label_B_or_BLT"], num_images)
        negatives = arguments["negative_label_B_or_BLT"]
        if negatives:
            texts += _texts("negative_label_B_or_BLT", negatives, num_images)
        # Zero means the object's own setting, as there.
        top_k, top_p = (arguments[name] or attribute(self.model, name) for name in ("top_k", "top_p"))
        return Request(
            schedule=schedule,
            guidance=GuidanceSchedule.from_infinity(
                _per_scale("cfg_list", arguments["cfg_list"], num_scales),
                num_scales,
                arguments["cfg_insertion_layer"],
                engine.model.shape.num_blocks,
            ),
            temperatures=_per_scale("tau_list", arguments["tau_list"], num_scales),
            filters=(Filter(top_k=int(top_k), top_p=float(top_p)),) * num_scales,
            sampler=ReferenceSampler(generator=seeded(self.model, arguments["g_seed"], engine.model.device)),
            conditions=texts,
            num_images=num_images,
        )

    def answer(
        self, pixels_B3YX: Float[Tensor, "B 3 Y X"]
    ) -> tuple[list[Tensor], list[Tensor], UInt8[Tensor, "B Y X 3"]]:
        """Two lists, empty as in the official code, and images as bytes in the order blue, green, red; truncated."""
        bytes_B3YX = ((pixels_B3YX + 1) / 2).mul(255).to(torch.uint8)
        return [], [], bytes_B3YX.permute(0, 2, 3, 1).flip(3)


def _refuse_unsupported(arguments: Mapping[str, Any], num_scales: int) -> None:
    refused = {
        "ret_img": (not arguments["ret_img"], "no images would be returned; pass True"),
        "vae_type": (not arguments["vae_type"], "only bit codebooks are supported; pass the bits of a latent, say 32"),
        "gt_leak": (arguments["gt_leak"] > 0, "given codes cannot be mixed with sampled codes; pass 0"),
        "trunk_scale": (arguments["trunk_scale"] < num_scales, "use the policy skip-scales to leave scales out"),
    }
    for name, (is_refused, remedy) in refused.items():
        if is_refused:
            raise UnsupportedError(f"{name}={arguments[name]} is not supported: {remedy}")
    for item in arguments["cfg_insertion_layer"]:
        if item > 0:
            raise UnsupportedError(f"cfg_insertion_layer={item} is not supported; give 0 or negative numbers")


def _grids(scale_schedule: Sequence[tuple[int, int, int]] | None) -> list[Grid]:
    if not scale_schedule:
        raise FoveateError("scale_schedule must list (1, height, width) of every scale, got none")
    if any(frames != 1 for frames, _, _ in scale_schedule):
        raise UnsupportedError("scale_schedule must have 1 in front of every grid; several frames are not supported")
    return [(int(height), int(width)) for _, height, width in scale_schedule]


def _texts(name: str, packed: Sequence[Any] | None, num_images: int) -> tuple[Float[Tensor, "_T E"], ...]:
    """Features of each prompt."""
    if packed is None:
        raise FoveateError(f"{name} must hold features and lengths of the prompts, got None")
    features_TE, lengths = packed[0], [int(length) for length in packed[1]]
    if len(lengths) != num_images or sum(lengths) != features_TE.shape[0]:
        raise FoveateError(
            f"{name} must hold {num_images} prompts (B), got {len(lengths)} lengths for {features_TE.shape[0]} tokens"
        )
    return tuple(features_TE.split(lengths))


def _per_scale(name: str, values: Sequence[float], num_scales: int) -> tuple[float, ...]:
    if len(values) < num_scales:
        raise FoveateError(f"{name} needs {num_scales} values, one per scale, got {len(values)}")
    return tuple(float(value) for value in values[:num_scales])


def _share_transformer(model: nn.Module, state: State) -> Infinity:
    require_settings(model, _SETTINGS)
    for name in ("apply_spatial_patchify", "top_k", "top_p"):
        attribute(model, name)
    generator_of(model)
    blocks = attribute(model, "unregistered_blocks")
    # Without fused norms the official blocks forget which scale they are at; see InfinityConfig.
    restarts = any(attribute(block, "fused_norm_func") is None for block in blocks)
    config = replace(infer_infinity_config(state), restarts_positions=restarts)
    return share(partial(Infinity, config), transformer_tensors(state, config), "Infinity transformer")


def _share_autoencoder(vae: nn.Module, state: State) -> Autoencoder:
    require_settings(vae, {"quantizer.z_interplote_up": "trilinear"})
    config = infer_autoencoder_config(state)
    return share(partial(Autoencoder, config), autoencoder_state(state), "autoencoder")
