"""How good images are by themselves: the nearest drawing of a corpus, and KID.

Axes: n images, c corpus images, F features.

Source: KID, https://arxiv.org/abs/1801.01401 (polynomial kernel of degree 3). We differ from it in the network
(EfficientNet-lite0 instead of Inception) and in taking the unbiased estimate over all images at once instead of an
average over random subsets: it needs no random numbers. Its values compare with each other, not with published KID.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import FoveateError


def nearest(
    features: Float[np.ndarray, "n F"],
    corpus_features: Float[np.ndarray, "c F"],
) -> Int[np.ndarray, " n"]:
    """Finds the corpus row with the highest cosine similarity to each row.

    Args:
        features: Rows to look up.
        corpus_features: Rows to find, at least one.

    Returns:
        Indices into the corpus; the first one where several are equal.

    Raises:
        FoveateError: If the corpus is empty.
    """
    if len(corpus_features) == 0:
        raise FoveateError("nearest needs at least one corpus row, got none")
    return np.asarray((unit_rows(features) @ unit_rows(corpus_features).T).argmax(axis=1))


def kid(features: Float[np.ndarray, "n F"], reference_features: Float[np.ndarray, "c F"]) -> float:
    """Kernel distance between two sets of features; 0 is expected where both come from one distribution.

    Args:
        features: Features of the images to judge, at least two rows.
        reference_features: Features of real images, at least two rows; the number may differ.

    Returns:
        The unbiased estimate of the squared distance, computed in float64; slightly negative values are possible.

    Raises:
        FoveateError: If a set has fewer than two rows, or torchmetrics is missing.
    """
    if min(len(features), len(reference_features)) < 2:
        raise FoveateError(f"kid needs two rows in each set, got {len(features)} and {len(reference_features)}")
    try:
        from torchmetrics.image.kid import poly_kernel  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise FoveateError('kid needs torchmetrics, which is not installed: pip install "foveate[eval]"') from error

    # torchmetrics' own `poly_mmd` takes two sets of one size only, so we take its kernel and sum ourselves.
    one = torch.from_numpy(np.asarray(features, dtype=np.float64))
    other = torch.from_numpy(np.asarray(reference_features, dtype=np.float64))
    cross = poly_kernel(one, other).mean()
    return float(_mean_of_pairs(poly_kernel(one, one)) + _mean_of_pairs(poly_kernel(other, other)) - 2 * cross)


def unit_rows(rows: Float[np.ndarray, "n F"]) -> Float[np.ndarray, "n F"]:
    """Scales each row to length 1."""
    # The bound keeps a row of zeros at zero instead of dividing by nothing.
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def _mean_of_pairs(kernel: Float[Tensor, "n n"]) -> Tensor:
    num_rows = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (num_rows * (num_rows - 1))
