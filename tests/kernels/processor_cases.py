"""What `test_processors.py` runs as on a processor with AVX2: no C code, and oneDNN without products in bfloat16."""

import pytest
import torch
from torch import Tensor

from foveate.kernels import native
from foveate.kernels.invariance import TILE_ROWS, Product, describe_rows, is_row_independent
from foveate.kernels.linear import describe_products, linear, takes_onednn
from foveate.pipeline.pipeline import Pipeline

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=[1, 2])
def threads(request):
    """Runs a test on one thread and on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_this_is_such_a_processor():
    assert native.library() is None
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    assert takes_onednn(torch.float32)
    assert not takes_onednn(torch.bfloat16)
    assert describe_products().startswith("onednn, but torch in bfloat16")
    assert describe_rows() == "independent"
    assert native.warnings() == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_rows", [None, TILE_ROWS])
@pytest.mark.parametrize("shape", [(96, 40), (64, 64), (50, 70), (1024, 256)], ids=str)
def test_rows_are_independent(shape: tuple[int, int], tile_rows: int | None, threads: int, dtype: torch.dtype):
    probed = Product(num_outputs=shape[0], num_inputs=shape[1], dtype=dtype, device=CPU, tile_rows=tile_rows)
    assert is_row_independent(probed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 65])
def test_products_are_right(num_rows: int, dtype: torch.dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((num_rows, 70), (50, 70), (50,)))
    with torch.inference_mode():
        found = linear(x, weight, bias)
    assert found.dtype is dtype
    wanted = x.double() @ weight.double().T + bias.double()
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-4 if dtype is torch.float32 else 0.3)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}, {}], ids=str)
def test_an_image_is_generated_and_the_same_in_a_batch(toy_folder, options: dict[str, str]):
    pipe = Pipeline.from_pretrained(toy_folder, **options)
    prompts = ["a red apple", "two blue dogs left of the house", "a cat"]

    def latents(texts: list[str], seeds: list[int]) -> Tensor:
        return pipe(texts, seed=seeds, output_type="latent").images

    together = latents(prompts, [4, 5, 6])
    assert together.isfinite().all()
    assert together.float().std() > 0
    for index, prompt in enumerate(prompts):
        assert torch.equal(latents([prompt], [4 + index])[0], together[index])
    assert pipe("a cat", seed=6).images[0].getextrema()
