"""The first scales of a request as captured graphs: there the host's launches take longer than what they start.

A prefix is the run of scales from the first on in which all tokens of all rows run all blocks. For one shape it always
does the same, so it is captured once and replayed, one launch per scale; what it reads lies in buffers of its own.
Behind the prefix its keys and values move into the request's cache, and the plain loop goes on.
Axes: R rows, n packed tokens, C width, D numbers of a position, k packed tokens with logits, V outputs.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.held import copy_held_, held_copy
from foveate.core.protocols import NextScaleModel, Prepared
from foveate.core.schedule import Scale, ScaleSchedule
from foveate.engine.kv_cache import KVCache

MOST_TOKENS = 2048
"""Packed tokens of a scale above which products take longer than launches."""
MOST_SHAPES = 32

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
        """Does the work."""
        ...


Capture = Callable[[Callable[[], Tensor]], Captured]
"""Records work; it may run it, and it need not leave a result."""


class DeviceCapture:
    """Captures on the current GPU; all graphs share one pool of memory, as they never run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Captured:
        """Runs the work once, as kernels are compiled and workspaces made at the first time, then records it."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = work()
        return _DeviceGraph(graph=graph, out=out)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _DeviceGraph:
    graph: "torch.cuda.CUDAGraph"
    out: Tensor

    def replay(self) -> None:
        """Starts everything with one launch."""
        self.graph.replay()


@dataclass(kw_only=True, slots=True, eq=False)
class Recalled:
    """The twin of a graph for any device: it remembers the function and calls it again."""

    work: Callable[[], Tensor]
    out: Tensor

    @classmethod
    def capture(cls, work: Callable[[], Tensor]) -> "Recalled":
        """Remembers."""
        return cls(work=work, out=work())

    def replay(self) -> None:
        """Calls the function."""
        self.out.copy_(self.work())


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixShape:
    """What two requests have in common whose prefixes are the same work.

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


@dataclass(kw_only=True, slots=True, eq=False)
class Prefix:
    """Buffers and graphs of one shape, leased to one request at a time."""

    shape: PrefixShape
    num_scales: int
    prepared: Prepared
    cache: KVCache
    capture: Capture
    graphs: dict[tuple[int, int], tuple[Tensor, Captured]] = field(default_factory=dict)
    is_leased: bool = False
    done: int = 0

    def serves(self, scale: Scale) -> bool:
        """Whether this scale is the next one of the prefix."""
        return scale.index == self.done < self.num_scales

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
        if key not in self.graphs:
            own_x_nC, own_rotation_nD = x_nC.clone(), rotation_nD.clone()

            def work() -> Tensor:
                self._fill(scale.index)
                return run(own_x_nC, own_rotation_nD, self.prepared, self.cache)

            self.graphs[key] = own_x_nC, self.capture(work)
        own_x_nC, captured = self.graphs[key]
        # The blocks add to what they are given, so it is filled anew every time.
        own_x_nC.copy_(x_nC)
        captured.replay()
        self.done = scale.index + 1
        self._fill(self.done)
        return captured.out.clone()

    def hand_over(self, cache: KVCache) -> None:
        """Moves keys and values of the scales that ran into a request's own, empty cache, and ends the prefix."""
        for block, lengths in enumerate(self.cache.lengths):
            filled = lengths[0]
            cache.k_RNMD[block][:, :, :filled] = self.cache.k_RNMD[block][:, :, :filled]
            cache.v_RNMD[block][:, :, :filled] = self.cache.v_RNMD[block][:, :, :filled]
            cache.lengths[block] = list(lengths)
        self.release()

    def release(self) -> None:
        """Ends the lease."""
        self.done, self.is_leased = self.num_scales, False

    def _fill(self, scale: int) -> None:
        """Says how much the cache holds in front of a scale; the device does not know."""
        stored = self.shape.schedule.scales[: min(scale, self.shape.num_stored)]
        filled = sum(part.num_tokens for part in stored)
        self.cache.lengths = [[filled] * len(self.shape.rows) for _ in self.cache.lengths]


class Graphs:
    """The prefixes of an engine by shape; nothing of a request is left in them that another one reads.

    A shape is captured when it is met for the second time: recording takes longer than running once.
    """

    def __init__(self, capture: Capture, most_tokens: int = MOST_TOKENS, most_shapes: int = MOST_SHAPES) -> None:
        self.capture, self.most_tokens, self.most_shapes = capture, most_tokens, most_shapes
        self._prefixes: OrderedDict[PrefixShape, Prefix | None] = OrderedDict()

    def lease(self, shape: PrefixShape, model: NextScaleModel, prepared: Prepared) -> Prefix | None:
        """A prefix for a request, with what was prepared for it; None where the plain loop shall run.

        Args:
            shape: Of the request.
            model: The same for all calls.
            prepared: Copied; the prefix does not keep it.
        """
        if shape.num_scales(self.most_tokens) == 0:
            return None
        if shape not in self._prefixes:
            self._remember(shape, None)
            return None
        prefix = self._prefixes[shape]
        if prefix is None:
            prefix = self._build(shape, model, prepared)
        elif prefix.is_leased:
            return None
        self._remember(shape, prefix)
        copy_held_(prefix.prepared, prepared)
        prefix.is_leased, prefix.done = True, 0
        return prefix

    def _build(self, shape: PrefixShape, model: NextScaleModel, prepared: Prepared) -> Prefix:
        count = shape.num_scales(self.most_tokens)
        tokens = [scale.num_tokens for scale in shape.schedule.scales[:count]]
        capacities = [sum(tokens[: shape.num_stored])] * model.shape.num_blocks
        cache = KVCache(model.shape, len(shape.rows), capacities, max(tokens), shape.dtype, model.device)
        return Prefix(shape=shape, num_scales=count, prepared=held_copy(prepared), cache=cache, capture=self.capture)

    def _remember(self, shape: PrefixShape, prefix: Prefix | None) -> None:
        self._prefixes[shape] = prefix
        self._prefixes.move_to_end(shape)
        while len(self._prefixes) > self.most_shapes:
            self._prefixes.popitem(last=False)
