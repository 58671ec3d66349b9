"""The published models by their friendly names: shapes, which files belong together and where they are.

The pairing is strict: a transformer draws noise with another autoencoder, also where the shapes agree.
Source: the model cards and inference scripts of Infinity (MIT), VAR (MIT) and Switti (Apache-2.0).
"""

from dataclasses import dataclass
from typing import Any

from foveate.core.schedule import Grid
from foveate.families.spec import Defaults, ModelSpec, budget_of
from foveate.models.infinity import InfinityConfig
from foveate.models.switti import SwittiConfig
from foveate.models.var import GRIDS_256, GRIDS_512, VARConfig
from foveate.tokenizers.autoencoder import AutoencoderConfig
from foveate.tokenizers.vq_autoencoder import VQAutoencoderConfig

GRIDS_1024: tuple[Grid, ...] = tuple((n, n) for n in (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))
"""Switti's schedule of 1,024 pixels."""

_F16, _F8 = (1, 2, 4, 4, 4), (1, 2, 4, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """A file or folder of weights in a hub repository."""

    repo: str
    path: str

    @property
    def is_folder(self) -> bool:
        """Whether shards and their index lie in a folder."""
        return "." not in self.path.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A published model.

    Attributes:
        spec: Its shapes and defaults.
        transformer: Where its weights are.
        autoencoder: Where those of the autoencoder it was trained with are.
        text_encoders: Hub repositories of its text encoders.
        licence: Of the weights, as the model card states it.
        revision: Commit of the transformer's repository at which the files are known; None where nobody has noted one,
            and then loading from the hub warns (`weights_unpinned`).
    """

    spec: ModelSpec
    transformer: WeightSource
    autoencoder: WeightSource
    text_encoders: tuple[str, ...]
    licence: str
    revision: str | None = None


def _infinity(
    name: str,
    files: tuple[str, str],
    latent: int,
    multipliers: tuple[int, ...],
    budget: str,
    shape: dict[str, Any],
    temperature: float = 0.5,
    guidance_scale: float = 4.0,
) -> Published:
    """An Infinity model; a token of the f8 autoencoder holds 2x2 latents."""
    patch = 2 if multipliers == _F8 else 1
    return Published(
        spec=ModelSpec(
            name=name,
            transformer=InfinityConfig(**shape, bits=latent * patch**2, text_width=2048, pool_heads=16),
            autoencoder=AutoencoderConfig(latent_channels=latent, base_channels=128, channel_multipliers=multipliers),
            patch=patch,
            conditioner="t5-xl",
            budgets=(budget,),
            defaults=Defaults(guidance_scale=guidance_scale, temperature=temperature, top_k=900, top_p=0.97),
        ),
        transformer=WeightSource(repo="FoundationVision/Infinity", path=files[0]),
        autoencoder=WeightSource(repo="FoundationVision/Infinity", path=files[1]),
        text_encoders=("google/flan-t5-xl",),
        licence="MIT",
    )


def _var(name: str, depth: int, grids: tuple[Grid, ...] = GRIDS_256, *, shared_aln: bool = False) -> Published:
    """A VAR model; width and heads follow from the depth."""
    autoencoder = VQAutoencoderConfig()
    return Published(
        spec=ModelSpec(
            name=name,
            family="var",
            transformer=VARConfig(depth=depth, width=64 * depth, heads=depth, grids=grids, shared_aln=shared_aln),
            autoencoder=autoencoder,
            conditioner="imagenet",
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


def _switti(name: str, repo: str, grids: tuple[Grid, ...], *, use_ar: bool) -> Published:
    """A Switti model; all of them have the same shape."""
    autoencoder = VQAutoencoderConfig()
    # The model card of the large ones guides up to scale 11 and samples the three scales behind it almost greedily.
    is_large = grids == GRIDS_1024
    temperatures = (1.0,) * 11 + (0.1,) * 3
    shape = SwittiConfig(
        depth=30,
        width=1920,
        heads=30,
        codebook_size=autoencoder.codebook_size,
        latent_channels=autoencoder.latent_channels,
        num_levels=len(grids),
        use_ar=use_ar,
    )
    return Published(
        spec=ModelSpec(
            name=name,
            family="switti",
            transformer=shape,
            autoencoder=autoencoder,
            conditioner="clip-pair",
            budgets=(budget_of(grids, autoencoder.stride),),
            ratios=("1:1",),
            grids=grids,
            defaults=Defaults(
                guidance_scale=6.0,
                temperature=temperatures if is_large else 1.0,
                top_k=400,
                top_p=0.95,
                guidance_window=(0, 11) if is_large else (0, None),
                more_smooth=True,
                smooth_start=2,
            ),
        ),
        transformer=WeightSource(repo=repo, path=""),
        autoencoder=WeightSource(repo="yresearch/VQVAE-Switti", path=""),
        text_encoders=("openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
        licence="Apache-2.0",
    )


_D32 = {"depth": 32, "width": 2048, "heads": 16, "chunks": 8}
_D40 = {"depth": 40, "width": 3584, "heads": 28, "chunks": 8}
_PATCHIFY = "infinity_vae_d56_f8_14_patchify.pth"

PUBLISHED: dict[str, Published] = {
    entry.spec.name: entry
    for entry in (
        _infinity(
            "infinity-125m",
            ("infinity_125M_256x256.pth", "infinity_vae_d16.pth"),
            16, _F16, "0.06M",
            {"depth": 12, "width": 768, "heads": 8, "chunks": 4},
        ),
        _infinity("infinity-2b", ("infinity_2b_reg.pth", "infinity_vae_d32reg.pth"), 32, _F16, "1M", _D32),
        _infinity("infinity-8b", ("infinity_8b_weights", _PATCHIFY), 14, _F8, "1M", _D40, 1.0, 3.0),
        _infinity("infinity-8b-512", ("infinity_8b_512x512_weights", _PATCHIFY), 14, _F8, "0.25M", _D40, 1.0, 3.0),
        _var("var-d16", 16),
        _var("var-d20", 20),
        _var("var-d24", 24),
        _var("var-d30", 30),
        _var("var-d36-512", 36, GRIDS_512, shared_aln=True),
        _switti("switti-512", "yresearch/Switti", GRIDS_512, use_ar=False),
        _switti("switti-512-ar", "yresearch/Switti-AR", GRIDS_512, use_ar=True),
        _switti("switti-1024", "yresearch/Switti-1024", GRIDS_1024, use_ar=False),
        _switti("switti-1024-ar", "yresearch/Switti-1024-AR", GRIDS_1024, use_ar=True),
    )
}  # fmt: skip
"""Every published model that has a name here."""
