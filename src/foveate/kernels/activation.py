"""The non-linearities of the feed-forward net.

Torch computes most numbers by vectors, and what a thread's share leaves behind its last vector by other code, with
other bits: a token's would depend on how many tokens there are, and on the threads. Here they depend on nothing.
Axes: n packed tokens, F feed-forward width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.kernels import native

_STEP = 64
"""Numbers that every vector loop of torch divides: its widest one takes two vectors of 32 at a time."""
_SERIAL = 16384
"""Up to so many numbers torch takes one thread for GELU; every other function waits for more."""
_SHARE = 32768
"""Numbers that make another thread worth it for other functions (`at::internal::GRAIN_SIZE`)."""


def gelu(x_nF: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
    """GELU in its tanh form; the memory of `x_nF` may be used for what is returned."""
    if x_nF.is_contiguous() and native.serves(x_nF):
        library = native.loaded()
        library.foveate_gelu(x_nF.data_ptr(), native.dtype_code(x_nF), x_nF.numel(), native.num_threads(x_nF.numel()))
        return x_nF
    if _is_plain(x_nF):
        return F.gelu(x_nF, approximate="tanh")
    return _by_vectors(torch.ops.aten.gelu.out, x_nF, _gelu_shares, approximate="tanh")


def silu(x_nF: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
    """SiLU; `x_nF` is left as it was."""
    return F.silu(x_nF) if _is_plain(x_nF) else _by_vectors(torch.ops.aten.silu.out, x_nF, _silu_shares)


def _is_plain(x_nF: Float[Tensor, "n F"]) -> bool:
    """Whether torch is called as it is: where gradients are wanted, and elsewhere than on a CPU."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or x_nF.device.type != "cpu"


def _gelu_shares(count: int) -> int:
    """Among how many threads torch shares so many numbers: all or none (`GeluKernelImpl`)."""
    return torch.get_num_threads() if count > _SERIAL else 1


def _silu_shares(count: int) -> int:
    """As `_gelu_shares`; as many threads as have work (`at::parallel_for`)."""
    return max(1, min(torch.get_num_threads(), -(-count // _SHARE)))


def _by_vectors(
    function: Callable[..., Tensor], x_nF: Float[Tensor, "n F"], shares: Callable[[int], int], **settings: str
) -> Float[Tensor, "n F"]:
    """A function of single numbers, called so that no thread's share has a rest; the last few are filled up."""
    x, out = x_nF.flatten(), x_nF.new_empty(x_nF.numel())
    first = 0
    while count := _even_count(len(x) - first, shares):
        part = slice(first, first + count)
        function(x[part], out=out[part], **settings)
        first += count
    if first < len(x):
        filled = x.new_zeros(_STEP)
        filled[: len(x) - first] = x[first:]
        out[first:] = function(filled, out=torch.empty_like(filled), **settings)[: len(x) - first]
    return out.view(x_nF.shape)


def _even_count(most: int, shares: Callable[[int], int]) -> int:
    """The most of so many numbers that torch shares among its threads in whole steps; 0 if there is no whole step."""
    count = most
    while rest := count % (_STEP * shares(count)):
        count -= rest
    # With hundreds of threads a step for each of them may be more than there is.
    return count or min(most, _SERIAL) // _STEP * _STEP
