"""Cost of a keyed random number on this machine, in nanoseconds: the formula of the contract, plain numpy, and C.

    python benchmarks/draws.py --threads 1

Uniform draws are for bits, exponential ones for ids. The three take turns in one process, which keeps its heap as a
request does, or with `--new-pages` asks the system for every large array; a figure is the median over the rounds, with
p10-p90, and the ratio to the formula is formed within a round. All three are compared bit for bit first.
"""

import argparse
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch

from foveate.bench.rounds import alternate
from foveate.bench.spread import Spread
from foveate.kernels import draws, native
from foveate.kernels.heap import kept_heap

Key = tuple[int, int]
KEY: Key = (7, 256 * 12)


def formula(key: Key, count: int, is_exponential: bool) -> np.ndarray:
    """All at once, in float64."""
    raw = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(count)
    u = ((raw >> np.uint64(41)).astype(np.float64) + 0.5) * 2.0**-23
    return (-np.log(u) if is_exponential else u).astype(np.float32)


def ours(key: Key, count: int, is_exponential: bool) -> np.ndarray:
    """In C where this machine has it, else in numpy."""
    return (draws.exponential if is_exponential else draws.uniform)(key, (count,))


@contextmanager
def without_library() -> Generator[None, None, None]:
    with patch.object(native, "library", lambda: None):
        yield


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    name: str
    draw: Callable[[Key, int, bool], np.ndarray]
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def ns_per_draw(self, count: int, is_exponential: bool) -> float:
        with self.within():
            start = time.perf_counter()
            self.draw(KEY, count, is_exponential)
            return (time.perf_counter() - start) * 1e9 / count

    def has_the_bits(self, expected: np.ndarray, is_exponential: bool) -> bool:
        with self.within():
            return np.array_equal(self.draw(KEY, expected.size, is_exponential), expected)


def sides() -> list[Side]:
    """The formula, and what this machine has."""
    plain = [Side(name="formula", draw=formula), Side(name="numpy", draw=ours, within=without_library)]
    return plain if native.library() is None else [*plain, Side(name="C", draw=ours)]


def table(count: int, is_exponential: bool, runs: int) -> list[str]:
    """One line for every side."""
    compared = sides()
    expected = formula(KEY, count, is_exponential)
    for side in compared:
        if not side.has_the_bits(expected, is_exponential):
            raise SystemExit(f"{side.name} draws other numbers than the formula")
    rounds = alternate(
        lambda side, _: compared[side].ns_per_draw(count, is_exponential),
        len(compared),
        runs=runs,
        warmup=2,
        after_round=lambda: None,
    )
    lines = []
    for index, side in enumerate(compared):
        ns = Spread.of(rounds.of(index))
        ratio = Spread.of([old / new for old, new in zip(rounds.of(0), rounds.of(index), strict=True)])
        lines.append(
            f"{'ids' if is_exponential else 'bits':5} {side.name:8} {count:9,} "
            f"{ns.median:6.2f} ns ({ns.p10:.2f}-{ns.p90:.2f})  {ratio.median:5.1f} x ({ratio.p10:.1f}-{ratio.p90:.1f})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count",
        type=int,
        nargs="+",
        default=[4096, 131072, 1048576],
        help="numbers of a call: h * w * bits, or V",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=30, help="rounds that count")
    parser.add_argument("--new-pages", action="store_true", help="let the heap go after every call")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{native.describe()}, {torch.get_num_threads()} threads, {args.runs} rounds")
    with nullcontext() if args.new_pages else kept_heap():
        for count in args.count:
            for is_exponential in (False, True):
                print("\n".join(table(count, is_exponential, args.runs)))


if __name__ == "__main__":
    main()
