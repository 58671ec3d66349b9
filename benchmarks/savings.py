"""Ablation of the exact savings: the full run against the same run without one of them, in turns.

For one call a saving is replaced by what the published code or plain torch does; the library has no switch for it.
Transformer alone, without the decoder. Images stay the same up to rounding.

    python benchmarks/savings.py --model infinity-125m --size 0.25M --dtype bfloat16 --runs 5
"""

import argparse
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from foveate.bench.machine import describe_machine
from foveate.bench.rounds import alternate
from foveate.bench.spread import Spread
from foveate.engine import kv_cache, sample, state
from foveate.engine.executor import Engine, ScaleStep
from foveate.engine.kv_cache import Slot
from foveate.engine.state import Bounds, RequestState
from foveate.families.loading import model_names
from foveate.kernels import activation, attention, heads, linear, native, norm, residual
from foveate.kernels.attention import attend_group
from foveate.pipeline.options import Options
from foveate.pipeline.pipeline import Pipeline

_TORCH = SimpleNamespace(serves=lambda *_: False, allows_onednn=lambda: False)
"""Stands in for `foveate.kernels.native` in one kernel: plain torch runs there."""


@contextmanager
def in_torch(*kernels: Any) -> Generator[None, None, None]:
    """Plain torch in the place of some kernels."""
    before = [kernel.native for kernel in kernels]
    for kernel in kernels:
        kernel.native = _TORCH
    try:
        yield
    finally:
        for kernel, old in zip(kernels, before, strict=True):
            kernel.native = old


@contextmanager
def text_every_scale() -> Generator[None, None, None]:
    """Text keys and values and modulation are computed again at every scale."""
    step = Engine.step

    def again(self: Engine, states: Sequence[RequestState]) -> list[ScaleStep | Exception]:
        for current in states:
            if current.scale:
                is_guided = any(not is_cond for _, is_cond in current.live) and not current.request.has_negative
                with torch.inference_mode():
                    current.prepared = self.model.prepare(current.request.conditions, is_guided)
        return step(self, states)

    with patch.object(Engine, "step", again):
        yield


@contextmanager
def cache_by_concatenation() -> Generator[None, None, None]:
    """Keys and values grow by concatenation, keys in float32, and the last scale's are kept as well."""

    def attend(self: Slot, q_nND: Tensor, k_nND: Tensor, v_nND: Tensor, scale: float) -> Tensor:
        grown: dict[int, tuple[Tensor, Tensor]] = self.cache.__dict__.setdefault("grown", {})
        rows = len(self.rows.counts)
        k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (k_nND.float(), v_nND))
        if self.block in grown:
            k, v = (torch.cat((old, new), dim=2) for old, new in zip(grown[self.block], (k, v), strict=True))
        grown[self.block] = (k, v)
        return attend_group(q_nND, k.to(v.dtype), v.contiguous(), scale)

    with patch.object(kv_cache.Slot, "attend", attend):
        yield


@contextmanager
def last_scale_stored() -> Generator[None, None, None]:
    """The last scale's keys and values are stored in every block instead of one scratch."""
    bounds_of = state.bounds_of

    def wider(*arguments: Any) -> Bounds:
        bounds = bounds_of(*arguments)
        last = bounds.scratch_tokens
        capacities = tuple(capacity + last for capacity in bounds.capacities)
        return replace(bounds, capacities=capacities, num_stored=bounds.num_stored + 1)

    with patch.object(state, "bounds_of", wider):
        yield


@contextmanager
def general_sampling() -> Generator[None, None, None]:
    """Bits are filtered as ids are: a sort and cumulative sums for top-p, over two values each."""

    def by_sorting(logits_kd2: Tensor, u_kd: Tensor, top_p: float) -> Tensor:
        ascending, order = logits_kd2.float().sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - (top_p or 1.0)
        drop[..., -1] = False
        masked = ascending.masked_fill(drop, -torch.inf)
        filtered = torch.zeros_like(masked).scatter(-1, order, masked)
        return (u_kd < filtered.softmax(-1)[..., 1]).long()

    with patch.object(sample, "sample_bits", by_sorting):
        yield


