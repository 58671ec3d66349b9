"""A check of the operator's that hangs, and those who have nothing to do with it."""

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest

from foveate.server.moderation import TimedCheck
from foveate.server.settings import ServerSettings
from tests.server.conftest import TIMEOUT_S, Answer, Live, eventually

HANGING = 6


@pytest.mark.parametrize("of_images", [False, True])
def test_checks_that_hang_take_no_thread_of_others(start: Callable[..., Live], *, of_images: bool) -> None:
    over, asked, answers = threading.Event(), list[str](), list[Answer]()

    def check(prompt: str, image: Any) -> None:
        if "dog" in prompt and (image is not None) == of_images:
            asked.append(prompt)
            over.wait(TIMEOUT_S)

    # Longer than clients wait, so that none is given up meanwhile.
    live = start(moderation=check, moderation_seconds=2 * TIMEOUT_S)
    url = live.generate(response_format="url").data["data"][0]["url"]
    threads = [
        threading.Thread(target=lambda: answers.append(live.generate(prompt="a red dog"))) for _ in range(HANGING)
    ]
    try:
        for thread in threads:
            thread.start()
        eventually(lambda: len(asked) == HANGING, "all of them hang", 5.0)
        assert live.send(url.removeprefix(live.url)).status == 200
        assert live.generate().status == 200
        assert live.generate(stream=True, partial_images=1).status == 200
        assert not answers, "they still hang"
    finally:
        over.set()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert [answer.status for answer in answers] == [200] * HANGING


def test_settings_with_a_check_travel_to_other_processes() -> None:
    sent = ServerSettings(moderation=print, moderation_seconds=5.0).moderation
    found = pickle.loads(pickle.dumps(sent))
    assert isinstance(found, TimedCheck)
    assert found.check is print
    assert found("a cat", None) is None
