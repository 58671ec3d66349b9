"""Compares two runs of `foveate batch`, image by image, however many there are.

In memory are one batch of images, 43 bytes of scores a pair and 8 more for every judge (43 and 8 once more for the
reference where there are judges), 4 bytes a row of counts, 8 bytes a row of ids, and the entries of the worst pairs.
Intervals are drawn in chunks.
"""

import heapq
import io
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from tqdm import tqdm

from foveate.bulk.output import OutputFolder
from foveate.bulk.pairing import SIDES, Entry, Pair, Pairing
from foveate.bulk.runs_report import MOST_NAMES, NAMES, RunSide, RunsReport
from foveate.bulk.scores import Scores
from foveate.core.errors import FoveateError
from foveate.eval.compare import MOST_SHOWN, refuse_without_extra
from foveate.eval.fidelity import PSNR_CAP_DB
from foveate.eval.judges import Judge
from foveate.eval.pairs import FidelityReport, PairColumns, PairScores, fidelity, judge_scores, score_pairs
from foveate.eval.report import ImageRow, ShownImage


def compare_runs(
    reference: OutputFolder,
    other: OutputFolder,
    *,
    judges: Sequence[Judge] = (),
    batch_size: int = 1,
    scores: tuple[Scores, Scores] | None = None,
    hides_progress: bool | None = None,
) -> RunsReport:
    """Compares every image of a run with that of the same row and number of another.

    Args:
        reference: The run that the other one is held against.
        other: The run in question.
        judges: Who else scores every image.
        batch_size: Images that are scored at once, and held.
        scores: What a scorer said of the reference and of the other run.
        hides_progress: False shows progress on stderr, True hides it, None shows it only where that is a terminal.

    Returns:
        Figures of both; after Ctrl-C those of the pairs until then, and `is_interrupted` says so.

    Raises:
        FoveateError: There is nothing to compare, a folder cannot be read, or flip-evaluator is missing.
        KeyboardInterrupt: Ctrl-C before the first pair.
    """
    refuse_without_extra()
    pairing = Pairing(reference, other)
    scorer = _Scorer(runs=(reference, other), judges=tuple(judges))
    is_interrupted = False
    try:
        with tqdm(total=pairing.counts.rows, disable=hides_progress, unit="row", leave=False) as bar:
            for batch in _batches(pairing.pairs(), batch_size):
                scorer.score(batch)
                bar.update(sum(pair.is_first for pair in batch))
    except KeyboardInterrupt:
        scorer.settle()
        if not len(scorer.columns):
            raise
        is_interrupted = True
    if not len(scorer.columns):
        raise FoveateError(
            f"{reference.path} and {other.path} have no pair of images to compare: {pairing.counts.rows} rows in both, "
            f"{pairing.counts.other_prompts} pairs of other prompts, {pairing.counts.other_sizes} of other sizes; "
            "make both from one input"
        )
    return scorer.report(pairing, scores, is_interrupted=is_interrupted)


@dataclass(kw_only=True, slots=True)
class _Seen:
    """What the entries of one run's pairs say, summed up."""

    flops_run: int = 0
    flops_full: int = 0
    names: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in NAMES})

    def add(self, entry: Entry) -> None:
        """Takes an entry in."""
        self.flops_run += entry["flops_run"]
        self.flops_full += entry["flops_full"]
        for name, found in self.names.items():
            value = str(entry.get(name))
            if value not in found and len(found) <= MOST_NAMES:
                found.append(value)

    def side(self, run: OutputFolder, scores: Scores | None, judged: FidelityReport | None) -> RunSide:
        """The run for the report."""
        return RunSide(
            folder=run.path,
            config=run.config,
            flops_ratio=self.flops_run / max(self.flops_full, 1),
            names={name: tuple(found) for name, found in self.names.items()},
            scores=scores,
            judged=judged,
        )


