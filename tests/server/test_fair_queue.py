"""Order of waiting images: first in, first out within a key, equal shares between keys, nobody starves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.server.fair_queue import FairQueue


def taken(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_keys_take_turns_and_each_is_served_in_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a1", "a2", "a3", "b1", "b2"):
        queue.push(name[0], name, cost=1.0)
    assert list(queue.order()) == ["a1", "b1", "a2", "b2", "a3"]
    assert taken(queue) == ["a1", "b1", "a2", "b2", "a3"]


def test_shares_are_of_compute_and_not_of_images() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(3):
        queue.push("large", f"L{i}", cost=3.0)
    for i in range(6):
        queue.push("small", f"s{i}", cost=1.0)
    assert taken(queue)[:6] == ["L0", "s0", "s1", "s2", "L1", "s3"]


def test_a_key_that_was_idle_neither_saves_turns_nor_pays_for_them() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(10):
        queue.push("a", f"a{i}", cost=1.0)
    for _ in range(5):
        queue.pop()
    queue.push("b", "b0", cost=1.0)
    queue.push("b", "b1", cost=1.0)
    assert taken(queue)[:5] == ["b0", "a5", "b1", "a6", "a7"]


def test_what_is_put_back_goes_first_and_is_not_paid_twice() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a0", "a1", "b0"):
        queue.push(name[0], name, cost=1.0)
    first = queue.pop()
    queue.push("a", first, cost=1.0, in_front=True)
    assert taken(queue) == ["b0", "a0", "a1"]


def test_removal_leaves_the_others_and_an_empty_queue_says_so() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a0", "b0", "a1"):
        queue.push(name[0], name, cost=1.0)
    assert sorted(queue.remove(lambda item: item.startswith("a"))) == ["a0", "a1"]
    assert taken(queue) == ["b0"]
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.5, 4.0)), max_size=30))
def test_order_is_what_popping_gives_and_no_key_falls_behind(pushes: list[tuple[str, float]]) -> None:
    """While keys wait, none has been given more than the others by above the dearest image."""
    queue: FairQueue[tuple[str, float]] = FairQueue()
    for key, cost in pushes:
        queue.push(key, (key, cost), cost)
    expected = list(queue.order())
    given_to, waiting = dict.fromkeys("abc", 0.0), [key for key, _ in pushes]
    for item in expected:
        assert queue.peek() == item == queue.pop()
        busy = [given_to[key] for key in set(waiting)]
        assert max(busy) - min(busy) <= 4.0 + 1e-9
        given_to[item[0]] += item[1]
        waiting.remove(item[0])
    assert len(queue) == 0
