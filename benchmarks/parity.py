"""Runs recorded cases of the reference implementations and compares: `python benchmarks/parity.py DIR [--strict]`.

A case is a `.json` (what was run) and a `.safetensors` (what came out); weights follow from their names. Codes are
forced first and the logits compared at the recorded positions, then the case runs freely and its codes are compared.
Prints one JSON line per case. Exit code 1 if a case fails (with `--strict` also if one is not supported), 2 if there
is none.
The reference has two code paths with different rotary positions (`InfinityConfig.restarts_positions`), and a case does
not say which one made it: both are tried, and the line says which one fits.
Axes: B images, l tokens of a scale, d bits of a token, n recorded positions.
"""

import argparse
import json
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from foveate.core.errors import UnsupportedError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import TEMPLATES, Grid, ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, ForcedSampler, KeyedSampler, ReferenceSampler, Sampler
from foveate.engine.state import Request
from foveate.models.checkpoint_infinity import (
    infer_autoencoder_config,
    infer_infinity_config,
    load_autoencoder,
    load_transformer,
)
from foveate.models.infinity import Infinity
from foveate.policies.full import Full
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.bsq import BSQTokenizer

TOLERANCE = 1e-4
"""Largest difference over the standard deviation of what was recorded in float32."""
HALF_TOLERANCE = 5e-3
"""The same for what was recorded in float16."""

Case = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One case; errors are largest differences relative to the standard deviation of what was recorded."""

    case: str
    status: str
    reason: str = ""
    max_logit_error: float | None = None
    codes_equal: bool | None = None
    latent_error: float | None = None
    image_error: float | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class RecordingSampler(Sampler):
    """Keeps the logits (after guidance and temperature) and the symbols of every scale that another sampler chose."""

    inner: Sampler
    logits: list[Float[Tensor, "B l d 2"]] = field(default_factory=list)
    symbols: list[Int[Tensor, "B l d"]] = field(default_factory=list)

    def choose(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "k d V"]],
        kept: Sequence[Int[Tensor, " k"]] | None,
        rule: Filter,
    ) -> list[Int[Tensor, "k d"]]:
        """Delegates."""
        symbols = self.inner.choose(scale, grid, logits, kept, rule)
        self.logits.append(torch.stack(list(logits)))
        self.symbols.append(torch.stack(symbols))
        return symbols


def named_weights(entries: Sequence[tuple[str, list[int], float, float]], seed: int) -> dict[str, Tensor]:
    """The weights that follow from names: normal draws seeded with a checksum of the name; float32."""
    weights = {}
    for key, shape, mean, std in entries:
        draw = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape)
        weights[key] = torch.from_numpy(np.asarray(mean + std * draw, dtype=np.float32))
    return weights


def per_scale(value: float | Sequence[float], num_scales: int) -> tuple[float, ...]:
    """A number for every scale, from one number or a list."""
    values = [value] * num_scales if isinstance(value, int | float) else list(value)
    return tuple(float(v) for v in values[:num_scales])


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


def recorded_symbols(record: dict[str, Tensor], num_scales: int, patch: int) -> tuple[Int[Tensor, "B l d"], ...]:
    """Recorded bits per token; 2x2 latents side by side where a token holds them."""
    symbols = []
    for s in range(num_scales):
        bits_Bdhw = record[f"step{s:02d}.bits"].squeeze(1).permute(0, 3, 1, 2).long()
        bits_Bdhw = F.pixel_unshuffle(bits_Bdhw, patch) if patch > 1 else bits_Bdhw
        symbols.append(bits_Bdhw.flatten(2).transpose(1, 2))
    return tuple(symbols)


@torch.inference_mode()
def generate(engine: Engine, request: Request) -> Tensor:
    """Runs everything; returns the final latent."""
    bound = Full().bind(request.schedule, engine.model.shape)
    *_, last = engine.run(bound, request)
    return last.f_hat_BZHW


def relative_error(found: Tensor, recorded: Tensor) -> float:
    """Largest difference over the standard deviation of what was recorded; infinite for other shapes and NaN."""
    if found.shape != recorded.shape:
        return float("inf")
    recorded = recorded.float()
    error = float((found.float() - recorded).abs().max() / recorded.std(correction=0))
    return error if math.isfinite(error) else float("inf")


def is_near_tie(found: Int[Tensor, "B l d"], recorded: Int[Tensor, "B l d"], logits: Float[Tensor, "B l d 2"]) -> bool:
    """Whether symbols differ only where the two logits are closer than the tolerance; logits of the same past codes."""
    gap = (logits[..., 1] - logits[..., 0]).abs()
    return bool((gap[found != recorded] < TOLERANCE * logits.std(correction=0)).all())


def codes_agree(
    free: RecordingSampler, forced: RecordingSampler, recorded: Sequence[Int[Tensor, "B l d"]], is_greedy: bool
) -> bool:
    """Whether a free run chose the recorded codes.

    After a tie that fell the other way a free run has another past, so then every scale is judged on the recorded past.
    """
    if all(torch.equal(a, b) for a, b in zip(free.symbols, recorded, strict=True)):
        return True
    if not is_greedy:
        return False
    first = next(s for s, (a, b) in enumerate(zip(free.symbols, recorded, strict=True)) if not torch.equal(a, b))
    if not is_near_tie(free.symbols[first], recorded[first], forced.logits[first]):
        return False
    return all(is_near_tie(x.argmax(-1), b, x) for x, b in zip(forced.logits, recorded, strict=True))


def build_request(case: Case, record: dict[str, Tensor], schedule: ScaleSchedule, num_blocks: int) -> Request:
    """What a case asked for; its own sampler: greedy, or draws in the published order."""
    num_scales, num_images = len(schedule), len(case["lens"])
    rules = zip(per_scale(case["top_k"], num_scales), per_scale(case["top_p"], num_scales), strict=True)
    filters = tuple(Filter(top_k=int(top_k), top_p=top_p) for top_k, top_p in rules)
    sampler: Sampler = KeyedSampler(seeds=(0,) * num_images)
    if not all(rule.is_greedy for rule in filters):
        sampler = ReferenceSampler(generator=torch.Generator().manual_seed(int(case["g_seed"])))
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule.from_infinity(case["cfg"], num_scales, case.get("insertion", 0), num_blocks),
        temperatures=per_scale(case["tau"], num_scales),
        filters=filters,
        sampler=sampler,
        conditions=tuple(record["text_features"].float().split(case["lens"])),
        num_images=num_images,
    )


def run_infinity(name: str, case: Case, record: dict[str, Tensor], *, restarts_positions: bool) -> Result:
    """Runs one case of the Infinity family, on one of the reference's two paths."""
    schedule = build_schedule(case)
    engine = build_engine(case, schedule.patch, restarts_positions=restarts_positions)
    request = build_request(case, record, schedule, engine.model.shape.num_blocks)
    symbols = recorded_symbols(record, len(schedule), schedule.patch)
    forced = RecordingSampler(inner=ForcedSampler(symbols=symbols))
    free = RecordingSampler(inner=request.sampler)
    latent_BZHW = generate(engine, replace(request, sampler=forced))
    generate(engine, replace(request, sampler=free))
    logit_errors = [
        relative_error(logits[:, record[f"step{s:02d}.positions"].long()], record[f"step{s:02d}.logits"])
        for s, logits in enumerate(forced.logits)
    ]
    path = "restart at every scale, as in its path without fused norms" if restarts_positions else "are per scale"
    return judged(
        Result(
            case=name,
            status="pass",
            reason=f"the reference's rotary positions {path}",
            max_logit_error=max(logit_errors),
            codes_equal=codes_agree(free, forced, symbols, all(rule.is_greedy for rule in request.filters)),
            latent_error=relative_error(latent_BZHW, record["latent"]),
            image_error=relative_error(engine.tokenizer.decode(latent_BZHW), record["decoded_f16"]),
        )
    )


