"""The first scales of a request as captured graphs: there launching kernels takes longer than running them.

A prefix is the run of scales from the first on in which all tokens of all rows run all blocks. For one shape it always
does the same, so it is captured once and replayed, one launch per scale; what it reads lies in buffers of its own.
Behind the prefix its keys and values move into the request's cache, and the plain loop goes on.
Axes: R rows, n packed tokens, C width, D numbers of a position, k packed tokens with logits, V outputs.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.errors import is_out_of_memory
from foveate.core.held import copy_held_, held_copy, zero_held_
from foveate.core.protocols import NextScaleModel, Prepared
from foveate.core.schedule import Scale, ScaleSchedule
from foveate.core.warnings import CallWarning, log_warnings
from foveate.engine.kv_cache import KVCache

T = TypeVar("T")

MOST_TOKENS = 512
"""Packed tokens of a scale above which matmuls are expected to take longer than kernel launches (docs/gpu.md)."""
TOLERANCE = 1e-5
"""Largest difference between a replay and the plain loop, over the largest value of the latter if that is above 1."""
MOST_SHAPES = 16
MOST_SEEN = 1024
"""Shapes that were met once and are remembered, without anything of them."""

Blocks = Callable[[Tensor, Tensor, Prepared, KVCache], Float[Tensor, "k V"]]
"""Runs the blocks and the head of one scale: hidden states, positions, what was prepared and the cache to logits."""


@runtime_checkable
class Captured(Protocol):
    """Work that can be done again, with what lies in the tensors that it reads by then."""

    @property
    def out(self) -> Tensor:
        """What it computed last; the next time overwrites it."""
        ...

    def replay(self) -> None:
        """Runs the captured work."""
        ...


Capture = Callable[[Callable[[], Tensor]], Captured]
"""Records work; it may run it, and it need not leave a result."""

_CAPTURING = threading.Lock()
"""Torch captures in one thread of a process at a time."""


class DeviceCapture:
    """Captures CUDA graphs. All graphs share one pool of memory, as they never run at the same time.

    Work runs once before it is recorded, as kernels are compiled at the first time, and on another stream: libraries
    keep a workspace per stream, and that of the recording one must lie in the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._warming, self._recording = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
            # A pool whose last graph went can take no other one: this one stays.
            self._anchor = self._record(lambda: torch.zeros(1, device=device) + 1)

    def __call__(self, work: Callable[[], Tensor]) -> Captured:
        """Runs and records."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._warming.wait_stream(current)
            with torch.cuda.stream(self._warming):
                work()
            current.wait_stream(self._warming)
            return self._record(work)

    def _record(self, work: Callable[[], Tensor]) -> "_DeviceGraph":
        graph = torch.cuda.CUDAGraph()
        # Torch does not leave the recording stream where recording cannot begin. Other threads may allocate meanwhile.
        with (
            _CAPTURING,
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, stream=self._recording, capture_error_mode="thread_local"),
        ):
            out = work()
        return _DeviceGraph(graph=graph, out=out)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _DeviceGraph:
    graph: "torch.cuda.CUDAGraph"
    out: Tensor

    def replay(self) -> None:
        """Replays the graph: one launch."""
        self.graph.replay()


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixShape:
    """The key of a prefix: requests with equal shapes share its graphs.

    Attributes:
        schedule: Grids decide token counts, and the last one the positions.
        rows: Rows at the start, each with its text tokens.
        num_stored: Scales whose keys are stored.
        dtype: Of keys and values.
    """

    schedule: ScaleSchedule
    rows: tuple[tuple[Row, int], ...]
    num_stored: int
    dtype: torch.dtype

    def num_scales(self, most_tokens: int) -> int:
        """Scales of the prefix: those up to the first that holds too many tokens."""
        counts = [len(self.rows) * scale.num_tokens for scale in self.schedule.scales]
        return next((s for s, count in enumerate(counts) if count > most_tokens), len(counts))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recorded:
    """A captured scale and the tensors it reads besides what a prefix holds: a graph does not keep them alive."""

    x_nC: Tensor
    rotation_nD: Tensor
    captured: Captured


@dataclass(kw_only=True, slots=True, eq=False)
class Prefix:
    """Buffers and graphs of one shape; `owner` leases one prefix to one request at a time, as they share a cache."""

    owner: "Graphs"
    shape: PrefixShape
    num_scales: int
    prepared: Prepared
    cache: KVCache
    graphs: dict[tuple[int, int], "Recorded"] = field(default_factory=dict)
    is_broken: bool = False
    done: int = 0

    def serves(self, scale: Scale) -> bool:
        """Whether this scale is the next one of the prefix."""
        return scale.index == self.done < self.num_scales and not self.is_broken

    def logits(
        self, scale: Scale, num_headed: int, x_nC: Float[Tensor, "n C"], rotation_nD: Float[Tensor, "n D"], run: Blocks
    ) -> Float[Tensor, "k V"]:
        """Runs a scale that `serves` allowed.

        Args:
            scale: The scale.
            num_headed: Rows with logits.
            x_nC: What enters the blocks.
            rotation_nD: Positions; they follow from the shape.
            run: The blocks and the head; called only if this scale has not been captured yet.
        """
        key = (scale.index, num_headed)
        self._fill(scale.index)
        out_kV = None if key in self.graphs else self._first(key, x_nC, rotation_nD, run)
        if out_kV is None:
            out_kV = self._replayed(key, x_nC)
        self.done = scale.index + 1
        self._fill(self.done)
        return out_kV

    def _replayed(self, key: tuple[int, int], x_nC: Tensor) -> Tensor:
        recorded = self.graphs[key]
        # The blocks add to what they are given, so it is filled anew every time.
        recorded.x_nC.copy_(x_nC)
        recorded.captured.replay()
        return recorded.captured.out.clone()

    def _first(self, key: tuple[int, int], x_nC: Tensor, rotation_nD: Tensor, run: Blocks) -> Tensor:
        """Runs a scale plainly, then captures it and replays it once: only what agrees is ever replayed again."""
        scale = key[0]
        out_kV = run(x_nC.clone(), rotation_nD, self.prepared, self.cache)
        expected = [part.clone() for part in (out_kV, *self._stored(scale + 1))]
        problem = None
        try:
            self.graphs[key] = self._captured(scale, x_nC, rotation_nD, run)
            self._prepare_check(scale, self.graphs[key].captured.out, expected)
            found = (self._replayed(key, x_nC), *self._stored(scale + 1))
            if not all(_agree(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
                problem = f"a replay differs from the plain loop by more than {TOLERANCE:g}"
        except RuntimeError as error:
            problem = f"it could not be captured: {str(error).split(chr(10))[0]}"
        if problem is not None:
            self.is_broken = True
            self.owner.note(problem)
            for over, part in zip(self._stored(scale + 1), expected[1:], strict=True):
                over.copy_(part)
        return expected[0]

    def _captured(self, scale: int, x_nC: Tensor, rotation_nD: Tensor, run: Blocks) -> Recorded:
        """Records a scale on zeros: a graph that keeps what it read then cannot agree on a request's own values."""
        own_x_nC, own_rotation_nD = torch.zeros_like(x_nC), rotation_nD.clone()

        def work() -> Tensor:
            self._fill(scale)
            return run(own_x_nC, own_rotation_nD, self.prepared, self.cache)

        kept = held_copy(self.prepared)
        zero_held_(self.prepared)
        zero_held_(self._stored(scale + 1))
        try:
            return Recorded(x_nC=own_x_nC, rotation_nD=own_rotation_nD, captured=self.owner.capture(work))
        finally:
            copy_held_(self.prepared, kept)

    def _prepare_check(self, scale: int, out_kV: Tensor, expected: list[Tensor]) -> None:
        """Puts back what the scale reads, and values that cannot agree wherever its replay has to write."""
        _spoil_(out_kV, expected[0])
        held = self._num_stored(scale)
        for over, part in zip(self._stored(scale + 1), expected[1:], strict=True):
            over[:, :, :held] = part[:, :, :held]
            _spoil_(over[:, :, held:], part[:, :, held:])

    def hand_over(self, cache: KVCache) -> None:
        """Moves keys and values of the scales that ran into a request's own, empty cache, and ends the prefix."""
        self._fill(self.done)
        for block, lengths in enumerate(self.cache.lengths):
            filled = lengths[0]
            cache.k_RNMD[block][:, :, :filled] = self.cache.k_RNMD[block][:, :, :filled]
            cache.v_RNMD[block][:, :, :filled] = self.cache.v_RNMD[block][:, :, :filled]
            cache.lengths[block] = list(lengths)
        stored = self.shape.schedule.scales[: min(self.done, self.shape.num_stored)]
        rows, blocks = len(self.shape.rows), len(self.cache.lengths)
        cache.scales = [(scale.index, [[scale.num_tokens] * rows for _ in range(blocks)]) for scale in stored]
        self.release()

    def release(self) -> None:
        """Ends the lease."""
        self.owner.take_back(self)

    def _fill(self, scale: int) -> None:
        """Says how much the cache holds in front of a scale; the device does not know."""
        filled = self._num_stored(scale)
        self.cache.lengths = [[filled] * len(self.shape.rows) for _ in self.cache.lengths]

    def _num_stored(self, scale: int) -> int:
        """Tokens of a row that the cache holds in front of a scale."""
        return sum(part.num_tokens for part in self.shape.schedule.scales[: min(scale, self.shape.num_stored)])

    def _stored(self, scale: int) -> list[Tensor]:
        """Keys and values in front of a scale, as views: what lies behind them was never written."""
        filled = self._num_stored(scale)
        return [part[:, :, :filled] for part in (*self.cache.k_RNMD, *self.cache.v_RNMD)]


