"""Rows alone and among others: products, the probe of them, tiles, and every other kernel that works row by row."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core.layers import init_weights
from foveate.core.rows import Rows
from foveate.kernels import activation, invariance, native
from foveate.kernels import linear as products
from foveate.kernels.activation import gelu, silu
from foveate.kernels.attention import attend_group
from foveate.kernels.heads import unit_rotated
from foveate.kernels.invariance import (
    COUNTS,
    MANY_TOGETHER,
    MORE_COUNTS,
    TILE_ROWS,
    TOGETHER,
    Product,
    is_row_independent,
    products_of,
    tile_failing_,
    tiles_of,
)
from foveate.kernels.linear import Linear, linear
from foveate.kernels.norm import norm_modulate
from foveate.kernels.residual import add_gated_
from foveate.policies.full import Full
from tests.kernels.paths import ATTENTION_PATHS, take_path
from tests.models.test_switti import request_of, subject_of
from tests.toys import Toy, label_request, make_request, run, toy, toy_var

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(320, 256), (96, 40), (50, 70), (16, 288), (5, 1), (256, 1024), (320, 1280)]
"""Outputs and inputs."""
TOGETHER_ROWS = 150
PARTS = [slice(0, 1), slice(0, 3), slice(7, 8), slice(31, 47), slice(70, 135), slice(149, 150)]


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch) -> str:
    """Runs a test on both paths; C needs a processor that has the instructions."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(f"no C kernels on this machine: {native.describe()}")
    return request.param


@pytest.fixture(params=ATTENTION_PATHS)
def attention_path(request, monkeypatch) -> str:
    """Runs a test of attention on each of its paths."""
    return take_path(request.param, monkeypatch)


