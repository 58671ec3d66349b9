"""Recorded cases of the VAR family: classes, ids, guidance that grows with the scale."""

from parity_common import Case, Record, Result, compare, filters_of, named_weights, recorded_ids, sampler_of

from foveate.core.conditions import ClassLabel
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.state import Request
from foveate.models.var import VAR
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.vq import VQTokenizer
from foveate.weights.var import infer_var_config, load_var
from foveate.weights.vq import infer_vq_config, load_vq


def run(name: str, case: Case, record: Record) -> Result:
    """Runs one case."""
    schedule = ScaleSchedule.from_grids([(n, n) for n in case["model"]["patch_nums"]])
    request = build_request(case, schedule)
    return compare(name, build_engine(case, schedule), request, record, recorded_ids(record))


def build_engine(case: Case, schedule: ScaleSchedule) -> Engine:
    """Model and tokenizer of a case, loaded as published checkpoints are."""
    state = named_weights(case["transformer_weights"], case["transformer_seed"])
    model = VAR(infer_var_config(state, schedule.grids))
    load_var(model, state)
    state = named_weights(case["vae_weights"], case["vae_seed"])
    autoencoder = Autoencoder(infer_vq_config(state))
    load_vq(autoencoder, state)
    return Engine(model, VQTokenizer(autoencoder))


def build_request(case: Case, schedule: ScaleSchedule) -> Request:
    """What a case asked for."""
    num_scales, num_images = len(schedule), len(case["labels"])
    filters = filters_of(case, num_scales)
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule.from_var(case["cfg"], num_scales),
        temperatures=(1.0,) * num_scales,
        filters=filters,
        sampler=sampler_of(case, filters, num_images),
        conditions=tuple(ClassLabel(index=int(label)) for label in case["labels"]),
        num_images=num_images,
    )
