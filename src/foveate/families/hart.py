"""The HART family (arXiv 2410.10812): codes and a continuous residual, a text in front of the scales, one square size.

Source of the published entry: model card and demo of HART (code MIT; the weights have a licence of their own).
Axes: k tokens that ran, l tokens of the scale, u tokens of the unconditional branch, a the others, n tokens of both
branches, C width, Z latent channels, S steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.conditioning.qwen2 import QWEN2_HART, QwenText, RandomPlacedText
from foveate.conditioning.text import Conditioner
from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.protocols import RefineInput, Refiner, ScaleTokenizer
from foveate.core.schedule import Grid
from foveate.core.transfer import to_device
from foveate.engine.sample import keyed_uniform
from foveate.families.family import Conditioning, Family, Network, TextEncoderFiles, TextShape
from foveate.families.spec import Defaults, ModelSpec, Published, WeightSource, budget_of
from foveate.families.vq import VQ, codes, quantiser
from foveate.models.hart import HART, HARTConfig
from foveate.models.residual_diffusion import NUM_STEPS
from foveate.tokenizers.autoencoder import VQ_F16, Autoencoder, AutoencoderConfig
from foveate.tokenizers.vq import VQTokenizer
from foveate.weights.hart import hart_state, infer_hart_config, load_hart
from foveate.weights.stored import State

DIFFUSION_STREAM = 2
"""Philox stream of the residual's noise (`engine.sample`)."""