@pytest.fixture(params=[1, 2])
def threads(request):
    """Runs a test on one thread and on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def inference():
    """Rows are promised to be independent only where no gradients are wanted."""
    with torch.inference_mode():
        yield


@pytest.fixture
def fresh_probe():
    """A probe that knows nothing yet, and forgets what it learns from a broken product."""
    is_row_independent.cache_clear()
    yield
    is_row_independent.cache_clear()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def product(shape: tuple[int, int], dtype: torch.dtype = torch.float32, **changes) -> Product:
    return Product(num_outputs=shape[0], num_inputs=shape[1], dtype=dtype, device=CPU, **changes)


# Products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("library", ["onednn", "torch"])
def test_what_the_probe_finds_holds_for_other_numbers(
    monkeypatch, threads: int, library: str, shape: tuple[int, int], has_bias: bool, dtype: torch.dtype
):
    """Where it finds rows independent they are, all of them; elsewhere they are in tiles."""
    if library == "torch":
        monkeypatch.setattr(native, "allows_onednn", lambda: False)
    elif not native.allows_onednn():
        pytest.skip("this torch has no oneDNN")
    probed = product(shape, dtype, has_bias=has_bias)
    tiles = tiles_of([probed])
    assert is_row_independent(product(shape, dtype, has_bias=has_bias, tile_rows=TILE_ROWS))
    weight, bias = random(*shape, dtype=dtype), random(shape[0], dtype=dtype) if has_bias else None
    num_rows = MANY_TOGETHER if dtype is torch.bfloat16 else TOGETHER
    x = random(num_rows, shape[1], dtype=dtype)
    together = linear(x, weight, bias, *tiles)
    for count in (*COUNTS, 4, 7, 40, 64, 90, 128, 141, 222, 270, 300, 500, 650, 800, 1500, 2048):
        for first in (0, (num_rows - count) // 2, num_rows - count):
            if count > num_rows:
                continue
            part = slice(first, first + count)
            assert torch.equal(linear(x[part], weight, bias, *tiles), together[part]), (count, first, tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(768, 768), (96, 320), (40, 24)], ids=str)
def test_a_single_row_is_the_first_of_two(shape: tuple[int, int], dtype: torch.dtype):
    layer = Linear(shape[1], shape[0]).to(dtype)
    init_weights(layer)
    x = random(2, shape[1], dtype=dtype)
    wanted = layer(x)[0]
    for axes in ((), (1,), (1, 1)):
        found = layer(x[0].view(*axes, -1))
        assert found.shape == (*axes, shape[0])
        assert torch.equal(found.flatten(), wanted)


def test_a_single_row_with_gradients_is_the_product_of_torch():
    with torch.inference_mode(mode=False), torch.enable_grad():
        layer, x = Linear(24, 40), torch.randn(1, 24, requires_grad=True)
        layer.tile_rows = 8
        init_weights(layer)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer(x).sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 8, 9, 24, 29])
def test_tiles_equal_a_loop_over_full_tiles(num_rows: int, dtype: torch.dtype):
    """The twin gives every row a tile of its own, in a place of the tile that it has in the list."""
    weight, bias = random(40, 24, dtype=dtype), random(40, dtype=dtype)
    x = random(num_rows, 24, dtype=dtype)
    found = linear(x, weight, bias, 8)
    assert found.shape == (num_rows, 40)
    for row in range(num_rows):
        tile = random(8, 24, dtype=dtype)
        tile[row % 8] = x[row]
        assert torch.equal(found[row], linear(tile, weight, bias)[row % 8])
    assert torch.equal(linear(x.unflatten(0, (1, num_rows)), weight, bias, 8), found[None])


@pytest.mark.parametrize("tile_rows", [3, 64])
def test_tiled_rows_have_no_company(tile_rows: int):
    layer = Linear(70, 50)
    init_weights(layer)
    layer.tile_rows = tile_rows
    x = random(131, 70)
    together = layer(x)
    assert torch.allclose(together, x @ layer.weight.T + layer.bias, atol=1e-5)
    for part in (slice(0, 1), slice(5, 8), slice(64, 130)):
        # Tiles begin elsewhere here, so this also asks that places within a tile are equal.
        assert torch.equal(layer(x[part]), together[part])


def counted_rows(monkeypatch) -> list[int]:
    """Rows of every product from here on."""
    counts: list[int] = []
    inner = products._product

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        counts.append(x.shape[:-1].numel())
        return inner(x, weight, bias)

    monkeypatch.setattr(products, "_product", counting)
    return counts


SUBJECTS: dict[str, Callable[[], Toy]] = {
    "infinity": lambda: toy("square"),
    "var": toy_var,
    "var-shared": lambda: toy_var(shared_aln=True),
    "switti": lambda: subject_of(use_ar=False),
}


@pytest.mark.parametrize("family", SUBJECTS)
def test_every_layer_of_a_model_passes_its_tiles_on(monkeypatch, family: str):
    subject = SUBJECTS[family]()
    requests = {
        "infinity": lambda: make_request(subject.schedule, (3,), (5,)),
        "switti": lambda: request_of(subject, (3,), (5,)),
    }
    request = requests.get(family, lambda: label_request(subject.schedule, (3,), (1,)))()
    model = copy.deepcopy(subject.model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(isinstance(layer, Linear) for layer in layers)
    for layer in layers:
        layer.tile_rows = TILE_ROWS
    counts = counted_rows(monkeypatch)
    run(subject, Full(), request, model)
    assert len(counts) > len(layers)
    assert set(counts) == {TILE_ROWS}


# The probe


def with_error(is_wrong: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A product whose result is another one in the last place where `is_wrong` says so."""

    def broken(x: Tensor, weight: Tensor, bias: Tensor | None, tile_rows: int | None, whole_rows: int | None) -> Tensor:
        exact = linear(x, weight, bias, TILE_ROWS)
        return torch.where(is_wrong(x), torch.nextafter(exact, exact + 1), exact)

    return broken


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize("count", [*COUNTS, *MORE_COUNTS])
def test_the_probe_sees_a_product_that_depends_on_how_many_rows_there_are(monkeypatch, count: int):
    monkeypatch.setattr(invariance, "linear", with_error(lambda x: torch.tensor(len(x) == count)))
    assert not is_row_independent(product((40, 24)))


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize("row", [0, 1, 273, 300, 337])
def test_the_probe_sees_a_single_row_that_differs_among_others(monkeypatch, row: int):
    def is_wrong(x: Tensor) -> Tensor:
        return (torch.arange(len(x)) == row)[:, None] & torch.tensor(len(x) == TOGETHER)

    monkeypatch.setattr(invariance, "linear", with_error(is_wrong))
    assert not is_row_independent(product((40, 24)))


