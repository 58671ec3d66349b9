"""Objects of the official VAR class: their weights, arguments and answers.

The official object holds its autoencoder in `vae_proxy`, so that alone is enough. Its schedule is fixed: `patch_nums`.
Axes: B images, (Y, X) pixels.
Source: the published code of VAR (arXiv 2404.02905), of which nothing is copied.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.adapters.adapter import Adapter, generator_of, seeded
from foveate.adapters.sharing import Follower, attribute, refuse_mixed, require_settings, share
from foveate.core.conditions import ClassLabel
from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, ReferenceSampler, Sampler, SmoothSampler
from foveate.engine.state import Request
from foveate.families.var import FAMILY
from foveate.models.var import VAR
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.vq import VQTokenizer
from foveate.weights.stored import State
from foveate.weights.var import infer_var_config, var_state
from foveate.weights.vq import infer_vq_config, vq_state


class OfficialVAR(Adapter):
    """A VAR object and the autoencoder that it holds."""

    reads = ("B", "label_B", "g_seed", "cfg", "top_k", "top_p", "more_smooth")

    def __init__(self, model: nn.Module) -> None:
        """Checks the object.

        Raises:
            FoveateError: It is not what the official code makes, or cannot be shared.
        """
        self.model = model
        self._transformer = Follower(_share_transformer)
        self._tokenizer = Follower(_share_tokenizer)
        self._networks()

    def _networks(self) -> tuple[VAR, VQTokenizer]:
        transformer = self._transformer.over(self.model)
        tokenizer = self._tokenizer.over(_autoencoder(self.model))
        config = tokenizer.autoencoder.config
        wanted, offered = FAMILY.symbols(transformer.config, config, 1)
        if wanted != offered:
            raise FoveateError(f"the object wants {wanted}, its autoencoder offers {offered}; they do not fit")
        return transformer, tokenizer

    def engine(self, arguments: Mapping[str, Any]) -> Engine:
        """Our networks over the object's weights."""
        transformer, tokenizer = self._networks()
        refuse_mixed(transformer)
        refuse_mixed(tokenizer.autoencoder)
        return Engine(transformer, tokenizer, obeys_autocast=True)

    def request(self, arguments: Mapping[str, Any], engine: Engine) -> Request:
        """Classes and settings; without a class every image gets a random one, as there."""
        num_images = int(arguments["B"])
        schedule = ScaleSchedule.from_grids(_grids(self.model), finest=_grids(self.model)[-1])
        num_scales = len(schedule)
        generator = seeded(self.model, arguments["g_seed"], engine.model.device)
        labels = self._labels(arguments["label_B"], num_images, generator)
        sampler: Sampler = ReferenceSampler(generator=generator)
        if arguments["more_smooth"]:
            sampler = SmoothSampler(
                inner=ReferenceSampler(generator=generator),
                num_scales=num_scales,
                first=0,
                end=num_scales,
                is_after_draw=FAMILY.smooths_after_draw,
            )
        rule = Filter(top_k=int(arguments["top_k"]), top_p=float(arguments["top_p"]))
        return Request(
            schedule=schedule,
            guidance=GuidanceSchedule.from_var(float(arguments["cfg"]), num_scales),
            temperatures=(1.0,) * num_scales,
            filters=(rule,) * num_scales,
            sampler=sampler,
            conditions=tuple(ClassLabel(index=label) for label in labels),
            num_images=num_images,
        )

    def _labels(self, label_B: int | Tensor | None, num_images: int, generator: torch.Generator) -> list[int]:
        """One class per image; a negative number stands for the class that means none."""
        if label_B is None:
            chances = attribute(self.model, "uniform_prob")
            label_B = torch.multinomial(chances, num_samples=num_images, replacement=True, generator=generator)
        if isinstance(label_B, int):
            return [label_B if label_B >= 0 else int(attribute(self.model, "num_classes"))] * num_images
        labels: list[int] = label_B.flatten().tolist()
        if len(labels) != num_images:
            raise FoveateError(f"label_B must hold one class per image, got {len(labels)} for B={num_images}")
        return labels

    def answer(self, pixels_B3YX: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B 3 Y X"]:
        """Images in [0, 1], float32."""
        return (pixels_B3YX + 1) / 2


def _grids(model: nn.Module) -> tuple[Grid, ...]:
    return _squares(attribute(model, "patch_nums"))


def _squares(sides: Iterable[int]) -> tuple[Grid, ...]:
    return tuple((int(n), int(n)) for n in sides)


def _autoencoder(model: nn.Module) -> nn.Module:
    """The autoencoder that decodes, if its quantiser is the one that the object looks codes up in."""
    found: list[nn.Module] = []
    for name in ("vae_proxy", "vae_quant_proxy"):
        proxy = attribute(model, name)
        if not isinstance(proxy, tuple) or len(proxy) != 1 or not isinstance(proxy[0], nn.Module):
            raise FoveateError(f"{type(model).__name__}.{name} must hold one module in a tuple")
        found.append(proxy[0])
    if attribute(found[0], "quantize") is not found[1]:
        raise FoveateError("vae_quant_proxy must hold the quantiser of vae_proxy; another one cannot be shared")
    require_settings(found[0], {"quantize.quant_resi_ratio": 0.5})
    grids, decoded = _grids(model), _squares(attribute(found[1], "v_patch_nums"))
    if grids != decoded:
        raise FoveateError(f"patch_nums of the object and of its autoencoder differ: {grids} and {decoded}")
    return found[0]


def _share_transformer(model: nn.Module, state: State) -> VAR:
    require_settings(model, {"head_nm.ln_wo_grad.eps": 1e-6})
    for name in ("num_classes", "uniform_prob"):
        attribute(model, name)
    generator_of(model)
    config = infer_var_config(state, _grids(model))
    return share(partial(VAR, config), var_state(state), "VAR transformer")


def _share_tokenizer(_owner: nn.Module, state: State) -> VQTokenizer:
    config = infer_vq_config(state)
    return VQTokenizer(share(partial(Autoencoder, config), vq_state(state), "VQ autoencoder"))