@contextmanager
def everything() -> Generator[None, None, None]:
    """All savings off."""
    with ExitStack() as stack:
        stack.enter_context(in_torch(attention, linear, norm, residual, heads, activation))
        for undo in (text_every_scale, cache_by_concatenation, general_sampling):
            stack.enter_context(undo())
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """One exact saving, and how it is switched off."""

    name: str
    undo: Callable[[], AbstractContextManager[None]]


SAVINGS = (
    Saving(name="attention in C", undo=lambda: in_torch(attention)),
    Saving(name="linear layers by oneDNN", undo=lambda: in_torch(linear)),
    Saving(name="norm and modulation in one pass", undo=lambda: in_torch(norm)),
    Saving(name="gated residual in one pass", undo=lambda: in_torch(residual)),
    Saving(name="unit heads and rotation in one pass", undo=lambda: in_torch(heads)),
    Saving(name="GELU in one pass", undo=lambda: in_torch(activation)),
    Saving(name="text and modulation once per prompt", undo=text_every_scale),
    Saving(name="cache allocated once, keys in the compute dtype", undo=cache_by_concatenation),
    Saving(name="no cache for the last scale", undo=last_scale_stored),
    Saving(name="bits filtered in closed form", undo=general_sampling),
    Saving(name="all of them", undo=everything),
)


def measure(pipe: Pipeline, pixels: str, saving: Saving, runs: int, warmup: int) -> dict[str, Any]:
    """Times both sides in turns; the ratio is formed within a round."""

    def once(side: int, index: int) -> tuple[float, int]:
        options = Options(pixels=pixels, seed=index, output_type="latent")
        if side:
            with saving.undo():
                report = pipe("a red apple on a table", **options).report
        else:
            report = pipe("a red apple on a table", **options).report
        return report.ms.transformer, report.kv_bytes_peak

    rounds = alternate(once, 2, runs=runs, warmup=warmup, after_round=lambda: None)
    ours, undone = rounds.of(0), rounds.of(1)
    ratio = Spread.of([without[0] / with_it[0] for with_it, without in zip(ours, undone, strict=True)])
    return {
        "saving": saving.name,
        "ms": Spread.of([ms for ms, _ in ours]).to_json(),
        "ms_without": Spread.of([ms for ms, _ in undone]).to_json(),
        "ratio": ratio.to_json(),
        "kv_bytes": ours[0][1],
        "kv_bytes_without": undone[0][1],
    }


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    ratio = found["ratio"]
    spread = f"{ratio['median']:.2f}x ({ratio['p10']:.2f}-{ratio['p90']:.2f})"
    kv = f"{found['kv_bytes_without'] / found['kv_bytes']:.2f}x"
    return (
        f"| {found['saving']} | {found['ms']['median']:.0f} | {found['ms_without']['median']:.0f} | {spread} | {kv} |"
    )


def main() -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=model_names(), default="infinity-125m")
    parser.add_argument("--size", default="0.25M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weights = "pretrained" if arguments.model.startswith("emoji") else "random"
    pipe = Pipeline.from_pretrained(arguments.model, weights=weights, dtype=arguments.dtype)
    pipe.set_progress_bar_config(disable=True)
    cpu = describe_machine()["cpu"]
    if not arguments.json:
        title = f"{arguments.model}, {arguments.size}, {arguments.dtype}, {cpu['name']}, {arguments.threads} threads"
        print(f"{title}, kernels: {native.describe()}\n")
        print("| saving | ms | ms without it | without / with | cache without / with |\n|---|---|---|---|---|")
    found = []
    for saving in SAVINGS:
        found.append(measure(pipe, arguments.size, saving, arguments.runs, arguments.warmup))
        if not arguments.json:
            print(line(found[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"machine": cpu, "arguments": vars(arguments), "savings": found}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
