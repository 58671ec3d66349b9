"""Keyed draws, in C and in numpy, against the formula of the contract; the bits of old images hang on every one."""

import numpy as np
import pytest
import torch

from foveate.engine.sample import SMOOTH_STREAM, Filter, KeyedSampler, keyed_exponential, keyed_uniform
from foveate.kernels import draws, native
from tests.randomness import numbers

LARGEST = 2**64 - 1
SHAPES = [(), (0,), (1,), (3,), (4,), (5,), (31,), (33,), (7, 0, 2), (3, 5, 4), (16, 16, 32), (9, 7, 1024), (200_001,)]


@pytest.fixture(params=["native", "numpy"])
def path(request, monkeypatch) -> str:
    """Runs a test on both paths; C needs a processor that has the instructions."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(f"no C kernels on this machine: {native.describe()}")
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    """Runs a test on one thread and on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def plain_uniform(key: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """The formula in float64, all at once."""
    raw = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(int(np.prod(shape))).reshape(shape)
    return ((raw >> np.uint64(41)).astype(np.float64) + 0.5) * 2.0**-23


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == np.float32 and np.array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws_are_the_formula_bit_for_bit(path: str, threads: int, shape: tuple[int, ...]):
    fresh = tuple(int(word) for word in numbers(str(shape)).integers(0, LARGEST, 2, np.uint64, endpoint=True))
    for key in ((0, 0), (LARGEST, LARGEST), (5, 256 * 12 + 1), (2**63, 3), fresh):
        u = plain_uniform(key, shape)
        assert same_bits(draws.uniform(key, shape), u), key
        assert same_bits(draws.exponential(key, shape), -np.log(u)), key


def test_every_logarithm_is_the_one_of_numpy():
    """2**25 draws meet 98 of 100 of the 2**23 values that a draw can take."""
    if native.library() is None:
        pytest.skip(f"numpy takes its own logarithm: {native.describe()}")
    seed = int(numbers("logarithms").integers(0, LARGEST, dtype=np.uint64))
    table = (-np.log((np.arange(2**23) + 0.5) * 2.0**-23)).astype(np.float32)
    met = np.zeros(2**23, dtype=bool)
    for stream in range(32):
        value = (draws.uniform((seed, stream), (2**20,)) * np.float32(2**23)).astype(np.int32)
        assert np.array_equal(draws.exponential((seed, stream), (2**20,)), table[value]), (seed, stream)
        met[value] = True
    assert met.mean() > 0.97


def test_draws_are_written_to_their_own_map_alone(path: str):
    """No lane behind the last draw is stored."""
    for count in (1, 15, 17, 15 * 1024 - 1, 15 * 1024 + 1):
        first = draws.uniform((1, 2), (count,))
        copy = first.copy()
        draws.exponential((1, 2), (count,))
        assert np.array_equal(first, copy)
        assert np.array_equal(draws.uniform((1, 2), (count + 40,))[:count], first)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_key_out_of_range_is_refused(path: str, seed: int):
    with pytest.raises(OverflowError):
        draws.uniform((seed, 0), (4,))


@pytest.mark.parametrize("seed", [0, 7, LARGEST])
@pytest.mark.parametrize("scale", [0, 3, 13])
@pytest.mark.parametrize("stream", [0, SMOOTH_STREAM, 2])
def test_the_key_is_seed_scale_and_stream(path: str, seed: int, scale: int, stream: int):
    u = plain_uniform((seed, 256 * scale + stream), (4, 6, 9))
    assert same_bits(keyed_uniform(seed, scale, (4, 6, 9), stream), u)
    assert same_bits(keyed_exponential(seed, scale, (4, 6, 9), stream), -np.log(u))


@pytest.mark.parametrize("num_values", [2, 40])
def test_the_sampler_chooses_as_it_did_with_the_formula(path: str, num_values: int):
    """Bits and ids of whole maps and of kept tokens, against the arithmetic that drew the images until now."""
    grid, symbols = (5, 6), 8 if num_values == 2 else 1
    kept = torch.randperm(30)[:11].sort().values
    logits = torch.randn(11, symbols, num_values) * 2
    (found,) = KeyedSampler(seeds=(23,)).choose(6, grid, [logits], [kept], Filter(top_k=0, top_p=0.0))
    u = plain_uniform((23, 256 * 6), (30, symbols if num_values == 2 else num_values))[kept.numpy()]
    if num_values == 2:
        expected = torch.from_numpy(u.astype(np.float32)) < logits.softmax(-1)[..., 1]
    else:
        expected = (logits.softmax(-1) / torch.from_numpy((-np.log(u)).astype(np.float32))[:, None]).argmax(-1)
    assert torch.equal(found, expected.long())


def test_exponentials_for_smoothing_are_the_formula(path: str):
    for seed, found in zip((3, LARGEST), KeyedSampler(seeds=(3, LARGEST)).exponentials(4, (3, 4), 2, 50), strict=True):
        assert same_bits(found.numpy(), -np.log(plain_uniform((seed, 256 * 4 + SMOOTH_STREAM), (12, 50))))