_GRIDS: tuple[Grid, ...] = tuple((n, n) for n in (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResidualRefiner:
    """Adds what the codes of the last scale leave over, by the diffusion head, to the tokens that ran."""

    transformer: HART
    tokenizer: VQTokenizer

    def refine(self, image: RefineInput) -> Float[Tensor, "k Z"]:
        """The residual of each token, by noise that is keyed by the image's seed or drawn in the published order."""
        noise_SlZ = to_device(self.noise(image), image.cond_kC.device)
        return self.residual(image, noise_SlZ if image.index_k is None else noise_SlZ[:, image.index_k])

    def residual(self, image: RefineInput, noise_SkZ: Float[Tensor, "S k Z"]) -> Float[Tensor, "k Z"]:
        """The same with noise that is given: the start, then one for each step but the last.

        Tokens that the unconditional branch did not run are refined without guidance.
        """
        codes_kZ = self.tokenizer.codes(image.symbols_kd)
        cond_kC = self.transformer.residual_condition(image.cond_kC, codes_kZ)
        diffuse = self.transformer.diffloss
        if image.uncond_uC is None or image.weight == 1.0:
            return diffuse(cond_kC, None, 1.0, noise_SkZ)
        index_u = image.uncond_index_u
        if index_u is None:
            uncond_kC = self.transformer.residual_condition(image.uncond_uC, codes_kZ)
            return diffuse(cond_kC, uncond_kC, image.weight, noise_SkZ)
        uncond_uC = self.transformer.residual_condition(image.uncond_uC, codes_kZ[index_u])
        residual_kZ = torch.empty_like(codes_kZ, dtype=torch.float32)
        residual_kZ[index_u] = diffuse(cond_kC[index_u], uncond_uC, image.weight, noise_SkZ[:, index_u])
        # A stable sort and no search for what is left: the host does not wait for a device.
        is_guided_k = torch.zeros(len(cond_kC), dtype=torch.uint8, device=cond_kC.device).index_fill(0, index_u, 1)
        alone_a = is_guided_k.argsort(stable=True)[: len(cond_kC) - len(index_u)]
        if len(alone_a):
            residual_kZ[alone_a] = diffuse(cond_kC[alone_a], None, 1.0, noise_SkZ[:, alone_a])
        return residual_kZ

    def noise(self, image: RefineInput) -> Float[Tensor, "S l Z"]:
        """Normal draws of the whole grid, on the host or where the generator is."""
        shape = (NUM_STEPS, *image.grid, self.tokenizer.latent_channels)
        if image.seed is not None:
            u = keyed_uniform(image.seed, image.scale, shape, DIFFUSION_STREAM)
            return torch.special.ndtri(torch.from_numpy(u).double()).float().flatten(1, 2)
        if image.generator is None:
            raise FoveateError("the residual of HART needs noise: give the sampler a seed or a generator")
        return _published_noise(image.generator, shape[1] * shape[2], shape[-1])


def _published_noise(generator: torch.Generator, tokens: int, channels: int) -> Float[Tensor, "S l Z"]:
    """Noise in the published shapes: a start, and for each step that of both branches, of which one is unused."""
    device = generator.device
    start_lZ = torch.randn(tokens, channels, generator=generator, device=device)
    pairs_SnZ = [torch.randn(2 * tokens, channels, generator=generator, device=device) for _ in range(NUM_STEPS)]
    return torch.stack([start_lZ, *(pair_nZ[:tokens] for pair_nZ in pairs_SnZ[:-1])])


def hart_guidance(cfg: tuple[float, ...], window: tuple[int, int | None]) -> GuidanceSchedule:
    """Guidance that grows from nothing over the scales; the last one is guided as the one before it."""
    weights = GuidanceSchedule.from_var(cfg, len(cfg), *window).weights
    return GuidanceSchedule(weights=(*weights[:-1], weights[max(len(weights) - 2, 0)]))


def _tokenizer(autoencoder: Autoencoder, _patch: int) -> ScaleTokenizer:
    return VQTokenizer(autoencoder, refines_last=False)


def _refiner(transformer: HART, tokenizer: VQTokenizer) -> Refiner:
    return ResidualRefiner(transformer=transformer, tokenizer=tokenizer)


def _infer(state: State, facts: Mapping[str, Any]) -> HARTConfig:
    heads, tokens = facts.get("num_heads"), facts.get("context_token", 300)
    if not isinstance(heads, int) or not isinstance(tokens, int):
        raise CheckpointError(
            "HART weights do not say how many heads they have; put the config.json with `num_heads` beside them"
        )
    return infer_hart_config(state, heads=heads, text_tokens=tokens)


def _read_qwen(files: TextEncoderFiles) -> Conditioner:
    if len(files.places) != 1:
        raise FoveateError(f"{files.model} has one text encoder, got {len(files.places)}")
    return QwenText.from_pretrained(
        files.places[0],
        max_tokens=files.config.text_tokens,
        dtype=files.dtype,
        device=files.device,
        local_files_only=files.local_files_only,
    )


def _random_text(config: HARTConfig, device: torch.device) -> Conditioner:
    return RandomPlacedText(width=config.text_width, max_tokens=config.text_tokens, device=device)


def _text(config: HARTConfig) -> TextShape:
    return TextShape(tokens=config.text_tokens, width=config.text_width)


def _sizes(_transformer: HARTConfig, autoencoder: AutoencoderConfig) -> dict[str, Any]:
    return {"grids": _GRIDS, "budgets": (budget_of(_GRIDS, autoencoder.stride),)}


def _shape(config: HARTConfig) -> HARTConfig:
    return replace(config, ff_width=config.hidden)


_QWEN2 = Conditioning(name="qwen2-vl", parameters=1_543_714_304, read=_read_qwen)


def _published() -> tuple[Published, ...]:
    autoencoder = VQ_F16
    repo = "mit-han-lab/hart-0.7b-1024px"
    return (
        Published(
            spec=ModelSpec(
                name="hart-0.7b-1024px",
                family=FAMILY.name,
                # The width follows from the parameter count, and heads 64 wide are likely: the files say both.
                transformer=HARTConfig(depth=24, width=1536, heads=24),
                autoencoder=autoencoder,
                conditioner=_QWEN2.name,
                budgets=(budget_of(_GRIDS, autoencoder.stride),),
                ratios=("1:1",),
                grids=_GRIDS,
                defaults=Defaults(
                    guidance_scale=4.5, temperature=1.0, top_k=(600,) * 7 + (300,), top_p=0.0, more_smooth=True
                ),
            ),
            transformer=WeightSource(repo=repo, path="llm/ema_model.bin"),
            autoencoder=WeightSource(repo=repo, path="tokenizer"),
            text_encoders=(QWEN2_HART,),
            licence="see the model card (not the MIT of the code)",
            aliases=("hart-0.7b",),
            facts="llm/config.json",
        ),
    )


FAMILY = Family(
    name="hart",
    transformer=Network(
        kind="HART",
        config=HARTConfig,
        build=HART,
        load=load_hart,
        infer=_infer,
        plain=hart_state,
        unseen={"num_heads": 1},
    ),
    autoencoder=VQ,
    tokenizer=_tokenizer,
    refiner=_refiner,
    symbols=codes,
    guidance=hart_guidance,
    conditionings=(_QWEN2,),
    random_conditioner=_random_text,
    sizes=_sizes,
    published=_published,
    shape=_shape,
    text=_text,
    has_negatives=True,
    smooths_after_draw=True,
    holds_last=True,
    null_prompt="",
    codebook=quantiser,
)
