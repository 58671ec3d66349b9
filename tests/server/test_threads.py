"""Threads that do not keep the process alive."""

import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import pytest

from foveate.server.threads import DaemonPool


def test_calls_are_made_in_as_many_threads_as_there_may_be() -> None:
    pool, meet = DaemonPool(2, "some"), threading.Barrier(2, timeout=10)
    assert [future.result(10) for future in [pool.submit(meet.wait) for _ in range(2)]] in ([0, 1], [1, 0])
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result(10)
    assert pool.submit(max, [3, 4], key=lambda x: -x).result(10) == 3
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("some-")]
    assert len(threads) == 2
    pool.shutdown()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(RuntimeError, match="takes no more calls"):
        pool.submit(int)


def test_what_waits_is_cancelled() -> None:
    pool, may_end, runs = DaemonPool(1, "one"), threading.Event(), threading.Event()
    first = pool.submit(lambda: (runs.set(), may_end.wait(10)))
    assert runs.wait(10)
    second = pool.submit(int)
    pool.shutdown(wait=False, cancel_futures=True)
    pool.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        second.result(10)
    may_end.set()
    assert first.result(10)[1]


def test_the_process_ends_while_a_call_runs() -> None:
    code = (
        "import time; from foveate.server.threads import DaemonPool; pool = DaemonPool(1, 'slow');"
        "pool.submit(time.sleep, 60); time.sleep(0.2); pool.shutdown(wait=False, cancel_futures=True)"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert time.monotonic() - began < 30