class _Scorer:
    """Scores batches, and keeps what a report needs of them."""

    def __init__(self, *, runs: tuple[OutputFolder, OutputFolder], judges: tuple[Judge, ...]) -> None:
        self.runs, self.judges = runs, judges
        self.columns, self.own = PairColumns(), PairColumns()
        self.counts: array[int] = array("i")
        self.seen = {side: _Seen() for side in SIDES}
        self.worst: list[tuple[float, int, PairScores, Pair]] = []
        self._number = 0

    def score(self, batch: Sequence[Pair]) -> None:
        """One batch of images of one size."""
        references = np.stack([_pixels(self.runs[0], pair.reference) for pair in batch])
        images = np.stack([_pixels(self.runs[1], pair.other) for pair in batch])
        prompts = [pair.other["prompt"] for pair in batch]
        found = score_pairs(images, references, prompts, self.judges)
        if self.judges:
            judged = judge_scores(references, references, prompts, self.judges)
            own = ({name: values[i] for name, values in judged.items()} for i in range(len(batch)))
            self.own.extend(_beside_itself(pair, of_one) for pair, of_one in zip(found, own, strict=True))
        self.columns.extend(found)
        for pair, scores in zip(batch, found, strict=True):
            self._keep(pair, scores)

    def settle(self) -> None:
        """Leaves out what Ctrl-C cut in the middle of a batch, so that all columns are of the same pairs."""
        number = min(len(self.columns), sum(self.counts), *([len(self.own)] if self.judges else []))
        self.columns.keep(number)
        self.own.keep(number)
        while (more := sum(self.counts) - number) > 0:
            last = self.counts.pop()
            if last > more:
                self.counts.append(last - more)

    def report(self, pairing: Pairing, scores: tuple[Scores, Scores] | None, *, is_interrupted: bool) -> RunsReport:
        """What came of all batches."""
        errors = [judge.name for judge in self.judges if judge.is_error]
        found = fidelity(self.columns, self.counts, errors)
        own = fidelity(self.own, self.counts, errors) if self.judges else None
        of_reference, of_other = (None, None) if scores is None else scores
        return RunsReport(
            reference=self.seen["reference"].side(self.runs[0], of_reference, own),
            other=self.seen["other"].side(self.runs[1], of_other, found),
            fidelity=found,
            counts=pairing.counts,
            shown=tuple(self._shown()),
            is_interrupted=is_interrupted,
        )

    def _keep(self, pair: Pair, scores: PairScores) -> None:
        if pair.is_first:
            self.counts.append(0)
        self.counts[-1] += 1
        self._number += 1
        for side, entry in zip(SIDES, (pair.reference, pair.other), strict=True):
            self.seen[side].add(entry)
        if scores.is_reference_constant:
            return
        # What leaves a heap is its smallest item: the best pair, and of equal ones the last.
        item = (-scores.psnr, -self._number, scores, pair)
        if len(self.worst) < MOST_SHOWN:
            heapq.heappush(self.worst, item)
        else:
            heapq.heappushpop(self.worst, item)

    def _shown(self) -> Iterator[ShownImage]:
        """The worst pairs, in the order of rows."""
        for _, _, scores, pair in sorted(self.worst, key=lambda item: -item[1]):
            yield ShownImage(
                row=ImageRow(prompt=pair.other["prompt"], seed=pair.other["seed"], scores=scores),
                picture=_pixels(self.runs[1], pair.other),
                reference=_pixels(self.runs[0], pair.reference),
                maps=(),
            )


def _batches(pairs: Iterator[Pair], batch_size: int) -> Iterator[list[Pair]]:
    """Pairs in order, those of one size together."""
    batch: list[Pair] = []
    for pair in pairs:
        if batch and (len(batch) == batch_size or _size(batch[0]) != _size(pair)):
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def _size(pair: Pair) -> tuple[int, int]:
    return pair.other["width"], pair.other["height"]


def _pixels(run: OutputFolder, entry: Entry) -> np.ndarray:
    """The image of an entry, uint8 (height, width, 3)."""
    try:
        with Image.open(io.BytesIO(run.content(entry))) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise FoveateError(
            f"cannot decode image {entry['image']} of row {entry['id']!r} of {run.path}: {error}"
        ) from None
    if pixels.shape[:2] != (entry["height"], entry["width"]):
        raise FoveateError(
            f"image {entry['image']} of row {entry['id']!r} of {run.path} is {pixels.shape[1]}x{pixels.shape[0]}, its "
            f"entry says {entry['width']}x{entry['height']}; restore both from a copy"
        )
    return pixels


def _beside_itself(pair: PairScores, judged: dict[str, float]) -> PairScores:
    """The reference of a pair beside itself: what is no judgement is known."""
    return PairScores(
        psnr=PSNR_CAP_DB,
        foreground_psnr=PSNR_CAP_DB,
        ssim=1.0,
        ms_ssim=None if pair.ms_ssim is None else 1.0,
        flip=0.0,
        is_identical=True,
        is_constant=pair.is_reference_constant,
        is_reference_constant=pair.is_reference_constant,
        judged=judged,
    )
