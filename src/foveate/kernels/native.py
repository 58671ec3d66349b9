"""C code for processors with AVX-512 BF16: compiled once per machine with its own compiler, then kept in a cache.

On those with AMX, attention in bfloat16 and its gradients run on that; `FOVEATE_AMX=0` switches it off.

Nothing is compiled before a tensor asks for it. Where there is no such processor or no compiler, plain torch runs: one
line on the logger says why, `foveate env` says it too, and `warnings` puts it into reports. `FOVEATE_NATIVE=0` switches
the C code off, `FOVEATE_CACHE` moves the folder of the compiled library. `FOVEATE_KERNELS` is a folder that
`compile_ahead` filled, as in a container without a compiler: then nothing is compiled.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.warnings import CallWarning
from foveate.kernels import switches

logger = logging.getLogger("foveate")

SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden")
_HERE, _ANYWHERE = ("-march=native",), ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
"""For this processor alone, and for every one that has what is needed; AMX is asked for before it runs."""
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
_CODES = {torch.float32: 0, torch.bfloat16: 1}
_COMPILE_SECONDS = 120
_PARALLEL_VALUES = 65536
"""Below so many numbers a second thread costs more than it saves."""


def serves(*tensors: Tensor) -> bool:
    """Whether the C code runs for these tensors: float32 or bfloat16 on this CPU, and no gradients wanted."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(t.device.type == "cpu" and t.dtype in _CODES for t in tensors) and library() is not None


def dtype_code(tensor: Tensor) -> int:
    """How the C code names a tensor's dtype."""
    return _CODES[tensor.dtype]


def num_threads(num_values: int) -> int:
    """Threads for work on so many numbers: those that torch is set to, or one where starting them would not pay."""
    return torch.get_num_threads() if num_values >= _PARALLEL_VALUES else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """Why plain torch runs in place of the C code.

    Attributes:
        reason: For people; without names of folders, as it goes into files of images.
        remedy: What to do about it.
        is_wanted: Whether it was asked for.
    """

    reason: str
    remedy: str
    is_wanted: bool = False


class _PlainError(Exception):
    """The library cannot be had on a machine that it is made for."""

    def __init__(self, reason: str, remedy: str, detail: str = "") -> None:
        super().__init__(detail)
        self.plain = Plain(reason=reason, remedy=remedy)


_COMPILER = "install gcc, or set CC to a C compiler that knows AVX-512 BF16"
_FOLDER = "set FOVEATE_CACHE to a folder of yours that can be written"
_AHEAD = "fill the folder of FOVEATE_KERNELS with foveate.kernels.native.compile_ahead of this version, or unset it"
_SILENCE = "FOVEATE_NATIVE=0 silences this"


def describe() -> str:
    """What runs on this CPU, for reports: `native`, `native (AMX)`, or `torch` and why; says if oneDNN is off."""
    found = _found()
    reason = found.reason if isinstance(found, Plain) else "replaced in this process"
    served = "native (AMX)" if has_amx() else "native"
    kernels = served if library() is not None else f"torch ({reason})"
    return kernels if allows_onednn() else f"{kernels}, no oneDNN"


def warnings() -> tuple[CallWarning, ...]:
    """What the report of a call on a CPU says of the C code: nothing if it serves, or if it was switched off."""
    found = _found()
    if not isinstance(found, Plain) or found.is_wanted:
        return ()
    message = f"the C kernels do not run here ({found.reason}), and plain torch takes longer; {found.remedy}"
    return (CallWarning(code="kernels_plain", message=message),)


def allows_onednn() -> bool:
    """Whether oneDNN may be called: torch was built with it, and `FOVEATE_ONEDNN=0` does not switch it off."""
    return switches.is_on("FOVEATE_ONEDNN") and torch.backends.mkldnn.is_available()


def has_amx_products() -> bool:
    """Whether the processor has AMX, so that oneDNN may multiply bfloat16 with it."""
    return "amx_bf16" in _processor_flags()


@functools.cache
def has_amx() -> bool:
    """Whether attention in bfloat16 runs on AMX: the C code serves, the processor has it, the system permits it.

    Raises:
        FoveateError: A switch holds neither 0 nor 1.
    """
    if not switches.is_on("FOVEATE_AMX") or "amx_bf16" not in _processor_flags():
        return False
    found = library()
    return found is not None and bool(found.foveate_amx())


