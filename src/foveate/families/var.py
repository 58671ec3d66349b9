"""The VAR family (arXiv 2404.02905): a codebook, ImageNet classes, one square size.

Source of the published entries: the model card of VAR (MIT).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from foveate.conditioning.text import ClassNames, Conditioner
from foveate.core.schedule import Grid
from foveate.families.family import Conditioning, Family, Network, TextEncoderFiles
from foveate.families.spec import Defaults, ModelSpec, Published, WeightSource, budget_of
from foveate.families.vq import VQ, codes, linear_guidance, quantiser, vq_tokenizer
from foveate.models.var import GRIDS_256, GRIDS_512, VAR, VARConfig
from foveate.tokenizers.autoencoder import VQ_F16, AutoencoderConfig
from foveate.weights.stored import State
from foveate.weights.var import infer_var_config, load_var, var_state


def _infer(state: State, _facts: Mapping[str, Any]) -> VARConfig:
    return infer_var_config(state)


def _class_names(config: VARConfig, _device: torch.device) -> Conditioner:
    return ClassNames(num_classes=config.num_classes)


def _read_classes(files: TextEncoderFiles) -> Conditioner:
    return _class_names(files.config, files.device)


def _sizes(transformer: VARConfig, autoencoder: AutoencoderConfig) -> dict[str, Any]:
    return {"grids": transformer.grids, "budgets": (budget_of(transformer.grids, autoencoder.stride),)}


def _shape(config: VARConfig) -> VARConfig:
    return replace(config, ff_width=config.hidden)


_IMAGENET = Conditioning(name="imagenet", read=_read_classes, names_classes=True)


def _entry(depth: int, suffix: str = "", grids: tuple[Grid, ...] = GRIDS_256, *, shared_aln: bool = False) -> Published:
    """A published model; width and heads follow from the depth."""
    autoencoder = VQ_F16
    return Published(
        spec=ModelSpec(
            name=f"var-d{depth}{suffix}",
            family=FAMILY.name,
            transformer=VARConfig(depth=depth, width=64 * depth, heads=depth, grids=grids, shared_aln=shared_aln),
            autoencoder=autoencoder,
            conditioner=_IMAGENET.name,
            budgets=(budget_of(grids, autoencoder.stride),),
            ratios=("1:1",),
            grids=grids,
            defaults=Defaults(guidance_scale=4.0, temperature=1.0, top_k=900, top_p=0.95),
        ),
        transformer=WeightSource(repo="FoundationVision/var", path=f"var_d{depth}.pth"),
        autoencoder=WeightSource(repo="FoundationVision/var", path="vae_ch160v4096z32.pth"),
        text_encoders=(),
        licence="MIT",
    )


def _published() -> tuple[Published, ...]:
    return (*(_entry(depth) for depth in (16, 20, 24, 30)), _entry(36, "-512", GRIDS_512, shared_aln=True))


FAMILY = Family(
    name="var",
    transformer=Network(kind="VAR", config=VARConfig, build=VAR, load=load_var, infer=_infer, plain=var_state),
    autoencoder=VQ,
    tokenizer=vq_tokenizer,
    symbols=codes,
    guidance=linear_guidance,
    conditionings=(_IMAGENET,),
    random_conditioner=_class_names,
    sizes=_sizes,
    published=_published,
    shape=_shape,
    has_negatives=False,
    smooths_after_draw=True,
    codebook=quantiser,
    adapter="foveate.adapters.var:OfficialVAR",
)
