"""Several requests at their next scale, packed into one batch: one matmul serves all of them.

Linear layers, norms and the head compute each token by itself, so what stands beside it does not matter; attention and
everything that a policy decides stay with each request.
Axes: n packed tokens of all requests, a those that run a block, C width, D numbers of a position, V outputs.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import UnsupportedError
from foveate.core.protocols import Block, BlockContext, NextScaleModel, Prepared, ScaleTokenizer
from foveate.core.rows import Rows
from foveate.engine.branches import combine_hidden_, joined
from foveate.engine.fills import Key
from foveate.engine.kv_cache import JoinedSlot
from foveate.engine.scale_run import Active, ScaleRun
from foveate.kernels.residual import add_gated_, gated


class Company:
    """Runs that share their matmuls; all of them narrow the same blocks to the same dtypes."""

    def __init__(self, runs: Sequence[ScaleRun]) -> None:
        self.runs = tuple(runs)
        self.rows = runs[0].rows if len(runs) == 1 else Rows(tuple(n for run in runs for n in run.rows.counts))
        self.prepared = _joined_prepared(runs)

    def enter(self, model: NextScaleModel, tokenizer: ScaleTokenizer) -> tuple[Float[Tensor, "n C"], Tensor]:
        """Hidden states that enter the first block, and each token's position; both branches share an embedding."""
        entered = [_enter(run, model, tokenizer) for run in self.runs]
        x_nC = joined([x for x, _ in entered])
        return x_nC, joined([rotation for _, rotation in entered])

    def split(self, packed: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
        """Each run's part of a packed list, as a view."""
        return (packed,) if len(self.runs) == 1 else packed.split(list(counts))

    def headed(self, x_nC: Float[Tensor, "n C"]) -> tuple[Float[Tensor, "k C"], Rows]:
        """The tokens that reach the head, and how many of each row they are, up to the last row that has any."""
        counts = tuple(n for run in self.runs for n in run.headed)
        if counts == self.rows.counts:
            return x_nC, self.rows
        parts = x_nC.split(self.rows.counts)
        last = max(r for r, n in enumerate(counts) if n)
        packed_kC = joined([part[len(part) - n :] for part, n in zip(parts, counts, strict=True) if n])
        return packed_kC, Rows(counts[: last + 1])

    def blocks(
        self, x_nC: Float[Tensor, "n C"], rotation_nD: Float[Tensor, "n D"], blocks: Sequence[Callable[[], Block]]
    ) -> None:
        """Runs all blocks over the packed tokens, which they change in place."""
        for index, block in enumerate(blocks):
            self._block(index, block, x_nC, rotation_nD)

    def _block(
        self, index: int, block: Callable[[], Block], x_nC: Float[Tensor, "n C"], rotation_nD: Float[Tensor, "n D"]
    ) -> None:
        """Runs one block; a function of its own, so that its large tensors are freed before the next one's are made."""
        x_parts = self.split(x_nC, [run.rows.total for run in self.runs])
        actives = [run.active(index) for run in self.runs]
        active = self._packed(actives)
        part_nC = x_nC if active.index_n is None else x_nC[active.index_n]
        parts = self.split(part_nC, [own.rows.total for own in actives])
        befores = [
            part.clone() if run.reads_change(index) else None for run, part in zip(self.runs, parts, strict=True)
        ]
        if active.rows.total:
            rotation_aD = rotation_nD if active.index_n is None else rotation_nD[active.index_n]
            self._sublayers(block(), index, actives, active.rows, part_nC, rotation_aD)
        fills = [
            None if own.index_n is None else run.fill_(index, x_part)
            for run, own, x_part in zip(self.runs, actives, x_parts, strict=True)
        ]
        if active.index_n is not None:
            x_nC[active.index_n] = part_nC
        for run, own, part, before, fill, x_part in zip(
            self.runs, actives, parts, befores, fills, x_parts, strict=True
        ):
            if before is not None:
                run.record(index, part - before, own.index_n, fill)
            guidance = run.state.request.guidance
            if index in guidance.hidden_blocks:
                combine_hidden_(x_part, run.live, run.rows, guidance.weights[run.scale.index])

    def _packed(self, actives: Sequence[Active]) -> Active:
        """The active tokens of all runs as places in the packed list of all."""
        if len(actives) == 1:
            return actives[0]
        if all(own.index_n is None for own in actives):
            return Active(rows=self.rows, index_n=None)
        totals = [run.rows.total for run in self.runs]
        return _behind_each_other(actives, totals, self.runs[0].state.f_hat_BZHW.device)

    def _sublayers(
        self, block: Block, index: int, actives: Sequence[Active], rows: Rows, part_nC: Tensor, rotation_nD: Tensor
    ) -> None:
        """Runs the sublayers of one block over the tokens that run it, which they change in place."""
        counts = [own.rows.total for own in actives]
        parts = self.split(part_nC, counts)
        slots = [run.slot(index, own.rows) for run, own in zip(self.runs, actives, strict=True)]
        context = BlockContext(
            rows=rows,
            prepared=self.prepared,
            rotation_nD=rotation_nD,
            slot=slots[0] if len(slots) == 1 else JoinedSlot(slots),
        )
        for sublayer in range(block.num_sublayers):
            key = (index, sublayer)
            entering = zip(self.runs, actives, parts, strict=True)
            picked = [run.enter_sublayer(key, own, part) for run, own, part in entering]
            if any(own is not None for own in picked):
                self._picked_sublayer(block, key, actives, picked, part_nC, rotation_nD)
                continue
            change = block.change(sublayer, part_nC, context)
            if any(run.has_key(index, sublayer) for run in self.runs):
                self._keep(key, actives, gated(change.value_nC, change.gate_RC, rows))
            add_gated_(part_nC, change.value_nC, change.gate_RC, rows)
            if sublayer == 0:
                for run, own, slot in zip(self.runs, actives, slots, strict=True):
                    run.record_entropy(index, slot.entropy_n, own)

    def _keep(self, key: Key, actives: Sequence[Active], output_nC: Float[Tensor, "a C"]) -> None:
        """Keeps what a sublayer added to the tokens that run its block, for the runs that want it."""
        outputs = self.split(output_nC, [own.rows.total for own in actives])
        for run, own, output in zip(self.runs, actives, outputs, strict=True):
            if run.has_key(*key):
                run.record_sublayer(key, output, own.index_n)

    def _picked_sublayer(
        self,
        block: Block,
        key: tuple[int, int],
        actives: Sequence[Active],
        picked: Sequence[Active | None],
        part_nC: Tensor,
        rotation_nD: Tensor,
    ) -> None:
        """Runs one sublayer over the tokens that each run picked; the others of that run take its fill."""
        inside = [
            Active(rows=own.rows, index_n=None) if pick is None else pick
            for own, pick in zip(actives, picked, strict=True)
        ]
        chosen = _behind_each_other(inside, [own.rows.total for own in actives], part_nC.device)
        slots = [run.slot(key[0], pick.rows) for run, pick in zip(self.runs, inside, strict=True)]
        context = BlockContext(
            rows=chosen.rows,
            prepared=self.prepared,
            rotation_nD=rotation_nD[chosen.index_n],
            slot=slots[0] if len(slots) == 1 else JoinedSlot(slots),
        )
        change = block.change(key[1], part_nC[chosen.index_n], context)
        added_nC = torch.zeros_like(part_nC)
        parts = self.split(added_nC, [own.rows.total for own in actives])
        for run, own, pick, added in zip(self.runs, actives, picked, parts, strict=True):
            filling = None if pick is None or run.plan.fill is None else run.filling(key, run.plan.fill, own.index_n)
            if filling is not None:
                added.copy_(filling)
        added_nC[chosen.index_n] = gated(change.value_nC, change.gate_RC, chosen.rows)
        self._keep(key, actives, added_nC)
        part_nC += added_nC
        for run, own, pick, slot in zip(self.runs, actives, inside, slots, strict=True):
            if key[1] == 0:
                run.record_entropy(key[0], slot.entropy_n, own.narrowed(pick))


def _behind_each_other(actives: Sequence[Active], totals: Sequence[int], device: torch.device) -> Active:
    """The tokens of several lists as places in the list of all of them; `totals` are the lengths of the lists."""
    places, first = [], 0
    for own, total in zip(actives, totals, strict=True):
        places.append((torch.arange(total, device=device) if own.index_n is None else own.index_n) + first)
        first += total
    return Active(rows=Rows(tuple(n for own in actives for n in own.rows.counts)), index_n=torch.cat(places))


def _enter(run: ScaleRun, model: NextScaleModel, tokenizer: ScaleTokenizer) -> tuple[Tensor, Tensor]:
    """Hidden states of one run's tokens, and their positions."""
    request, scale = run.state.request, run.scale
    rotation_nD = run.pack([model.positions(request.schedule, scale.index)] * request.num_images)
    if scale.index:
        input_BZhw = tokenizer.next_input(run.state.f_hat_BZHW, scale.grid)
        return run.pack(list(model.embed(input_BZhw, scale.index))), rotation_nD
    if scale.num_tokens != 1:
        raise UnsupportedError(f"scale 0 must be one token, got the grid {scale.grid}")
    x_RC = model.start(run.prepared)
    if run.prefix is None:
        return x_RC.clone(), rotation_nD
    ahead = run.state.prefix
    assert ahead is not None, "the run has one"
    return (
        _interleaved(ahead.x_nC, ahead.counts, x_RC, run.places),
        _interleaved(ahead.rotation_nD, ahead.counts, rotation_nD, run.places),
    )


def _interleaved(prefix: Tensor, counts: Sequence[int], own: Tensor, places: Sequence[int]) -> Tensor:
    """Behind each row's prefix its own token."""
    parts = prefix.split(list(counts))
    return torch.cat([torch.cat((parts[place], own[r : r + 1])) for r, place in enumerate(places)])


def _joined_prepared(runs: Sequence[ScaleRun]) -> Prepared:
    """What was prepared for all rows of the runs; joined anew only when the batch has changed."""
    parts = tuple(run.prepared for run in runs)
    if len(parts) == 1:
        return parts[0]
    known = runs[0].state.joined
    if known is None or len(known[0]) != len(parts) or any(a is not b for a, b in zip(known[0], parts, strict=True)):
        known = (parts, parts[0].join(parts[1:]))
    for run in runs:
        run.state.joined = known
    return known[1]