def judged(result: Result) -> Result:
    """The result, failed with a reason if a bound is broken."""
    bounds = {"max_logit_error": TOLERANCE, "latent_error": TOLERANCE, "image_error": HALF_TOLERANCE}
    broken = [
        f"{name} {getattr(result, name):.2e} is above {bound:.0e}"
        for name, bound in bounds.items()
        if not getattr(result, name) <= bound
    ]
    if not result.codes_equal:
        broken.append("the free run chose other codes")
    return replace(result, status="fail", reason="; ".join(broken)) if broken else result


def run_case(path: Path) -> Result:
    """Runs the case of one `.json`; what cannot run fails with a reason in one line."""
    try:
        case = json.loads(path.read_text(encoding="utf-8"))
        family, policy = case["family"], case.get("policy")
        if family != "infinity":
            return Result(case=path.stem, status="unsupported", reason=f"family {family} not available")
        if policy is not None:
            return Result(case=path.stem, status="unsupported", reason=f"policy {policy['name']} not available")
        record = load_file(path.with_suffix(".safetensors"))
        tried = [run_infinity(path.stem, case, record, restarts_positions=flag) for flag in (False, True)]
        return min(tried, key=lambda result: math.inf if result.max_logit_error is None else result.max_logit_error)
    except UnsupportedError as error:
        return Result(case=path.stem, status="unsupported", reason=str(error))
    except Exception as error:  # one case that cannot be read or run must not hide the others
        first = (str(error).splitlines() or [""])[0]
        return Result(case=path.stem, status="fail", reason=f"{type(error).__name__}: {first}")


def as_line(result: Result) -> str:
    """The result as a line of JSON, which has no infinity: an error without a number is null."""
    values = asdict(result)
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all cases of a folder; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compares with recorded numbers of the reference implementations.")
    parser.add_argument("folder", type=Path, help="holds one .json and one .safetensors per case")
    parser.add_argument("--strict", action="store_true", help="a case that is not supported fails")
    options = parser.parse_args(arguments)
    paths = sorted(options.folder.glob("*.json"))
    if not paths:
        sys.stderr.write(f"{options.folder}: there is no case (.json) here\n")
        return 2
    bad = {"fail", "unsupported"} if options.strict else {"fail"}
    exit_code = 0
    for path in paths:
        result = run_case(path)
        sys.stdout.write(as_line(result) + "\n")
        sys.stdout.flush()
        exit_code = 1 if result.status in bad else exit_code
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
