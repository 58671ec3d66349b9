"""C code for processors with AVX-512 BF16: compiled once per machine with its own compiler, then kept in a cache.

Nothing is compiled before a tensor asks for it. Where there is no such processor or no compiler, plain torch runs and
one line says so. `FOVEATE_NATIVE=0` switches the C code off, `FOVEATE_CACHE` moves the folder of the compiled library.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("foveate")

SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden")
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


def describe() -> str:
    """What runs on this CPU, for reports: `native`, or `torch` and why."""
    return "native" if library() is not None else f"torch ({_why_not() or 'it could not be compiled'})"


def allows_onednn() -> bool:
    """Whether oneDNN may be called: torch was built with it, and nobody switched it or our code off."""
    return torch.backends.mkldnn.is_available() and os.environ.get("FOVEATE_NATIVE", "1") != "0"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None, after one warning where that is worth one, if it cannot be had."""
    reason = _why_not()
    if reason is not None:
        logger.debug("kernels run in plain torch: %s", reason)
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        first = (detail.strip().splitlines() or [type(error).__name__])[0][:200]
        logger.warning(
            "attention runs several times slower: no C compiler made the kernels (%s); install gcc, or set CC", first
        )
        return None
    _declare(loaded)
    _share_threads(loaded)
    return loaded


def loaded() -> ctypes.CDLL:
    """The library, for a caller that asked `serves` first."""
    found = library()
    assert found is not None, "serves() is asked before the library is used"
    return found


def _why_not() -> str | None:
    """Why this machine is not served, or None if it is."""
    if os.environ.get("FOVEATE_NATIVE", "1") == "0":
        return "switched off by FOVEATE_NATIVE=0"
    missing = _NEEDED - _processor_flags()
    return f"the processor lacks {', '.join(sorted(missing))}" if missing else None


@functools.cache
def _processor_flags() -> frozenset[str]:
    """Instructions of the processor, as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def _compiled() -> Path:
    """The library file, compiled now if this machine has not done so before.

    Raises:
        OSError: No compiler, or no folder that can be written.
        subprocess.SubprocessError: The compiler failed.
    """
    sources = sorted(SOURCES.glob("*.c"))
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        raise FileNotFoundError("none of cc, gcc, clang is there")
    digest = hashlib.sha256("\n".join((compiler, *_FLAGS, *sorted(_processor_flags()))).encode())
    for path in (*sources, *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    target = _cache_folder() / f"kernels-{digest.hexdigest()[:20]}.so"
    if not target.is_file():
        # Two processes may compile at once: each writes a file of its own, and the last rename wins.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder) / target.name
            subprocess.run(
                [*compiler.split(), *_FLAGS, "-o", str(partial), *map(str, sources)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_SECONDS,
            )
            partial.replace(target)
    return target


def _cache_folder() -> Path:
    """Where the library is kept; a folder of this user below the temporary ones if the home cannot be written."""
    given = os.environ.get("FOVEATE_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveate"
    fallback = Path(tempfile.gettempdir()) / f"foveate-{os.getuid()}"
    for folder in (Path(given),) if given else (home, fallback):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        # A library that somebody else could have put there is not loaded.
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise PermissionError(f"{given or home} cannot be written; set FOVEATE_CACHE to a folder of yours")


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
        "foveate_attend_f32": [pointer, pointer, pointer, pointer, pointer, pointer, pointer, real, integer],
        "foveate_attend_bf16": [pointer, pointer, pointer, pointer, pointer, pointer, pointer, real, integer],
        "foveate_norm": [
            pointer, pointer, integer, pointer, integer, pointer, integer, pointer, integer, integer, real, integer,
        ],
        "foveate_residual": [pointer, pointer, integer, pointer, integer, pointer, integer, integer, integer],
        "foveate_heads": [pointer, integer, pointer, pointer, integer, integer, integer, integer],
        "foveate_gelu": [pointer, integer, integer, integer],
        "foveate_resize": [pointer, *[integer] * 3, pointer, *[integer] * 5, *[pointer] * 4, integer],
        "foveate_draws": [word, word, pointer, *[integer] * 3],
    }  # fmt: skip
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, integer if "attend" in name else None


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """A C array of 64-bit integers."""
    return (ctypes.c_int64 * len(values))(*values)
