"""The non-linearity of the feed-forward net.

Axes: n packed tokens, F feed-forward width.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.kernels import native


def gelu(x_nF: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
    """GELU in its tanh form; the memory of `x_nF` may be used for what is returned."""
    if not (x_nF.is_contiguous() and native.serves(x_nF)):
        return F.gelu(x_nF, approximate="tanh")
    library = native.loaded()
    library.foveate_gelu(x_nF.data_ptr(), native.dtype_code(x_nF), x_nF.numel(), native.num_threads(x_nF.numel()))
    return x_nF
