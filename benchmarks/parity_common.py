"""What the families share when recorded cases are run again: weights from names, forced and free runs, the comparison.

Codes are forced first and the logits compared at the recorded positions, then the case runs freely and its codes are
compared.
Axes: B images, l tokens of a scale, d symbols of a token, V values of a symbol, n recorded positions.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.schedule import Grid
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, ForcedSampler, KeyedSampler, ReferenceSampler, Sampler
from foveate.engine.state import Request
from foveate.policies.full import Full

TOLERANCE = 1e-4
"""Largest difference over the standard deviation of what was recorded in float32."""
HALF_TOLERANCE = 5e-3
"""The same for what was recorded in float16."""

Case = dict[str, Any]
"""The `.json` of a case."""
Record = dict[str, Tensor]
"""The `.safetensors` of a case."""


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
    logits: list[Float[Tensor, "B l d V"]] = field(default_factory=list)
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


def filters_of(case: Case, num_scales: int) -> tuple[Filter, ...]:
    """Top-k and top-p of every scale."""
    rules = zip(per_scale(case["top_k"], num_scales), per_scale(case["top_p"], num_scales), strict=True)
    return tuple(Filter(top_k=int(top_k), top_p=top_p) for top_k, top_p in rules)


def sampler_of(case: Case, filters: Sequence[Filter], num_images: int) -> Sampler:
    """The case's own sampler: greedy, or draws in the published order."""
    if all(rule.is_greedy for rule in filters):
        return KeyedSampler(seeds=(0,) * num_images)
    return ReferenceSampler(generator=torch.Generator().manual_seed(int(case["g_seed"])))


def recorded_ids(record: Record, num_scales: int) -> tuple[Int[Tensor, "B l 1"], ...]:
    """Recorded ids, one per token."""
    return tuple(record[f"step{s:02d}.indices"].long().unsqueeze(-1) for s in range(num_scales))


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


def is_near_tie(found: Int[Tensor, "B l d"], recorded: Int[Tensor, "B l d"], logits: Float[Tensor, "B l d V"]) -> bool:
    """Whether symbols differ only where their logits are closer than the tolerance; logits of the same past codes."""
    mine, theirs = (logits.gather(-1, symbols.unsqueeze(-1)).squeeze(-1) for symbols in (found, recorded))
    return bool(((mine - theirs).abs()[found != recorded] < TOLERANCE * logits.std(correction=0)).all())


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


def recorded_pixels(record: Record) -> Float[Tensor, "B 3 Y X"]:
    """Recorded pixels in [-1, 1]: some references recorded these, others the picture in [0, 1]."""
    if "decoded_f16" in record:
        return record["decoded_f16"].float()
    return record["image01_f16"].float() * 2 - 1


def compare(
    name: str, engine: Engine, request: Request, record: Record, symbols: tuple[Int[Tensor, "B l d"], ...]
) -> Result:
    """Runs a case twice, with the recorded symbols and freely, and judges it against its record."""
    forced = RecordingSampler(inner=ForcedSampler(symbols=symbols))
    free = RecordingSampler(inner=request.sampler)
    latent_BZHW = generate(engine, replace(request, sampler=forced))
    generate(engine, replace(request, sampler=free))
    logit_errors = [
        relative_error(
            logits[:, record[f"step{s:02d}.positions"].long()].flatten(2), record[f"step{s:02d}.logits"].flatten(2)
        )
        for s, logits in enumerate(forced.logits)
    ]
    return judged(
        Result(
            case=name,
            status="pass",
            max_logit_error=max(logit_errors),
            codes_equal=codes_agree(free, forced, symbols, all(rule.is_greedy for rule in request.filters)),
            latent_error=relative_error(latent_BZHW, record["latent"]),
            image_error=relative_error(engine.tokenizer.decode(latent_BZHW), recorded_pixels(record)),
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
