"""Memory of the toy: what is counted against the files, what is measured against an allocation of known size."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from foveate.bench.memory import Memory, MemoryRun, meter_for, weights_bytes
from foveate.bench.report import BenchReport
from foveate.core.cost import ModelShape
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.full import Full

MIB = 2**20


def test_weights_are_those_of_the_networks(toy_pipe: Pipeline) -> None:
    found = weights_bytes(toy_pipe.model)
    assert list(found) == ["transformer", "tokenizer", "text_encoder"]
    transformer = toy_pipe.model.transformer
    tensors = [*transformer.parameters(), *transformer.buffers()]
    assert found["transformer"] == sum(tensor.nbytes for tensor in tensors)
    # The toy's matrices are a few hundred kilobytes; a part that was not found would have none.
    assert all(10_000 < size < 100 * MIB for size in found.values())


@dataclass(frozen=True)
class Encoder:
    """An encoder around a module, as text encoders are."""

    model: nn.Module
    max_tokens: int = 5

    def encode(self, prompts):
        raise AssertionError("nothing is drawn here")

    def num_cut(self, prompt):
        return 0


@dataclass(frozen=True)
class Pair:
    """Two encoders in one."""

    first: Encoder
    second: Encoder

    def encode(self, prompts):
        return self.first.encode(prompts)

    def num_cut(self, prompt):
        return 0


def test_two_encoders_in_one_are_both_counted(toy_pipe: Pipeline) -> None:
    shared = Encoder(nn.Linear(10, 20, bias=False))
    pairs = [Pair(shared, Encoder(nn.Linear(10, 30, bias=False))), Pair(shared, shared)]
    found = [weights_bytes(replace(toy_pipe.model, text=pair))["text_encoder"] for pair in pairs]
    assert found == [4 * 500, 4 * 200]


def test_the_meter_sees_an_allocation_that_is_gone_again() -> None:
    meter = meter_for(torch.device("cpu"))
    if meter is None:
        pytest.skip("this system cannot set the peak of resident memory back")
    for mib in (96, 32):
        meter.start()
        block = torch.ones(mib * MIB, dtype=torch.uint8)
        del block
        # The second block is smaller: a peak that was not set back would still hold the first.
        assert abs(meter.added_bytes() / MIB - mib) < 16


def test_parts_by_hand() -> None:
    own = [MemoryRun(kv=40, caches=7, transformer=100, call=150), MemoryRun(kv=40, caches=7, transformer=120, call=130)]
    baseline = [MemoryRun(kv=80, caches=0, transformer=200, call=call) for call in (300, 260)]
    entry = Memory(meter=None, weights=1000).entry(Full(), own, baseline)
    medians = {name: spread.median for name, spread in entry.figures.items()}
    assert medians == {
        "bytes.kv": 40, "bytes.caches": 7, "bytes.activations": 63, "bytes.transformer": 110,
        "bytes.call": 140, "bytes.peak": 1140, "ratio.kv": 0.5, "ratio.call": 0.5,
    }  # fmt: skip


def test_without_a_meter_only_what_is_counted_is_said() -> None:
    run = MemoryRun(kv=40, caches=7, transformer=None, call=None)
    assert run.activations is None
    assert set(Memory(meter=None, weights=1).entry(Full(), [run], None).figures) == {"bytes.kv", "bytes.caches"}


def test_report(toy_report: Callable[[str], BenchReport], toy_pipe: Pipeline) -> None:
    report = toy_report("memory")
    full, skip, _ = report.cases[0].entries
    shape: ModelShape = toy_pipe.model.transformer.shape
    # Published grids of 256 px: 1 to 16 tokens a side, of which the last is not stored; both branches, float32.
    stored, last = 265, 256
    per_token = 2 * 2 * shape.num_heads * shape.head_width * 4
    assert full.figures["bytes.kv"].median == per_token * (stored * shape.num_blocks + stored + last)
    assert skip.figures["ratio.kv"].median < 0.5
    assert 0 < skip.figures["bytes.caches"].median == full.figures["bytes.caches"].median
    assert report.peak is None
    data = report.to_json()["cases"][0]["policies"]
    assert data[0]["bytes"]["kv"]["median"] == full.figures["bytes.kv"].median
    if "bytes.call" in full.figures:
        # Pages are counted at different moments of two runs.
        assert full.figures["bytes.call"].median >= 0.9 * full.figures["bytes.transformer"].median
        assert full.figures["bytes.peak"].median > sum(report.weights_bytes.values())


def test_caches_hold_what_the_text_decides_and_what_a_policy_reads_again(toy_pipe: Pipeline) -> None:
    shape: ModelShape = toy_pipe.model.transformer.shape
    full, depth = (toy_pipe("a red cat", seed=3, policy=name) for name in ("full", "depthvar"))
    text_tokens = sum(full.trace.text_tokens.values())
    assert full.report.cache_bytes_peak >= 4 * 2 * shape.width * shape.num_blocks * text_tokens
    # Two branches, float32: the changes of every block at one of the scales.
    per_token = 4 * 2 * shape.width * shape.num_blocks
    tokens, left = divmod(depth.report.cache_bytes_peak - full.report.cache_bytes_peak, per_token)
    assert left == 0
    assert tokens in {scale.work.grid_tokens for scale in depth.trace.scales}
