"""What is read of a store: ratios are formed within a turn of one process, and batches count when they are complete."""

from dataclasses import replace
from pathlib import Path

import pytest

from foveate.core.errors import FoveateError
from foveate.eval.measure import Setup, Sides, complete_batches, num_sessions, read
from foveate.eval.pairs import PairScores
from foveate.eval.store import Call, Store, open_store
from foveate.pipeline.options import Options
from foveate.policies.registry import load_policy

PAIR = PairScores(
    psnr=30.0, foreground_psnr=30.0, ssim=1.0, ms_ssim=None, flip=0.0, is_identical=False, is_constant=False,
    is_reference_constant=False,
)  # fmt: skip


def setup_of(prompts: int = 2, against: str = "full", batch_size: int = 1, seeds: int = 1) -> Setup:
    return Setup(
        prompts=tuple(f"p{i}" for i in range(prompts)), seeds=seeds, first_seed=0, against=load_policy(against), runs=1,
        batch_size=batch_size, options={},
    )  # fmt: skip


def add(store: Store, side: str, batch: int, ms: float, session: str = "a", run: int = 0) -> None:
    parts = {"text": 0.0, "transformer": ms, "decoder": 10.0, "total": ms + 10}
    store.add_call(
        Call(side=side, batch=batch, run=run, session=session, ms=parts, scale_ms=(1.0, ms - 1), grids=((1, 1), (2, 2)),
             flops_run=1, flops_full=4)
    )  # fmt: skip


def test_ratios_are_formed_within_a_turn_of_one_process(tmp_path: Path) -> None:
    sides = Sides.of([load_policy("skip-scales")], setup_of())
    reference, policy = sides.reference, sides.policies[0]
    with open_store(tmp_path / "s", {}) as store:
        # The machine was three times as slow when the run went on.
        add(store, reference.key, 0, 100.0, "a")
        add(store, reference.key, 0, 300.0, "b")
        add(store, policy.key, 0, 150.0, "b")
        for run, (full, own) in enumerate(((100.0, 50.0), (100.0, 20.0), (100.0, 25.0))):
            add(store, reference.key, 1, full, "b", run)
            add(store, policy.key, 1, own, "b", run)
        for batch in (0, 1):
            store.add_scores(policy.key, batch, [PAIR])
        found = read(store, policy, reference, [0, 1])
    assert found.ratios["transformer"] == (2.0, 4.0), "the median over the rounds of a batch"
    assert found.ms["transformer"] == (150.0, 25.0)
    assert (found.runs, found.flops_ratio) == (1, 0.25)
    assert found.scale_ms[1] == (1.0, 24.0)
    assert num_sessions(store, sides, [0, 1]) == 2


def test_a_batch_counts_when_every_side_has_run_and_was_scored(tmp_path: Path) -> None:
    setup = setup_of()
    sides = Sides.of([load_policy("skip-scales")], setup)
    with open_store(tmp_path / "s", {}) as store:
        for side in sides.all():
            add(store, side.key, 1, 1.0)
            assert complete_batches(sides, setup, store) == ()
            if side is not sides.reference:
                store.add_scores(side.key, 1, [PAIR])
        assert complete_batches(sides, setup, store) == (1,)
        # The reference of batch 0 ran in another process than what stands beside it.
        for side in sides.all():
            add(store, side.key, 0, 1.0, "b" if side is sides.reference else "a")
            store.add_scores(side.key, 0, [PAIR])
        assert complete_batches(sides, setup, store) == (1,)


@pytest.mark.parametrize("options", [{"budget": 0.5}, {"latency_budget_ms": 100.0}, {"policy": "full"}])
def test_options_that_would_replace_the_reference_are_refused(options: Options) -> None:
    with pytest.raises(FoveateError, match=rf"a comparison sets {next(iter(options))} itself"):
        replace(setup_of(), options=options)


def test_sides_of_a_comparison() -> None:
    sides = Sides.of([load_policy("full"), load_policy("skip-scales:count=1"), load_policy("skip-scales")], setup_of())
    assert [side.policy.spec for side in sides.policies] == ["full", "skip-scales"]
    assert len({side.key for side in sides.all()}) == len(sides.all()) == 4
    assert (sides.full, sides.other_seed.seed_offset) == (sides.reference, 1)
    other = Sides.of([load_policy("full")], setup_of(against="skip-scales", seeds=3))
    assert (other.full.policy.spec, other.full.is_timed, other.other_seed.seed_offset) == ("full", False, 3)
    assert other.other_seed.judged_by == other.full.key


@pytest.mark.parametrize(
    ("batch_size", "seeds", "batches"),
    [(1, 1, [("p0",), ("p1",), ("p2",)]), (4, 2, [("p0", "p1"), ("p2",)]), (1, 5, [("p0",), ("p1",), ("p2",)])],
)
def test_prompts_go_into_batches(batch_size: int, seeds: int, batches: list[tuple[str, ...]]) -> None:
    setup = setup_of(3, batch_size=batch_size, seeds=seeds)
    assert list(setup.batches) == batches
    assert setup.first_image(1) == len(batches[0]) * seeds
