"""Recorded cases of the HART family: texts with padding in front of the scales, soft codes and the residual's head.

A case is forced by the codes that were used: mixed ones where it has them, else those of the recorded ids. The residual
runs at the recorded noise. Under FastVAR only cuts among tokens that are clear can be compared.
Axes: B images, l tokens of a scale, k tokens that ran, T text tokens, V codes, Z latent channels, C width, S steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from parity_common import (
    TOLERANCE,
    Case,
    Forced,
    ForcingSampler,
    Record,
    Result,
    Step,
    by_scale,
    filters_of,
    force,
    judge,
    lean,
    named_weights,
    policy_by_widths,
    recorded_ids,
    recorded_pixels,
    relative_error,
    sampler_of,
)
from torch import Tensor

from foveate.core.conditions import PlacedText
from foveate.core.protocols import RefineInput
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, KeyedSampler, ReferenceSampler, SmoothSampler
from foveate.engine.state import Request
from foveate.families.hart import ResidualRefiner, hart_guidance
from foveate.models.hart import HART
from foveate.policies.full import Full
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.vq import VQTokenizer
from foveate.weights.hart import infer_hart_config, load_hart
from foveate.weights.vq import infer_vq_config, load_vq

MIXED_TOLERANCE = 1e-3
"""Largest difference of a soft code: its small temperature magnifies rounding."""


class MixedTokenizer(VQTokenizer):
    """The tokenizer, for codes that are given as latents too."""

    def codes(self, symbols: Tensor) -> Tensor:
        """Latents as they are; else as the tokenizer reads symbols."""
        if symbols.is_floating_point() and symbols.shape[-1] == self.latent_channels:
            return symbols
        return super().codes(symbols)


@dataclass(kw_only=True, slots=True, eq=False)
class MixedSampler(ForcingSampler):
    """Answers with recorded soft codes; the case's own sampler says which ids it draws and how it mixes."""

    tokenizer: VQTokenizer
    mixed: Mapping[int, Float[Tensor, "B _l Z"]]

    def choose(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> list[Tensor]:
        """The recorded soft codes; near ties of the draw before them count as agreed."""
        recorded_Bl1, logits_Bl1V = self.recorded[scale], torch.stack(list(logits))
        before = self.inner.state()
        weights, drawn = self.inner.choose_with_draws(scale, grid, logits, kept, rule)
        drawn_Bl1 = torch.stack(list(drawn))
        is_agreed = torch.equal(drawn_Bl1, recorded_Bl1)
        if not is_agreed:
            self.inner.restore(before)
            leaning = list(lean(logits_Bl1V, drawn_Bl1, recorded_Bl1))
            again = self.inner.choose_with_draws(scale, grid, leaning, kept, rule)[1]
            is_agreed = torch.equal(torch.stack(list(again)), recorded_Bl1)
        off = self.tokenizer.codes(torch.stack(list(weights))) - self.mixed[scale]
        is_agreed = is_agreed and float(off.abs().max()) <= MIXED_TOLERANCE
        self.steps.append(Step(scale=scale, logits_BldV=logits_Bl1V, is_agreed=is_agreed))
        return list(self.mixed[scale])

    def choose_with_draws(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The recorded soft codes and the recorded ids."""
        return self.choose(scale, grid, logits, kept, rule), list(self.recorded[scale])


@dataclass(kw_only=True, slots=True, eq=False)
class RecordedRefiner:
    """The family's refiner at recorded noise; notes what it was conditioned on and what it added, image by image."""

    inner: ResidualRefiner
    noise_SnZ: Float[Tensor, "S n Z"]
    conditions: list[Float[Tensor, "l C"]] = field(default_factory=list)
    residuals: list[Float[Tensor, "l Z"]] = field(default_factory=list)

    def refine(self, image: RefineInput) -> Float[Tensor, "k Z"]:
        """The same at the noise of the next image."""
        tokens = image.grid[0] * image.grid[1]
        first = len(self.residuals) * tokens
        noise_SlZ = self.noise_SnZ[:, first : first + tokens]
        codes_lZ = self.inner.tokenizer.codes(image.symbols_kd)
        self.conditions.append(self.inner.transformer.residual_condition(image.cond_kC, codes_lZ))
        self.residuals.append(self.inner.residual(image, noise_SlZ))
        return self.residuals[-1]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HybridRun:
    """A forced run, and the refiner that took part in it, if any did."""

    forced: Forced
    refiner: RecordedRefiner | None
    spec: str | None

    def judged(self, name: str, case: Case, record: Record) -> Result:
        """Compares with a record."""
        result = judge(name, self.forced, record, (case.get("smallest_margins") or {}).get("token_cut"))
        if self.spec is not None and result.status != "fail":
            result = replace(result, reason="; ".join(filter(None, (self.spec, result.reason))))
        return result if self.refiner is None else with_residual(result, self.refiner, record)


def run(name: str, case: Case, record: Record) -> Result:
    """Runs one case."""
    return run_forced(case, record).judged(name, case, record)


def run_forced(case: Case, record: Record) -> HybridRun:
    """Runs one case with its recorded codes."""
    schedule = schedule_of(case)
    policy = policy_by_widths(case, schedule)
    model, tokenizer = build_networks(case)
    refiner = None
    if case.get("residual_diffusion"):
        noise_SnZ = torch.cat((record["diffusion.noise"][None], record["diffusion.step_noise"][:-1]))
        refiner = RecordedRefiner(
            inner=ResidualRefiner(transformer=model, tokenizer=tokenizer), noise_SnZ=noise_SnZ.float()
        )
    engine, request = Engine(model, tokenizer, refiner=refiner), build_request(case, record, schedule)
    recorded = by_scale(engine, request, policy or Full(), recorded_ids(record))
    sampler = forcing(case, request, record, tokenizer, recorded)
    wants_pixels = recorded_pixels(record) is not None
    done = force(engine, request, sampler, policy or Full(), wants_pixels=wants_pixels)
    return HybridRun(forced=done, refiner=refiner, spec=None if policy is None else policy.spec)


def schedule_of(case: Case) -> ScaleSchedule:
    """The grids of a case."""
    return ScaleSchedule.from_grids([(n, n) for n in case["model"]["patch_nums"]])


def forcing(
    case: Case, request: Request, record: Record, tokenizer: VQTokenizer, recorded: Mapping[int, Int[Tensor, "B _l 1"]]
) -> ForcingSampler:
    """The sampler that answers with what was recorded."""
    if not case.get("more_smooth"):
        return ForcingSampler(inner=request.sampler, recorded=recorded)
    mixed = {scale: record[f"step{i:02d}.mixed"].float() for i, scale in enumerate(recorded)}
    return MixedSampler(inner=request.sampler, recorded=recorded, tokenizer=tokenizer, mixed=mixed)


def with_residual(result: Result, refiner: RecordedRefiner, record: Record) -> Result:
    """The result, failed where the residual's head read or wrote something else."""
    pairs = {"condition": torch.cat(refiner.conditions), "residual": torch.cat(refiner.residuals)}
    errors = {name: relative_error(found, record[f"diffusion.{name}"]) for name, found in pairs.items()}
    broken = [f"{name} {error:.2e} is above {TOLERANCE:.0e}" for name, error in errors.items() if error > TOLERANCE]
    if broken:
        return replace(result, status="fail", reason="; ".join(filter(None, (result.reason, *broken))))
    said = "; ".join(f"{name} to {error:.1e}" for name, error in errors.items())
    return replace(result, reason="; ".join(filter(None, (result.reason, said))))


def build_networks(case: Case) -> tuple[HART, VQTokenizer]:
    """Model and tokenizer of a case, loaded as published checkpoints are."""
    state = named_weights(case["transformer_weights"], case["transformer_seed"])
    said = case["model"]
    model = HART(infer_hart_config(state, heads=said["heads"], text_tokens=said["context_token"]))
    load_hart(model, state)
    state = named_weights(case["vae_weights"], case["vae_seed"])
    autoencoder = Autoencoder(infer_vq_config(state))
    load_vq(autoencoder, state)
    return model.eval(), MixedTokenizer(autoencoder.eval(), refines_last=False)


def build_request(case: Case, record: Record, schedule: ScaleSchedule) -> Request:
    """What a case asked for."""
    num_scales, num_images = len(schedule), int(case["B"])
    filters = filters_of(case, num_scales)
    sampler = sampler_of(case, filters, num_images)
    if case.get("more_smooth"):
        assert isinstance(sampler, KeyedSampler | ReferenceSampler)
        sampler = SmoothSampler(
            inner=sampler, num_scales=num_scales, first=0, end=num_scales, is_after_draw=True, holds_last=True
        )
    texts = [
        PlacedText(tokens_TE=tokens_TE.float(), positions=tuple(positions_T.tolist()))
        for tokens_TE, positions_T in zip(record["context"], record["context_position_ids"], strict=True)
    ]
    tokens, width = record["context"].shape[1:]
    nothing = PlacedText.nothing(tokens, width, torch.device("cpu"))
    cfg = case["cfg"]
    return Request(
        schedule=schedule,
        guidance=hart_guidance((float(cfg),) * num_scales if isinstance(cfg, int | float) else tuple(cfg), (0, None)),
        temperatures=(1.0,) * num_scales,
        filters=filters,
        sampler=sampler,
        conditions=(*texts, *([nothing] * num_images)),
        num_images=num_images,
    )
