"""Bit usage on bits whose means are known."""

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from recipes.emoji.bits import bit_entropy, bit_means, bits_in_use


def coins(shares: list[float], num_tokens: int) -> np.ndarray:
    """Bits of one image of num_tokens tokens, each 1 in exactly its share of them."""
    rank = np.arange(num_tokens)[:, None]
    return (rank < np.round(np.array(shares) * num_tokens))[None, :, None]


def test_means_are_per_scale_and_bit() -> None:
    means = bit_means([coins([0.0, 0.5], 10), coins([1.0, 0.3], 100)])
    np.testing.assert_allclose(means, [[0.0, 0.5], [1.0, 0.3]])


def test_a_bit_that_hardly_varies_is_not_in_use() -> None:
    means = np.array([[0.0, 0.02, 0.021, 0.5], [0.98, 0.979, 1.0, 0.9], [0.4, 0.5, 0.6, 0.7]])
    np.testing.assert_allclose(bits_in_use(means), [0.5, 0.5, 1.0])


def test_entropy_of_coins() -> None:
    means = np.array([[0.0, 1.0], [0.5, 0.5], [0.5, 1.0], [0.25, 0.25]])
    quarter = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    np.testing.assert_allclose(bit_entropy(means), [0.0, 1.0, 0.5, quarter])


def test_a_scale_without_tokens_is_refused() -> None:
    with pytest.raises(FoveateError, match="tokens at every scale"):
        bit_means([])
    with pytest.raises(FoveateError, match="tokens at every scale"):
        bit_means([np.zeros((0, 1, 1, 4), bool)])
