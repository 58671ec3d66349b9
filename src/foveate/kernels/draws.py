"""Draws that depend on a key and a position alone, as float32: C code, or numpy with the same bits.

A draw is `u = ((raw >> 41) + 0.5) * 2**-23` of the 64-bit words of numpy's Philox, in C order; 24 bits hold it, so it
is exact. The generator is Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from foveate.kernels import native

_CHUNK = 15 * 1024
"""Draws that numpy makes at a time: what lies between stays in the second-level cache, and its 120 KiB below the 128 at
which glibc asks the system for new pages."""


def uniform(key: tuple[int, int], shape: Sequence[int]) -> Float[np.ndarray, "..."]:
    """Uniform draws inside (0, 1), each odd * 2**-24.

    Args:
        key: Two numbers in [0, 2**64).
        shape: Of what is returned; a larger map begins with the draws of a smaller one.

    Returns:
        Float32, on the host.

    Raises:
        OverflowError: The key is out of its range.
    """
    return _draws(key, shape, is_exponential=False)


def exponential(key: tuple[int, int], shape: Sequence[int]) -> Float[np.ndarray, "..."]:
    """Exponential draws of mean 1, `-log(u)` of what `uniform` returns: the log in float64, rounded once to float32.

    Arguments, result and errors are those of `uniform`.
    """
    return _draws(key, shape, is_exponential=True)


def _draws(key: tuple[int, int], shape: Sequence[int], *, is_exponential: bool) -> Float[np.ndarray, "..."]:
    words = np.array(key, dtype=np.uint64)
    out = np.empty(math.prod(shape), dtype=np.float32)
    library = native.library()
    if library is None:
        _numpy_draws(words, out, is_exponential=is_exponential)
    else:
        threads = native.num_threads(out.size)
        library.foveate_draws(*words.tolist(), out.ctypes.data, out.size, int(is_exponential), threads)
    return out.reshape(tuple(shape))


def _numpy_draws(words: np.ndarray, out: Float[np.ndarray, " n"], *, is_exponential: bool) -> None:
    """Fills `out`, chunk after chunk of one stream."""
    bits = np.random.Philox(key=words)
    u = np.empty(_CHUNK if is_exponential else 0)
    for start in range(0, out.size, _CHUNK):
        part = out[start : start + _CHUNK]
        odd = bits.random_raw(part.size)
        odd >>= 40
        odd |= 1
        # Signed numbers, which processors turn into floating point in one instruction.
        if is_exponential:
            np.multiply(odd.view(np.int64), 2.0**-24, out=u[: part.size])
            part[...] = np.log(u[: part.size], out=u[: part.size])
            np.negative(part, out=part)
        else:
            part[...] = odd.view(np.int64)
            part *= np.float32(2.0**-24)