def library() -> ctypes.CDLL | None:
    """The compiled library; None, after one line at INFO, where it cannot be had.

    Raises:
        FoveateError: A switch holds neither 0 nor 1.
    """
    found = _found()
    return None if isinstance(found, Plain) else found


def loaded() -> ctypes.CDLL:
    """The library, for a caller that asked `serves` first."""
    found = library()
    assert found is not None, "serves() is asked before the library is used"
    return found


@functools.cache
def _found() -> ctypes.CDLL | Plain:
    """The library or why there is none, found out once per process."""
    # A wrong switch of any code is said here, as models are loaded, and not in the middle of a run.
    switches.describe()
    plain, detail = _unserved(), ""
    if plain is None:
        try:
            return _loaded(_compiled())
        except _PlainError as error:
            plain, detail = error.plain, f": {error}" if str(error) else ""
    logger.info("plain torch runs, not the C kernels (%s%s); %s", plain.reason, detail, plain.remedy)
    return plain


def _unserved() -> Plain | None:
    """Why this machine is not served, whatever compiler it has; None if it is."""
    if not switches.is_on("FOVEATE_NATIVE"):
        return Plain(reason="switched off by FOVEATE_NATIVE=0", remedy="unset it to switch them on", is_wanted=True)
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        here = f"{platform.system()} on {platform.machine()}"
        return Plain(reason=f"they are for Linux on x86-64, and this is {here}", remedy=_SILENCE)
    missing = _NEEDED - _processor_flags()
    if missing:
        return Plain(reason=f"the processor lacks {', '.join(sorted(missing))}", remedy=_SILENCE)
    return None


def _loaded(path: Path) -> ctypes.CDLL:
    """Loads the library and connects it to torch's threads."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        remedy = "remove the kernels-*.so in FOVEATE_CACHE or ~/.cache/foveate"
        raise _PlainError("the compiled library cannot be loaded", remedy, str(error)) from None
    _declare(loaded)
    _share_threads(loaded)
    return loaded


@functools.cache
def _processor_flags() -> frozenset[str]:
    """Instructions of the processor, as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def compile_ahead(folder: Path) -> Path:
    """Compiles the library for every processor that it serves, so that a machine without a compiler can load it.

    Args:
        folder: What `FOVEATE_KERNELS` will name there; made if it is missing. Libraries of other versions may be in it.

    Returns:
        The file.

    Raises:
        FoveateError: There is no compiler, or it fails.
        OSError: The folder cannot be written.
    """
    target = folder / _name_ahead()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _compile_into(target, _compiler(), _ANYWHERE)
    except _PlainError as error:
        raise FoveateError(f"{error.plain.reason}: {error}; {error.plain.remedy}") from None
    return target


def _compiled() -> Path:
    """The library file, compiled now if this machine has not done so before.

    Raises:
        _PlainError: No compiler, one that fails, or no folder that can be written; or no library where one shall be.
    """
    if given := os.environ.get("FOVEATE_KERNELS"):
        return _found_ahead(Path(given))
    compiler = _compiler()
    digest = hashlib.sha256(
        "\n".join((compiler, _version(compiler), *_HERE, *_FLAGS, *sorted(_processor_flags()))).encode()
    )
    digest.update(_sources())
    try:
        target = _cache_folder() / f"kernels-{digest.hexdigest()[:20]}.so"
        if not target.is_file():
            _compile_into(target, compiler, _HERE)
    except OSError as error:
        raise _PlainError("no folder holds the compiled library", _FOLDER, str(error)) from None
    return target


def _found_ahead(folder: Path) -> Path:
    """The library of this version that was compiled ahead; whoever else may write it could run code of theirs."""
    target = folder / _name_ahead()
    try:
        owner = target.stat().st_uid
    except OSError as error:
        raise _PlainError("FOVEATE_KERNELS holds no library of this version", _AHEAD, str(error)) from None
    if owner not in (0, _user()):
        raise _PlainError("the library in FOVEATE_KERNELS belongs to another user", _AHEAD, f"number {owner}")
    return target


def _name_ahead() -> str:
    """The name of a library that was compiled ahead; it says from which sources."""
    return f"kernels-any-{hashlib.sha256(_sources()).hexdigest()[:20]}.so"


def _sources() -> bytes:
    """All C code."""
    return b"".join(path.read_bytes() for ending in ("c", "h") for path in sorted(SOURCES.glob(f"*.{ending}")))


