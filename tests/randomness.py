"""Seeds of random inputs, all from one number: printed by pytest, and another one with FOVEATE_TEST_SEED.

Weights of toys and what is compared with recorded numbers keep seeds of their own: other weights would be another toy.
"""

import os
import random
from collections.abc import Sequence
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

BASE = int(os.environ.get("FOVEATE_TEST_SEED", "0"))
"""The seed of the suite, from 0 to 2^31 - 1."""


def seed_of(stream: int | str) -> int:
    """The seed of one stream of random inputs, named by a number or by words; with the base 0 it is the number."""
    return (BASE << 32) + (crc32(stream.encode()) if isinstance(stream, str) else stream)


def generator(stream: int | str = 0) -> torch.Generator:
    """A generator of torch at the beginning of a stream."""
    return torch.Generator().manual_seed(seed_of(stream))


def normal(*shape: int, stream: int | str = 0) -> Tensor:
    """Standard normal numbers in float32."""
    return torch.randn(*shape, generator=generator(stream))


def numbers(stream: int | str = 0) -> np.random.Generator:
    """A generator of numpy at the beginning of a stream."""
    return np.random.default_rng(seed_of(stream))


def few(cases: Sequence[str], *always: str, more: int = 1) -> list[object]:
    """Cases of a matrix: the named ones and some drawn by the seed run in every suite, the others wait for `make soak`.

    Args:
        cases: All cases.
        always: Those with a behaviour of their own; each must be one of the cases.
        more: How many of the others run too; another FOVEATE_TEST_SEED takes others.
    """
    assert set(always) <= set(cases), f"no cases of the matrix: {set(always) - set(cases)}"
    rest = [case for case in cases if case not in always]
    drawn = random.Random(seed_of("".join(cases))).sample(rest, more)
    chosen = {*always, *drawn}
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.soak) for case in cases]
