"""`env` about the code that runs on this machine: switches, C kernels and linear layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from foveate.kernels import native, switches


@pytest.mark.parametrize("name", switches.SWITCHES)
def test_every_switch_is_said_and_a_wrong_one_refused(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert run("env", "--json").data["switches"] == dict.fromkeys(switches.SWITCHES, True)
    monkeypatch.setenv(name, "0")
    assert run("env", "--json").data["switches"] == {other: other != name for other in switches.SWITCHES}
    lines = [line.split() for line in run("env").out.splitlines()]
    assert [f"switches.{name}", "False"] in lines
    monkeypatch.setenv(name, "off")
    run("env").assert_refused(f"{name} must be 0 or 1, got 'off'; unset it")


def test_onednn_switched_off(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert run("env", "--json").data["linear_layers"].startswith("onednn")
    monkeypatch.setenv("FOVEATE_ONEDNN", "0")
    assert run("env", "--json").data["linear_layers"] == "torch (switched off by FOVEATE_ONEDNN=0)"


def test_why_c_kernels_do_not_run(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_processor_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    native._found.cache_clear()
    try:
        ran = run("env", "--json")
    finally:
        native._found.cache_clear()
    assert ran.data["cpu"]["kernels"].startswith("torch (the processor lacks avx512_bf16, ")
    assert ran.err == ""
