"""One request at one scale: what its plan lets run, where those tokens lie, what is recorded, and what it commits.

A run reads the state of its request and leaves it as it is; `commit` is the one place that changes it, at the end.
Axes: B images, R rows, n packed tokens, l tokens of the scale, k tokens of a row, P blocks, C width, V outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from foveate.core.cost import PREFIX_SCALE, Row
from foveate.core.errors import PlanConflictError
from foveate.core.held import held_bytes
from foveate.core.plan import CachedFill, Keep, KeepDifference, KeepOutputs, ScalePlan, Unit
from foveate.core.protocols import NextScaleModel, PrefixTokens, Prepared
from foveate.core.rows import Rows
from foveate.core.schedule import Scale
from foveate.core.signals import AttentionEntropy, BlockChange, Record, Signal, SublayerInput
from foveate.engine.fills import Fills, Key
from foveate.engine.kv_cache import KVCache, Slot
from foveate.engine.select import Chosen, choose, in_front
from foveate.engine.state import RequestState
from foveate.kernels.residual import add_gated_


@dataclass(frozen=True, kw_only=True, slots=True)
class Active:
    """Packed tokens that run a block or sublayer, row after row: `index_n` is None where all do (no gather)."""

    rows: Rows
    index_n: Int[Tensor, " a"] | None

    def narrowed(self, inside: "Active") -> "Active":
        """Of these tokens those that another list names by their place among them."""
        if self.index_n is None or inside.index_n is None:
            return Active(rows=inside.rows, index_n=self.index_n if inside.index_n is None else inside.index_n)
        return Active(rows=inside.rows, index_n=self.index_n[inside.index_n])


@dataclass(kw_only=True, slots=True, eq=False)
class ScaleRun:
    """The work of one request at one scale, from its plan to what it commits.

    Attributes:
        live: The rows that run; `places` are their rows in the cache and in what was prepared.
        kept: Per live row, its tokens in grid order; None where all run.
        rows: Packed tokens per live row, those of a prefix in front.
        run_PRl: For every block and row the places in the packed list of the tokens that run it, in front.
    """

    state: RequestState
    scale: Scale
    plan: ScalePlan
    policy: Any
    dropped: frozenset[int]
    live: tuple[Row, ...]
    places: tuple[int, ...]
    prepared: Prepared
    fills: Fills
    cache: KVCache
    prefix: PrefixTokens | None
    chosen: Chosen
    kept: tuple[Int[Tensor, " _k"] | None, ...]
    rows: Rows
    run_PRl: Int[Tensor, "P R l"] | None
    records: frozenset[Record]
    keeps: frozenset[Keep]
    dtype: torch.dtype
    outputs: dict[Key, Tensor] = field(default_factory=dict)
    sums: dict[BlockChange, Tensor] = field(default_factory=dict)
    values: dict[Record, Tensor] = field(default_factory=dict)
    narrowed: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    known_rows: dict[tuple[int, ...], Rows] = field(default_factory=dict)
    known_changes: dict[int, list[BlockChange]] = field(default_factory=dict)

    @classmethod
    def begin(cls, state: RequestState, model: NextScaleModel) -> "ScaleRun":
        """Asks for the plan of the next scale and lays out what it lets run; reads the device once at most.

        Raises:
            PlanConflictError: The plan does not fit this scale, or asks for what cannot be done.
        """
        request, scale = state.request, state.request.schedule.scales[state.scale]
        plan, policy = state.bound.plan(scale.index, state.signals_before(scale.index), state.policy)
        state.checker.check(plan, scale.index, scale.num_tokens)
        if request.guidance.hidden_blocks:
            refuse_thinned(state.bound.label, plan)
        chosen = choose(plan.on(state.f_hat_BZHW.device), request.num_images, scale.num_tokens, model.shape.num_blocks)
        live, dropped = _settled(state, chosen.plan, scale.index)
        places = tuple(state.live.index(row) for row in live)
        is_less = len(live) < len(state.live)
        prefix = state.prefix if scale.index == 0 else None
        keep_GBl, kept = chosen.keep_GBl, tuple[Tensor | None, ...]([None] * len(live))
        if keep_GBl is not None:
            lists_GBl = in_front(keep_GBl, torch.arange(scale.num_tokens, device=keep_GBl.device))
            kept = tuple(lists_GBl[chosen.branch(c), i][: chosen.kept[chosen.branch(c)][i]] for i, c in live)
        ahead = (0,) * len(live) if prefix is None else tuple(prefix.counts[place] for place in places)
        rows = Rows(tuple(ahead[r] + chosen.kept[chosen.branch(c)][i] for r, (i, c) in enumerate(live)))
        if prefix is not None and (kept[0] is not None or chosen.run_PGBl is not None):
            raise PlanConflictError(f"{state.bound.label}: scale 0 of this model holds its text; run all of it")
        return cls(
            state=state,
            scale=scale,
            plan=chosen.plan,
            policy=policy,
            dropped=dropped,
            live=live,
            places=places,
            prepared=state.prepared.keep(places) if is_less else state.prepared,
            fills=state.fills.of_rows(places) if is_less else state.fills,
            cache=state.cache,
            prefix=prefix,
            chosen=chosen,
            kept=kept,
            rows=rows,
            run_PRl=_row_lists(chosen, live, rows),
            records=state.bound.record(scale.index) if chosen.plan.runs else frozenset(),
            keeps=state.bound.keeps(scale.index) if chosen.plan.runs else frozenset(),
            dtype=model.compute_dtype,
        )

    # What runs

    @property
    def is_dense(self) -> bool:
        """Whether all tokens of every row run all blocks, and nothing of them is recorded."""
        settings = (self.records - set(Signal), self.keeps, self.plan.sublayers, self.plan.dtypes, self.plan.difference)
        is_plain = not any(settings)
        return is_plain and self.chosen.keep_GBl is None and self.run_PRl is None

    @property
    def weight(self) -> float:
        """Of guidance on the logits."""
        guidance = self.state.request.guidance
        return guidance.weights[self.scale.index] if guidance.on_logits else 1.0

    @property
    def headed(self) -> tuple[int, ...]:
        """Tokens of each live row that reach the head; 0 where nothing reads them."""
        reads_both = self.weight != 1.0 or Signal.LOGITS in self.records or KeepDifference() in self.keeps
        ahead = self.ahead
        return tuple(
            n - ahead[r] if is_cond or reads_both else 0
            for r, (n, (_, is_cond)) in enumerate(zip(self.rows.counts, self.live, strict=True))
        )

    @property
    def attended_twice(self) -> tuple[int, ...]:
        """Blocks whose attention runs once more, for its entropy."""
        return tuple(sorted(record.block for record in self.records if isinstance(record, AttentionEntropy)))

    @property
    def ahead(self) -> tuple[int, ...]:
        """Tokens of a prefix in each live row."""
        return (0,) * len(self.live) if self.prefix is None else tuple(self.prefix.counts[p] for p in self.places)

    def pack(self, per_image: Sequence[Tensor]) -> Tensor:
        """Gathers (l, ...) tensors, one per image, into the packed list of the scale's own tokens."""
        pairs = zip(self.live, self.kept, strict=True)
        return torch.cat([per_image[i] if index is None else per_image[i][index] for (i, _), index in pairs])

    def active(self, block: int) -> Active:
        """The packed tokens that run a block, row after row and in grid order."""
        counts = self.block_counts(block)
        if self.run_PRl is None or counts == self.rows.counts:
            return Active(rows=self.rows, index_n=None)
        rows = self.known_rows.setdefault(counts, Rows(counts))
        lists_Rl = self.run_PRl[block]
        if rows.uniform is not None:
            return Active(rows=rows, index_n=lists_Rl[:, : rows.uniform].flatten())
        return Active(rows=rows, index_n=torch.cat([row[:n] for row, n in zip(lists_Rl, counts, strict=True)]))

    def block_counts(self, block: int) -> tuple[int, ...]:
        """Tokens of each live row that run a block."""
        if self.prefix is not None:
            return self.rows.counts
        counts = self.chosen.block_counts[block]
        return tuple(counts[self.chosen.branch(is_cond)][image] for image, is_cond in self.live)

    def enter_sublayer(self, key: tuple[int, int], active: Active, part_nC: Float[Tensor, "n C"]) -> Active | None:
        """Records what enters a sublayer; the tokens of the block that run it by the plan's scorers, None if all do."""
        if self.records and SublayerInput(block=key[0], sublayer=key[1]) in self.records:
            self.values[SublayerInput(block=key[0], sublayer=key[1])] = self.on_grid(part_nC.float(), active)
        return self._pick(key, active.rows, part_nC) if self.plan.sublayers else None

    def _pick(self, key: tuple[int, int], rows: Rows, part_nC: Float[Tensor, "n C"]) -> Active | None:
        block, sublayer = key
        picked: Active | None = None
        for selection in self.plan.sublayers:
            if block not in selection.blocks:
                continue
            before = rows if picked is None else picked.rows
            counts = tuple(min(n, selection.count) for n in before.counts)
            if counts == before.counts:
                continue
            x_nC = part_nC if picked is None else part_nC[picked.index_n]
            places = [
                start + selection.scorer(x_kC[None])[0].argsort(descending=True, stable=True)[:count].sort().values
                for start, x_kC, count in zip(before.starts, x_nC.split(before.counts), counts, strict=False)
            ]
            here = Active(rows=self.known_rows.setdefault(counts, Rows(counts)), index_n=torch.cat(places))
            picked = here if picked is None else picked.narrowed(here)
        if picked is not None:
            self.narrowed.setdefault(block, {})[sublayer] = picked.rows.counts
        return picked

    def slot(self, block: int, rows: Rows) -> Slot:
        """The cache's view of one block."""
        return Slot(
            self.cache,
            block,
            rows,
            self.places,
            is_stored=self.scale.index < self.state.limits.num_stored,
            wants_entropy=bool(self.records) and AttentionEntropy(block=block) in self.records,
        )

    # What is filled and recorded

    def has_key(self, block: int, sublayer: int | None) -> bool:
        """Whether the outputs of a block, or of one of its sublayers, are kept."""
        if not self.keeps:
            return False
        unit = Unit.BLOCK if sublayer is None else Unit.SUBLAYER
        parts = [keep for keep in self.keeps if isinstance(keep, KeepOutputs) and keep.unit is unit]
        return any(keep.blocks is None or block in keep.blocks for keep in parts)

    def reads_change(self, block: int) -> bool:
        """Whether a block's own change has to be known."""
        return bool(self.keeps or self.records) and (bool(self._changes(block)) or self.has_key(block, None))

    def _changes(self, block: int) -> list[BlockChange]:
        if block not in self.known_changes:
            changes = [r for r in self.records if isinstance(r, BlockChange) and r.first <= block < r.end]
            self.known_changes[block] = changes
        return self.known_changes[block]

    def fill_(self, block: int, x_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n C"] | None:
        """Adds the kept outputs of a block to all packed tokens, in place; returns them where `record` needs them."""
        fill = self.plan.fill
        if fill is None or fill.unit is not Unit.BLOCK:
            return None
        if self.chosen.keep_GBl is None and not self.reads_change(block):
            self.fills.add_resized_((block, None), fill, self.scale.grid, x_nC)
            return None
        fill_nC = self.filling((block, None), fill, None)
        if fill_nC is not None:
            add_gated_(x_nC, fill_nC, None, self.rows)
        return fill_nC

    def filling(self, key: Key, fill: CachedFill, index_n: Int[Tensor, " a"] | None) -> Float[Tensor, "a C"] | None:
        """Kept outputs at the packed tokens, or at some of them; None before anything was kept."""
        resized_RlC = self.fills.resized(key, fill, self.scale.grid)
        if resized_RlC is None:
            return None
        if self.chosen.keep_GBl is None:
            packed_nC = resized_RlC.flatten(0, 1)
        else:
            pairs = zip(resized_RlC, self.kept, strict=True)
            packed_nC = torch.cat([row_lC if kept is None else row_lC[kept] for row_lC, kept in pairs])
        return packed_nC if index_n is None else packed_nC[index_n]

    def record(self, block: int, delta_aC: Tensor, index_a: Tensor | None, fill_nC: Tensor | None) -> None:
        """Completes a block's deltas to the whole grid and keeps what was asked for."""
        delta_RlC = self._completed((block, None), delta_aC.to(self.dtype), index_a, fill_nC)
        if self.has_key(block, None):
            self.outputs[(block, None)] = delta_RlC
        for change in self._changes(block):
            before = self.sums.pop(change, None)
            total_RlC = delta_RlC if before is None else before + delta_RlC
            if block + 1 < change.end:
                self.sums[change] = total_RlC
            else:
                self.values[change] = self._size(total_RlC, change)

    def record_sublayer(self, key: Key, output_aC: Tensor, index_a: Tensor | None) -> None:
        """Keeps what a sublayer added, completed to the whole grid."""
        self.outputs[key] = self._completed(key, output_aC.to(self.dtype), index_a, None)

    def record_entropy(self, block: int, entropy_a: Float[Tensor, " a"] | None, active: Active) -> None:
        """Notes the entropy of attention, where it was computed."""
        if entropy_a is None:
            return
        self.values[AttentionEntropy(block=block)] = self.on_grid(entropy_a[:, None], active)[..., 0]

    def idle_values(self, width: int) -> dict[Record, Tensor]:
        """Values that were asked of blocks which no token ran: zero, as wherever a token did not run."""
        like, shape = self.state.f_hat_BZHW, (self.state.request.num_images, self.scale.num_tokens)
        idle: dict[Record, Tensor] = {}
        for record in self.records - self.values.keys():
            if isinstance(record, AttentionEntropy):
                idle[record] = like.new_zeros(shape, dtype=torch.float32)
            elif isinstance(record, SublayerInput):
                idle[record] = like.new_zeros((*shape, width), dtype=torch.float32)
        return idle

    def on_grid(self, part_aC: Shaped[Tensor, "a C"], active: Active) -> Shaped[Tensor, "B l C"]:
        """Values of the conditional rows on the grid, zero where a token did not run; a prefix is left out."""
        whole_nC = part_aC
        if active.index_n is not None:
            whole_nC = part_aC.new_zeros(self.rows.total, part_aC.shape[-1])
            whole_nC[active.index_n] = part_aC
        out_BlC = part_aC.new_zeros(self.state.request.num_images, self.scale.num_tokens, part_aC.shape[-1])
        for row_lC, own_nC, kept, ahead in zip(
            out_BlC, whole_nC.split(self.rows.counts), self.kept, self.ahead, strict=False
        ):
            row_lC[slice(None) if kept is None else kept] = own_nC[ahead:]
        return out_BlC

    def _size(self, delta_RlC: Float[Tensor, "R l C"], change: BlockChange) -> Float[Tensor, "B l"]:
        """Mean over channels of |delta| or its square, of the conditional rows or averaged over an image's rows."""
        num_images = self.state.request.num_images
        if change.branches == "conditional":
            delta_RlC = delta_RlC[:num_images]
        sized_Rl = (delta_RlC.abs() if change.power == 1 else delta_RlC.float().square()).mean(-1, dtype=torch.float32)
        if len(sized_Rl) == num_images:
            return sized_Rl
        sized_Bl = sized_Rl[:num_images].clone()
        for r, (image, is_cond) in enumerate(self.live):
            if not is_cond:
                sized_Bl[image] = (sized_Bl[image] + sized_Rl[r]) / 2
        return sized_Bl

    def _completed(
        self, key: Key, delta_aC: Tensor, index_a: Tensor | None, fill_nC: Tensor | None
    ) -> Float[Tensor, "R l C"]:
        """Deltas on the whole grid: skipping tokens have their fill, dropped ones the resized kept output or zero."""
        if index_a is not None:
            whole = (
                delta_aC.new_zeros(self.rows.total, delta_aC.shape[-1])
                if fill_nC is None
                else fill_nC.to(self.dtype).clone()
            )
            whole[index_a] = delta_aC
            delta_aC = whole
        num_tokens = self.scale.num_tokens
        if self.prefix is not None:
            pairs = zip(delta_aC.split(self.rows.counts), self.ahead, strict=True)
            return torch.stack([part[ahead:] for part, ahead in pairs])
        if self.chosen.keep_GBl is None:
            return delta_aC.view(len(self.live), num_tokens, -1)
        resized_RlC = self.fills.resized(key, replace(self.plan.fill or CachedFill(), source=None), self.scale.grid)
        if resized_RlC is None:
            whole_RlC = delta_aC.new_zeros(len(self.live), num_tokens, delta_aC.shape[-1])
        else:
            whole_RlC = resized_RlC.clone()
        for r, (part, kept) in enumerate(zip(delta_aC.split(self.rows.counts), self.kept, strict=True)):
            whole_RlC[r, slice(None) if kept is None else kept] = part
        return whole_RlC

    # What is committed

    def committed(self) -> Bool[Tensor, "B l"] | None:
        """The tokens that commit a code; None if all do."""
        keep_GBl = self.chosen.keep_GBl
        return None if keep_GBl is None or not self.plan.selections else keep_GBl[0]

    def kept_images(self) -> tuple[Int[Tensor, " _k"], ...] | None:
        """Each image's tokens that commit a code; None if all do."""
        kept = self.kept[: self.state.request.num_images]
        return None if self.committed() is None else tuple(index for index in kept if index is not None)

    def counts_of_cache(self) -> list[list[int]]:
        """Per block, the tokens that each row of the cache has stored at this scale, a prefix left out."""
        counts = []
        for block in range(self.state.trace.shape.num_blocks):
            ran = self.narrowed.get(block, {}).get(0, self.block_counts(block))
            counts.append([n - ahead for n, ahead in zip(ran, self.ahead, strict=True)])
        return counts

    def commit(self) -> None:
        """Takes rows, cache and fills of the request over to what this scale leaves; nothing here can fail halfway."""
        state = self.state
        state.policy, state.dropped, state.scale = self.policy, self.dropped, self.scale.index + 1
        if self.plan.runs:
            if len(self.live) < len(state.live):
                state.cache.keep(self.places)
                state.live, state.prepared, state.fills = self.live, self.prepared, self.fills
                state.prepared_bytes = held_bytes(self.prepared)
            if self.scale.index < state.limits.num_stored and state.graph is None:
                if self.prefix is not None:
                    state.cache.commit(PREFIX_SCALE, [list(self.ahead)] * len(state.cache.lengths))
                state.cache.commit(self.scale.index, self.counts_of_cache())
            if self.outputs:
                state.fills = Fills(scale=self.scale.index, grid=self.scale.grid, outputs=dict(self.outputs))
        if self.plan.evict:
            state.leave_graph()
        for scale in self.plan.evict:
            state.cache.evict(scale)


def refuse_thinned(label: str, plan: ScalePlan) -> None:
    """Refuses a plan that thins a branch, for a request whose guidance combines the branches inside the blocks.

    Raises:
        PlanConflictError: Names the policy.
    """
    if plan.unconditional_tokens or plan.difference:
        raise PlanConflictError(
            f"{label}: guidance inside the blocks needs both branches at every token; combine guidance "
            "on logits only, or leave this policy out"
        )


def _settled(state: RequestState, plan: ScalePlan, scale: int) -> tuple[tuple[Row, ...], frozenset[int]]:
    """The rows that run: without unconditional ones that the plan stops or that guidance no longer needs.

    Raises:
        PlanConflictError: The plan asks for a branch that an earlier plan dropped.
    """
    wanted = (True,) if plan.unconditional is None else plan.unconditional
    images = {image for image, _ in state.live}
    asked = {i for i in images if wanted[i % len(wanted)]}
    is_needed, dropped = state.request.guidance.is_needed(scale), state.dropped
    if plan.runs and is_needed and asked & dropped:
        raise PlanConflictError(
            f"scale {scale}: a dropped unconditional branch cannot return, image {min(asked & dropped)}; "
            "drop it at every later scale, too"
        )
    if is_needed:
        dropped |= images - asked
    stopped = images - asked if is_needed else images
    # A scale that does not run reads no row: what may be the last one would only move memory.
    if not plan.runs:
        return state.live, dropped
    return tuple(row for row in state.live if row[1] or row[0] not in stopped), dropped


def _row_lists(chosen: Chosen, live: Sequence[Row], rows: Rows) -> Int[Tensor, "P R l"] | None:
    """Per block and row, the places in the packed list of the tokens that run, in front; behind them anything.

    None where every row runs all it keeps, in all blocks.
    """
    if chosen.run_PGBl is None:
        return None
    if all(block == chosen.kept for block in chosen.block_counts):
        return None
    num_tokens = chosen.run_PGBl.shape[-1]
    if chosen.keep_GBl is None:
        place_GBl = torch.arange(num_tokens, device=chosen.run_PGBl.device)[None, None]
    else:
        place_GBl = chosen.keep_GBl.cumsum(-1) - 1
    lists_PGBl = in_front(chosen.run_PGBl, place_GBl)
    num_branches = chosen.run_PGBl.shape[1]
    starts = zip(live, rows.starts, strict=False)
    return torch.stack([lists_PGBl[:, 0 if c else num_branches - 1, image] + s for (image, c), s in starts], dim=1)
