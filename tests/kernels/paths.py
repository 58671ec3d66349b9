"""Ways of running a kernel, for fixtures: C code by AMX, C code without it, and plain torch."""

import pytest

from foveate.kernels import native

ATTENTION_PATHS = ("amx", "native", "torch")


def take_path(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets attention run one of its ways in a test, which is skipped where the machine lacks it."""
    if name == "amx" and not native.has_amx():
        pytest.skip(f"no AMX on this machine: {native.describe()}")
    if name == "native" and native.library() is None:
        pytest.skip(f"no C kernels on this machine: {native.describe()}")
    if name != "amx":
        monkeypatch.setattr(native, "has_amx", lambda: False)
    if name not in ("amx", "native"):
        monkeypatch.setattr(native, "library", lambda: None)
    return name
