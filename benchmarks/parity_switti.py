"""Recorded cases of the Switti family: prompts as features with a mask, guidance in a window of scales."""

from parity_common import Case, Record, Result, compare, filters_of, named_weights, recorded_ids, sampler_of

from foveate.core.conditions import PooledText
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.state import Request
from foveate.models.switti import Switti
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.vq import VQTokenizer
from foveate.weights.switti import infer_switti_config, load_switti
from foveate.weights.vq import infer_vq_config, load_vq


def run(name: str, case: Case, record: Record) -> Result:
    """Runs one case."""
    schedule = ScaleSchedule.from_grids([(n, n) for n in case["model"]["patch_nums"]])
    request = build_request(case, record, schedule)
    return compare(name, build_engine(case), request, record, recorded_ids(record))


def build_engine(case: Case) -> Engine:
    """Model and tokenizer of a case, loaded as published checkpoints are."""
    state = named_weights(case["transformer_weights"], case["transformer_seed"])
    model = Switti(infer_switti_config(state, use_ar=case["model"]["use_ar"]))
    load_switti(model, state)
    state = named_weights(case["vae_weights"], case["vae_seed"])
    autoencoder = Autoencoder(infer_vq_config(state))
    load_vq(autoencoder, state)
    return Engine(model, VQTokenizer(autoencoder))


def build_request(case: Case, record: Record, schedule: ScaleSchedule) -> Request:
    """What a case asked for; text that its mask hides is left out, which is what the mask does to attention."""
    num_scales, num_images = len(schedule), int(case["B"])
    first, end = case.get("turn_on_cfg_start_si", 0), case["turn_off_cfg_start_si"]
    # Where guidance is over, and only there, the reference divides by this temperature, on every scale from there on.
    cold = case.get("last_scale_temp") or 1.0
    filters = filters_of(case, num_scales)
    texts = zip(record["context"], record["pooled"], record["context_mask"].bool(), strict=True)
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule.from_var(case["cfg"], num_scales, first, end),
        temperatures=tuple(cold if s >= max(first, end) else 1.0 for s in range(num_scales)),
        filters=filters,
        sampler=sampler_of(case | {"g_seed": case["seed"]}, filters, num_images),
        conditions=tuple(PooledText(tokens_TE=tokens[mask], pooled_F=pooled) for tokens, pooled, mask in texts),
        num_images=num_images,
    )
