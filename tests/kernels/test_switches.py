"""Switches, and processors or machines that the C code or oneDNN does not serve: what runs, and what is said."""

import logging
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.errors import FoveateError
from foveate.kernels import linear as products
from foveate.kernels import native, switches
from foveate.kernels.heap import kept_heap
from foveate.kernels.linear import describe_products, linear, takes_onednn

Patch = pytest.MonkeyPatch


@pytest.fixture
def fresh(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """As in a new process; what is found out in the test is forgotten after it."""
    for known in (native._found, native.has_amx, products._onednn_multiplies):
        known.cache_clear()
    with caplog.at_level(logging.INFO, logger="foveate"):
        yield caplog
    for known in (native._found, native.has_amx, products._onednn_multiplies):
        known.cache_clear()


# Switches


@pytest.mark.parametrize("name", switches.SWITCHES)
def test_a_switch_is_0_or_1_and_on_by_default(monkeypatch: Patch, name: switches.Switch) -> None:
    monkeypatch.delenv(name, raising=False)
    assert switches.is_on(name)
    for given, expected in (("1", True), ("0", False), ("", True)):
        monkeypatch.setenv(name, given)
        assert switches.is_on(name) is expected
        assert switches.describe()[name] is expected
    for wrong in ("off", "2", " 0", "false"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(FoveateError, match=rf"^{name} must be 0 or 1, got '{wrong}'; unset it to leave it on$"):
            switches.is_on(name)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", switches.SWITCHES)
def test_a_wrong_switch_is_said_as_a_model_is_loaded(monkeypatch: Patch, name: str) -> None:
    """Which asks for the library, whatever the switch is about; and again each time."""
    monkeypatch.setenv(name, "no")
    for _ in range(2):
        with pytest.raises(FoveateError, match=f"{name} must be 0 or 1"):
            native.library()


def test_a_wrong_switch_of_the_heap_is_said_by_the_heap(monkeypatch: Patch) -> None:
    monkeypatch.setenv("FOVEATE_KEEP_HEAP", "yes")
    with pytest.raises(FoveateError, match="FOVEATE_KEEP_HEAP must be 0 or 1"), kept_heap():
        pass


@pytest.mark.usefixtures("fresh")
def test_c_code_and_onednn_are_switched_one_by_one(monkeypatch: Patch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setenv("FOVEATE_NATIVE", "0")
    assert native.library() is None
    assert native.describe() == "torch (switched off by FOVEATE_NATIVE=0)"
    assert takes_onednn(torch.float32)
    assert describe_products().startswith("onednn")
    native._found.cache_clear()
    monkeypatch.setenv("FOVEATE_NATIVE", "1")
    monkeypatch.setenv("FOVEATE_ONEDNN", "0")
    assert not takes_onednn(torch.float32)
    assert not takes_onednn(torch.bfloat16)
    assert describe_products() == "torch (switched off by FOVEATE_ONEDNN=0)"
    assert "FOVEATE_NATIVE" not in native.describe()
    # Its products have other bits, so an image must tell.
    assert native.describe().endswith(", no oneDNN")


@pytest.mark.usefixtures("fresh")
def test_without_onednn_products_are_those_of_torch(monkeypatch: Patch) -> None:
    def refused(*_: object) -> torch.Tensor:
        raise AssertionError("oneDNN was called")

    monkeypatch.setenv("FOVEATE_ONEDNN", "0")
    monkeypatch.setattr(products, "_onednn", refused)
    x, weight = torch.randn(5, 24), torch.randn(16, 24)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            expected = torch.nn.functional.linear(x.to(dtype), weight.to(dtype))
            assert torch.equal(linear(x.to(dtype), weight.to(dtype)), expected)


# OneDNN


def test_onednn_that_raises_is_asked_once_and_left_alone(monkeypatch: Patch, fresh: pytest.LogCaptureFixture) -> None:
    """As on a processor for which it has no products: no run meets the error."""
    if not native.allows_onednn():
        pytest.skip("this torch has no oneDNN")
    calls = []

    def raising(*_: object) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("could not create a primitive\nand more")

    monkeypatch.setattr(products, "_onednn", raising)
    x, weight, bias = torch.randn(5, 24), torch.randn(16, 24), torch.randn(16)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert len(calls) == 1
    assert [record.levelno for record in fresh.records] == [logging.INFO]
    assert fresh.messages[0].endswith("(could not create a primitive)")
    assert "torch in float32" in describe_products()


@pytest.mark.usefixtures("fresh")
def test_onednn_that_computes_something_else_is_left_alone(monkeypatch: Patch) -> None:
    monkeypatch.setattr(native, "allows_onednn", lambda: True)
    monkeypatch.setattr(products, "_onednn", lambda x, weight, bias: torch.zeros(len(x), len(weight)))
    assert not takes_onednn(torch.float32)


@pytest.mark.usefixtures("fresh")
def test_the_probe_of_onednn_is_not_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        takes_onednn(torch.float32)
    assert products._onednn_multiplies.cache_info().currsize == int(native.allows_onednn())
    assert counter.get_total_flops() == 0


# C code


def without_instructions(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_processor_flags", lambda: frozenset({"avx2", "avx512f"}))


def on_arm(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


def on_another_system(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.sys, "platform", "darwin")


def without_compiler(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)


def with_failing_compiler(monkeypatch: Patch, tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_bytes(b"#!/bin/sh\nprintf 'no such \\377flag\\nmore' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))


def with_missing_compiler(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "none"))


def without_folder(monkeypatch: Patch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "file"))


def with_damaged_library(monkeypatch: Patch, tmp_path: Path) -> None:
    (tmp_path / "kernels.so").write_text("damaged")
    monkeypatch.setattr(native, "_compiled", lambda: tmp_path / "kernels.so")


UNSERVED: dict[Callable[[Patch, Path], None], tuple[str, str]] = {
    without_instructions: ("the processor lacks avx512_bf16, avx512bw, avx512dq, avx512vl", "FOVEATE_NATIVE=0"),
    on_arm: ("they are for Linux on x86-64, and this is Linux on aarch64", "FOVEATE_NATIVE=0"),
    on_another_system: ("they are for Linux on x86-64", "FOVEATE_NATIVE=0"),
    without_compiler: ("there is no C compiler", "install gcc, or set CC"),
    with_failing_compiler: ("the C compiler failed", "install gcc, or set CC"),
    with_missing_compiler: ("the C compiler failed", "install gcc, or set CC"),
    without_folder: ("no folder holds the compiled library", "set FOVEATE_CACHE"),
    with_damaged_library: ("the compiled library cannot be loaded", "remove the kernels-*.so"),
}


@pytest.mark.parametrize("break_it", UNSERVED, ids=lambda function: function.__name__)
def test_where_c_code_does_not_serve_one_line_and_the_report_say_so(
    monkeypatch: Patch, tmp_path: Path, fresh: pytest.LogCaptureFixture, break_it: Callable[[Patch, Path], None]
) -> None:
    reason, remedy = UNSERVED[break_it]
    # A machine that is served, as far as its processor goes.
    monkeypatch.setattr(native, "_processor_flags", lambda: frozenset(native._NEEDED))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(native.sys, "platform", "linux")
    monkeypatch.setenv("FOVEATE_NATIVE", "1")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    break_it(monkeypatch, tmp_path)
    assert [native.library() for _ in range(3)] == [None] * 3
    with torch.inference_mode():
        assert not native.serves(torch.zeros(2))
    assert [record.levelno for record in fresh.records] == [logging.INFO]
    assert reason in fresh.messages[0]
    assert remedy in fresh.messages[0]
    assert "\n" not in fresh.messages[0]
    (warning,) = native.warnings()
    assert warning.code == "kernels_plain"
    assert native.describe().startswith(f"torch ({reason}")
    for said in (native.describe(), warning.message):
        # Both go into images and reports: no name of a folder.
        assert reason in said
        assert str(tmp_path) not in said
    assert remedy in warning.message


def test_c_code_that_was_switched_off_is_no_warning(monkeypatch: Patch, fresh: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FOVEATE_NATIVE", "0")
    assert native.library() is native.library() is None
    assert [record.levelno for record in fresh.records] == [logging.INFO]
    assert native.warnings() == ()


def test_nothing_is_said_where_c_code_serves(fresh: pytest.LogCaptureFixture) -> None:
    if native.library() is None:
        pytest.skip(f"no C kernels on this machine: {native.describe()}")
    assert native.describe() == ("native (AMX)" if native.has_amx() else "native")
    assert native.warnings() == ()
    assert fresh.records == []


def test_a_user_without_a_home_has_a_folder(monkeypatch: Patch, tmp_path: Path) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FOVEATE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert native._cache_folder().parent == tmp_path