def _compiler() -> str:
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        raise _PlainError("there is no C compiler", _COMPILER, "none of cc, gcc, clang is there")
    return compiler


def _version(compiler: str) -> str:
    """What a compiler says of itself; a newer one may know instructions that an older one left out."""
    try:
        told = subprocess.run(
            [*compiler.split(), "--version"], capture_output=True, timeout=_COMPILE_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.stdout.decode(errors="replace").partition("\n")[0]


def _compile_into(target: Path, compiler: str, processor: Sequence[str]) -> None:
    """Two processes may compile at once: each writes a file of its own, and the last rename wins."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / target.name
        command = [*compiler.split(), *processor, *_FLAGS, "-o", str(partial), *map(str, sorted(SOURCES.glob("*.c")))]
        _run(command)
        partial.replace(target)


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS)
    except subprocess.CalledProcessError as error:
        detail = next(iter(error.stderr.strip().splitlines()), str(error))[:200]
        raise _PlainError("the C compiler failed", _COMPILER, detail) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise _PlainError("the C compiler failed", _COMPILER, str(error)[:200]) from None


def _cache_folder() -> Path:
    """Where the library is kept; a folder of this user below the temporary ones if the home cannot be written.

    Raises:
        OSError: Neither can.
    """
    given = os.environ.get("FOVEATE_CACHE")
    for folder in (Path(given),) if given else _own_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        # A library that somebody else could have put there is not loaded.
        if os.access(folder, os.W_OK) and folder.stat().st_uid == _user():
            return folder
    raise PermissionError(f"{given or 'the home and the temporary folder'} cannot be written")


def _user() -> int:
    """The number of the user, as `Path.stat` says it; 0, as it says there, on a system without such numbers."""
    getuid = getattr(os, "getuid", None)
    return 0 if getuid is None else int(getuid())


def _own_folders() -> list[Path]:
    """Folders of this user, the best one first."""
    home = os.environ.get("XDG_CACHE_HOME")
    if not home:
        try:
            home = str(Path.home() / ".cache")
        except RuntimeError:  # a user without a home, as in a container that runs under any number
            home = None
    kept = [Path(home) / "foveate"] if home else []
    return [*kept, Path(tempfile.gettempdir()) / f"foveate-{_user()}"]


def _share_threads(loaded: ctypes.CDLL) -> None:
    """Lets the C code use torch's own threads: a second pool would fight with the first over the cores."""
    torch.ones(1)
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    pools = [file for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp"))]
    for pool in sorted(pools, key=lambda file: "torch" not in file):
        parallel = getattr(ctypes.CDLL(pool), "GOMP_parallel", None)
        if parallel is not None:
            loaded.foveate_threads(ctypes.cast(parallel, ctypes.c_void_p))
            return
    logger.warning("kernels run on one thread: torch's thread pool was not found")


def _declare(loaded: ctypes.CDLL) -> None:
    """Types of the arguments, so that a wrong call fails in Python."""
    pointer, integer, word, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
    signatures = {
        "foveate_threads": [pointer],
        "foveate_attend_f32": [*[pointer] * 7, real, integer],
        "foveate_attend_bf16": [*[pointer] * 7, real, integer],
        "foveate_amx": [],
        "foveate_norm": [
            pointer, pointer, integer, pointer, integer, pointer, integer, pointer, integer, integer, real, integer,
        ],
        "foveate_residual": [pointer, pointer, integer, pointer, integer, pointer, integer, integer, integer],
        "foveate_heads": [pointer, integer, pointer, pointer, integer, integer, integer, integer],
        "foveate_gelu": [pointer, integer, integer, integer],
        "foveate_resize": [pointer, *[integer] * 3, pointer, *[integer] * 5, *[pointer] * 4, integer],
        "foveate_draws": [word, word, pointer, *[integer] * 3],
    }  # fmt: skip
    # Missing where the compiler was too old for it.
    if hasattr(loaded, "foveate_attend_amx"):
        signatures["foveate_attend_amx"] = [*[pointer] * 8, real, integer]
        signatures["foveate_attend_gradients"] = [*[pointer] * 5, real, integer]
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = integer if "attend" in name or name == "foveate_amx" else None


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """A C array of 64-bit integers."""
    return (ctypes.c_int64 * len(values))(*values)


def pointers(*tensors: Tensor) -> ctypes.Array[ctypes.c_void_p]:
    """A C array of the addresses of tensors."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
