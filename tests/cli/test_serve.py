"""`serve`: what is refused before anything is loaded, and that its flags become settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.cli.options import ModelOptions
from foveate.cli.serve import EngineOptions, LimitOptions, ServeOptions, _settings, _share_of_machine
from foveate.server.keys import ENVIRONMENT
from foveate.server.moderation import TimedCheck


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", "70000"), "port must be 0 to 65535"),
        (("--grace", "0"), "grace must be above 0"),
        (("--max-batch-size", "0"), "max_images must be 1 or more"),
        (("--max-images", "0"), "images must be above 0"),
        (("--memory-share", "2"), "memory_share must be in (0, 1]"),
        (("--api-keys", "none.txt"), "cannot read the API keys of none.txt"),
        (("--moderation", "json"), "must be package.module:function"),
        (("--moderation", "json:nothing"), "has no attribute"),
        (("--moderation", "json:__name__"), "is no function"),
        (("--port", "0", "--store", "/dev/null/images"), "cannot keep images in /dev/null/images"),
        (("--model", "emojo"), "did you mean emoji"),
        (("--encoders", "0"), "encoders must be 1 or more"),
        (("--num-replicas", "2"), "--num-replicas needs --engine ray"),
        (("--engine", "ray", "--num-replicas", "2", "--max-replicas", "4"), "not both"),
        (("--engine", "ray", "--max-replicas", "4"), "--min-replicas and --max-replicas come together"),
        (("--engine", "ray", "--gpus-per-replica", "1"), "add --device cuda"),
    ],
)
def test_flags_that_cannot_be_are_refused(run: Callable[..., Any], flags: tuple[str, ...], message: str) -> None:
    run("serve", *flags).assert_refused(message)


def test_replicas_of_one_machine_share_its_memory() -> None:
    assert _share_of_machine(EngineOptions()) == 1
    assert _share_of_machine(EngineOptions(engine="ray", min_replicas=1, max_replicas=4)) == 0.25
    assert _share_of_machine(EngineOptions(engine="ray", num_replicas=4, address="auto")) == 1
    assert _share_of_machine(EngineOptions(engine="ray", num_replicas=4, gpus_per_replica=0.5)) == 0.5
    assert _share_of_machine(EngineOptions(engine="ray", num_replicas=4, gpus_per_replica=1.0)) == 1


def test_flags_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-of-the-file-00000\n", encoding="utf-8")
    monkeypatch.setenv(ENVIRONMENT, "sk-of-the-environment")
    options = ServeOptions(
        api_keys=file, moderation="builtins:print", moderation_seconds=5.0, cors_origin=["https://a"],
        served_model_name=["gpt-image-1"],
        keep_on_disconnect=True, log_prompts=True, encoders=3,
    )  # fmt: skip
    limits = LimitOptions(max_images=2, max_pixels=9, max_body=8, rate_limit=7.0, store_mib=3, store_seconds=5.0)
    model = ModelOptions(model="emoji-tiny", dtype="bfloat16")
    found = _settings(options, limits, model)
    assert found.keys.owner("sk-of-the-file-00000")
    assert found.keys.owner("sk-of-the-environment")
    assert (found.limits.images, found.limits.pixels, found.limits.body_bytes) == (2, 9, 8)
    assert (found.limits.requests_per_minute, found.store.bytes, found.store.seconds) == (7.0, 3 << 20, 5.0)
    assert isinstance(found.moderation, TimedCheck)
    assert (found.moderation.check, found.moderation_seconds) == (print, 5.0)
    assert (found.origins, found.encoders) == (("https://a",), 3)
    assert found.keeps_on_disconnect
    assert found.hosts is None, "it has keys"
    assert found.shows_prompts
    assert found.aliases == ("emoji-tiny", "gpt-image-1")
    assert found.model_flags == ("--model", "emoji-tiny", "--dtype", "bfloat16")
    monkeypatch.delenv(ENVIRONMENT)
    for flags, hosts in (
        (ServeOptions(), {"localhost", "127.0.0.1", "::1"}),
        (ServeOptions(host="0.0.0.0"), None),
        (
            ServeOptions(host="10.1.2.3", allowed_host=["a.example"]),
            {"localhost", "127.0.0.1", "::1", "10.1.2.3", "a.example"},
        ),
    ):
        allowed = _settings(flags, LimitOptions(), model).hosts
        assert (None if allowed is None else set(allowed)) == hosts
    folder = _settings(ServeOptions(), LimitOptions(), ModelOptions(model=str(tmp_path)))
    assert folder.model_flags == ("--model", tmp_path.name), "no client reads a path of this machine"
