"""Recorded cases of the Infinity family, under FastVAR too.

The reference has two code paths with different rotary positions (`InfinityConfig.restarts_positions`). Older cases do
not say which one made them: both are tried, and the result says which one fits. FastVAR's code has only the one whose
positions continue over the scales.
Axes: B images, l tokens of a scale, d bits of a token.
"""

import math
from dataclasses import replace

import torch.nn.functional as F
from jaxtyping import Int
from parity_common import (
    Case,
    Record,
    Result,
    compare,
    filters_of,
    named_weights,
    num_steps,
    per_scale,
    policy_by_widths,
    sampler_of,
)
from torch import Tensor

from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import TEMPLATES, ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.state import Request
from foveate.models.infinity import Infinity
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.bsq import BSQTokenizer
from foveate.weights.infinity import (
    infer_autoencoder_config,
    infer_infinity_config,
    load_autoencoder,
    load_transformer,
)


def run(name: str, case: Case, record: Record) -> Result:
    """Runs one case on the path of the reference that it names, or else on the one that fits it better."""
    policy = policy_by_widths(case, build_schedule(case))
    said = case.get("rotary_positions") or ("continuing" if policy else None)
    paths = (False, True) if said is None else (said != "continuing",)
    tried = [run_on_path(name, case, record, restarts_positions=flag) for flag in paths]
    return min(tried, key=lambda result: math.inf if result.max_logit_error is None else result.max_logit_error)


def run_on_path(name: str, case: Case, record: Record, *, restarts_positions: bool) -> Result:
    """Runs one case on one of the reference's two paths."""
    schedule = build_schedule(case)
    engine = build_engine(case, schedule.patch, restarts_positions=restarts_positions)
    request = build_request(case, record, schedule, engine.model.shape.num_blocks)
    symbols = recorded_symbols(record, schedule.patch)
    policy = policy_by_widths(case, schedule)
    result = compare(name, engine, request, record, symbols, policy, case.get("smallest_margins"))
    path = (
        "restart at every scale, as in its path without fused norms"
        if restarts_positions
        else "continue over the scales"
    )
    notes = [f"the reference's rotary positions {path}", *([policy.spec] if policy else []), result.reason]
    return result if result.status == "fail" else replace(result, reason="; ".join(filter(None, notes)))


def build_schedule(case: Case) -> ScaleSchedule:
    """The grids of a case; the finest grid is that of the template that has the last grid at the same scale."""
    grids = tuple((int(grid[-2]), int(grid[-1])) for grid in case["schedule"])
    last = len(grids) - 1
    finest = next((t[-1] for t in TEMPLATES.values() if len(t) > last and t[last] == grids[last]), None)
    return ScaleSchedule.from_grids(grids, finest=finest, patch=2 if case["model"].get("patchify") else 1)


def build_engine(case: Case, patch: int, *, restarts_positions: bool) -> Engine:
    """Model and tokenizer of a case, loaded as published checkpoints are."""
    state = named_weights(case["transformer_weights"], case["transformer_seed"])
    model = Infinity(replace(infer_infinity_config(state), restarts_positions=restarts_positions))
    load_transformer(model, state)
    state = named_weights(case["vae_weights"], case["vae_seed"])
    autoencoder = Autoencoder(infer_autoencoder_config(state))
    load_autoencoder(autoencoder, state)
    return Engine(model, BSQTokenizer(autoencoder, patch=patch))


def build_request(case: Case, record: Record, schedule: ScaleSchedule, num_blocks: int) -> Request:
    """What a case asked for."""
    num_scales, num_images = len(schedule), len(case["lens"])
    filters = filters_of(case, num_scales)
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule.from_infinity(case["cfg"], num_scales, (case.get("insertion", 0),), num_blocks),
        temperatures=per_scale(case["tau"], num_scales),
        filters=filters,
        sampler=sampler_of(case, filters, num_images),
        conditions=tuple(record["text_features"].float().split(case["lens"])),
        num_images=num_images,
    )


def recorded_symbols(record: Record, patch: int) -> tuple[Int[Tensor, "B l d"], ...]:
    """Recorded bits per token, of the scales that ran; 2x2 latents side by side where a token holds them."""
    symbols = []
    for i in range(num_steps(record)):
        bits_Bdhw = record[f"step{i:02d}.bits"].squeeze(1).permute(0, 3, 1, 2).long()
        bits_Bdhw = F.pixel_unshuffle(bits_Bdhw, patch) if patch > 1 else bits_Bdhw
        symbols.append(bits_Bdhw.flatten(2).transpose(1, 2))
    return tuple(symbols)