@pytest.mark.usefixtures("fresh_probe")
def test_the_probe_finds_nothing_in_an_exact_product_and_asks_once(monkeypatch):
    calls = []
    # There bfloat16 is asked more.
    monkeypatch.setattr(native, "has_amx_products", lambda: False)

    def exact(x: Tensor, weight: Tensor, bias: Tensor | None, tile_rows: int | None, whole_rows: int | None) -> Tensor:
        calls.append(len(x))
        return (x[:, None].double() * weight.double()).sum(-1) + (0.0 if bias is None else bias)

    monkeypatch.setattr(invariance, "linear", exact)
    assert is_row_independent(product((3, 4)))
    assert len(calls) == 1 + 2 * len(COUNTS) + len(MORE_COUNTS)
    assert is_row_independent(product((3, 4)))
    assert len(calls) == 1 + 2 * len(COUNTS) + len(MORE_COUNTS)
    for other in (product((3, 5)), product((3, 4), torch.bfloat16), product((3, 4), has_bias=False)):
        assert is_row_independent(other)
    assert is_row_independent(product((3, 4), num_threads=99))
    assert len(calls) == 5 * (1 + 2 * len(COUNTS) + len(MORE_COUNTS))


def test_the_probe_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    is_row_independent(product((21, 11), tile_rows=5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize(
    ("is_wrong", "wanted"),
    [
        (lambda rows: 32 < rows < 200, (32, 512)),
        (lambda rows: 64 < rows < 300, (64, 512)),
        (lambda rows: 64 < rows < 300 or 500 < rows < 9000, (512, 512)),
        (lambda rows: rows % 2 == 0 and rows < 300 and rows != 256, (512, 512)),
        (lambda rows: False, (None, None)),
    ],
)
def test_tiles_end_where_the_layer_needs_none(
    monkeypatch, is_wrong: Callable[[int], bool], wanted: tuple[int | None, int | None]
):
    """A library sums by other code up to some number of rows, as oneDNN does with AMX."""
    product_of = products._product

    def broken(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product_of(x, weight, bias) + float(is_wrong(len(x)))

    monkeypatch.setattr(products, "_product", broken)
    assert tiles_of([product((40, 24))]) == wanted
    layer = Linear(24, 40)
    init_weights(layer)
    assert bool(tile_failing_([nn.Sequential(layer)])) == (wanted[0] is not None)
    assert (layer.tile_rows, layer.whole_rows) == wanted
    x = random(2700, 24)
    together = layer(x)
    counts = (1, 2, 31, 64, 65, 199, 255, 256, 299, 383, 384, 511, 512, 513, 700, 1024, 1800, 2699)
    assert all(torch.equal(layer(x[:n]), together[:n]) for n in counts)


@pytest.mark.usefixtures("fresh_probe")
def test_a_layer_without_a_bias_is_probed_with_one_too(monkeypatch):
    """Only its product with a bias is broken here; layers in bfloat16 that run in float32 are probed in that."""
    layer = Linear(24, 16, bias=False)
    kinds = [(p.has_bias, p.dtype) for p in products_of(layer.bfloat16(), torch.float32)]
    assert kinds == [(True, torch.float32), (False, torch.float32)]
    product_of = products._product

    def broken(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product_of(x, weight, bias) + float(len(x) == 3 and bias is not None)

    monkeypatch.setattr(products, "_product", broken)
    assert tiles_of(products_of(layer))[0] is not None
    assert tiles_of(products_of(Linear(24, 16, bias=False))[1:]) == (None, None)


# The other kernels


@pytest.mark.parametrize("threads", [1, 2, 7, 12, 61, 128, 999])
@pytest.mark.parametrize("shares", [activation._gelu_shares, activation._silu_shares])
def test_no_share_of_a_thread_has_a_rest(monkeypatch, shares: Callable[[int], int], threads: int):
    """However many numbers: few calls, whole steps for each thread, and less than a step behind them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for total in (0, 1, 63, 64, 16384, 16385, 32769, 45056, 100_032, 230_400, 230_401, 7_744_512):
        left, calls = total, 0
        while count := activation._even_count(left, shares):
            assert count % (64 * shares(count)) == 0
            left, calls = left - count, calls + 1
        assert left == total % 64
        assert calls <= 9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 64, 768])
def test_norm_and_residual_of_rows_alone(path: str, threads: int, width: int, dtype: torch.dtype):
    rows = Rows((3, 0, 140, 1))
    x, change = random(rows.total, width) * 3 + 1, random(rows.total, width, dtype=dtype)
    factor, shift = random(4, 6, width)[:, 2:4].unbind(1)
    normed = norm_modulate(x, factor, shift, rows, dtype)
    added = x.clone()
    add_gated_(added, change, factor, rows)
    for row, (begin, end) in enumerate(zip(rows.starts, rows.starts[1:], strict=False)):
        for first, last in ((begin, end), (end - 1, end)):
            if row == 1:
                continue
            alone, own = Rows((last - first,)), slice(row, row + 1)
            assert torch.equal(norm_modulate(x[first:last], factor[own], shift[own], alone, dtype), normed[first:last])
            mine = x[first:last].clone()
            add_gated_(mine, change[first:last], factor[own], alone)
            assert torch.equal(mine, added[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("shape", [(4, 16), (3, 20), (12, 64)], ids=str)
def test_heads_of_tokens_alone(path: str, threads: int, shape: tuple[int, int], rotates: bool, dtype: torch.dtype):
    qkv, gain = random(TOGETHER_ROWS, 3, *shape, dtype=dtype), torch.rand(shape[0]) * 5
    angle = random(TOGETHER_ROWS, shape[1] // 2)
    rotation = torch.cat((angle.cos(), angle.sin()), -1) if rotates else torch.empty(TOGETHER_ROWS, 0)
    together = unit_rotated(qkv.clone(), gain, rotation)
    for part in PARTS:
        alone = unit_rotated(qkv[part].clone(), gain, rotation[part].clone())
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, together, strict=True))


@pytest.fixture(params=[1, 3, 5])
def odd_threads(request):
    """Numbers of threads whose shares have a rest."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(("count", "width"), [(150, 24), (301, 576), (1203, 64), (70, 1000), (1, 7), (0, 8)])
@pytest.mark.parametrize("function", [gelu, silu])
def test_activations_of_tokens_alone(
    path: str, odd_threads: int, function: Callable[[Tensor], Tensor], count: int, width: int, dtype: torch.dtype
):
    x = random(count, width, dtype=dtype) * 3
    together = function(x.clone())
    assert together.shape == x.shape
    for part in (*PARTS, slice(count - 1, count), slice(11, 260)):
        assert torch.equal(function(x[part].clone()), together[part])
    plain = F.silu(x.double()) if function is silu else F.gelu(x.double(), approximate="tanh")
    assert torch.allclose(together.double(), plain, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 16, 30), (4, 64, 1, 40), (1, 32, 9, 530), (2, 128, 100, 131)], ids=str)
def test_attention_of_rows_alone(
    attention_path: str, threads: int, shape: tuple[int, int, int, int], dtype: torch.dtype
):
    if attention_path == "torch" and threads > 1:
        pytest.skip("torch's attention in float32 gives a head other bits on its second thread")
    heads, width, queries, keys = shape
    q = random(5 * queries, 3, heads, width, dtype=dtype)[:, 0]
    k, v = (random(5, heads, keys + 9, width, dtype=dtype)[:, :, :keys] for _ in range(2))
    together = attend_group(q, k, v, 0.3)
    for a, b in ((0, 1), (4, 5), (1, 3)):
        part = slice(a * queries, b * queries)
        assert torch.equal(attend_group(q[part], k[a:b], v[a:b], 0.3), together[part])
    if attention_path != "torch":
        for first, last in ((0, 1), (queries - 1, queries), (queries // 3, queries // 2 + 1)):
            alone = attend_group(q[queries + first : queries + last], k[1:2], v[1:2], 0.3)
            assert torch.equal(alone, together[queries + first : queries + last])