class Graphs:
    """The prefixes of an engine by shape; nothing of a request is left in them that another one reads.

    A shape is captured when it is met for the second time, as recording takes longer than running once, and compared
    with the plain loop there. One request has graphs at a time; others beside it take the plain loop.
    """

    def __init__(self, capture: Capture, most_tokens: int = MOST_TOKENS, most_shapes: int = MOST_SHAPES) -> None:
        self.capture, self.most_tokens, self.most_shapes = capture, most_tokens, most_shapes
        self._prefixes: OrderedDict[PrefixShape, Prefix] = OrderedDict()
        self._seen: OrderedDict[PrefixShape, None] = OrderedDict()
        self._refused: OrderedDict[PrefixShape, None] = OrderedDict()
        self._caches: WeakValueDictionary[tuple[int, int, int, torch.dtype], KVCache] = WeakValueDictionary()
        self._leased: Prefix | None = None
        self._warnings: list[CallWarning] = []
        self._lock = threading.Lock()

    def lease(self, shape: PrefixShape, model: NextScaleModel, prepared: Prepared) -> Prefix | None:
        """A prefix for a request, with what was prepared for it; None where the plain loop shall run.

        Args:
            shape: Of the request.
            model: The same for all calls.
            prepared: Copied; the prefix does not keep it.
        """
        if shape.num_scales(self.most_tokens) == 0:
            return None
        with self._lock:
            if self._leased is not None or shape in self._refused:
                return None
            if shape not in self._prefixes and shape not in self._seen:
                _remember(self._seen, shape, None, MOST_SEEN)
                return None
            prefix = self._prefixes.get(shape) or self._built(shape, model, prepared)
            if prefix is None:
                return None
            _remember(self._prefixes, shape, prefix, self.most_shapes)
            if prefix.is_broken:
                return None
            self._leased = prefix
        copy_held_(prefix.prepared, prepared)
        prefix.done = 0
        return prefix

    def take_back(self, prefix: Prefix) -> None:
        """Ends a lease; a prefix that was handed over before its request ended has none any more."""
        with self._lock:
            if self._leased is prefix:
                self._leased = None

    def note(self, problem: str) -> None:
        """Logs once, and adds to every later report, that a shape takes the plain loop."""
        warning = CallWarning(code="graphs_plain", message=f"one shape runs without captured graphs: {problem}")
        if warning not in self._warnings:
            self._warnings.append(warning)
            log_warnings([warning])

    def warnings(self) -> tuple[CallWarning, ...]:
        """What the report of a call says of shapes that take the plain loop."""
        return tuple(self._warnings)

    def _built(self, shape: PrefixShape, model: NextScaleModel, prepared: Prepared) -> Prefix | None:
        """A new prefix, or None, now and later, if there is no memory for its buffers: the plain loop needs none."""
        try:
            return self._build(shape, model, prepared)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.note(f"there is no memory for it: {str(error).split(chr(10))[0]}")
            _remember(self._refused, shape, None, MOST_SEEN)
            return None

    def _build(self, shape: PrefixShape, model: NextScaleModel, prepared: Prepared) -> Prefix:
        """Makes the buffers of a shape; the cache is that of all shapes of equal counts, whatever their texts."""
        count = shape.num_scales(self.most_tokens)
        tokens = [scale.num_tokens for scale in shape.schedule.scales[:count]]
        key = (len(shape.rows), sum(tokens[: shape.num_stored]), max(tokens), shape.dtype)
        cache = self._caches.get(key)
        if cache is None:
            rows, stored, most, dtype = key
            cache = KVCache(model.shape, rows, [stored] * model.shape.num_blocks, most, dtype, model.device)
            self._caches[key] = cache
        return Prefix(owner=self, shape=shape, num_scales=count, prepared=held_copy(prepared), cache=cache)


def _remember(shapes: "OrderedDict[PrefixShape, T]", shape: PrefixShape, value: T, most: int) -> None:
    """Puts an entry behind all others and forgets those in front."""
    shapes[shape] = value
    shapes.move_to_end(shape)
    while len(shapes) > most:
        shapes.popitem(last=False)


def _spoil_(over: Tensor, expected: Tensor) -> None:
    """Overwrites with NaN, and with zeros where NaN is expected: nothing of it passes for the result."""
    over.copy_(torch.where(expected.isnan(), 0.0, torch.nan))


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether a replay is the plain loop within `TOLERANCE`; numbers that are broken must be so in both."""
    if not expected.numel():
        return True
    largest = expected.double().nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1.0)
    return torch.allclose(found.double(), expected.double(), rtol=0.0, atol=TOLERANCE * float(largest), equal_nan=True)
