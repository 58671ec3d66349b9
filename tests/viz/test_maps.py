"""The compute map shows what the trace says."""

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.core.cost import ModelShape, RowWork, ScaleWork
from foveate.core.errors import FoveateError
from foveate.core.trace import ScaleTrace, Trace
from foveate.pipeline.pipeline import Pipeline
from foveate.viz.maps import compute_map, panel
from foveate.viz.scale_map import ScaleMap, scale_map, scale_maps

SHAPE = ModelShape(num_blocks=4, width=8, ff_width=8, num_heads=1, head_width=8, head_outputs=4, input_channels=2)
GREY = Image.new("RGB", (64, 64), (200, 200, 200))


def _scale(
    keep: list[bool], depth: list[int], *, ran: bool = True, has_maps: bool = True, unconditional: int = 0
) -> ScaleTrace:
    rows = {(0, True): RowWork(block_tokens=(sum(keep),) * 4, head_tokens=sum(keep))}
    if unconditional:
        rows[0, False] = RowWork(block_tokens=(unconditional,) * 4, head_tokens=unconditional)
    return ScaleTrace(
        scale=1,
        grid=(2, 2),
        ran=ran,
        work=ScaleWork(scale=1, grid_tokens=4 if ran else 0, rows=rows if ran else {}),
        keep_Bl=torch.tensor([keep]) if has_maps else None,
        depth_Bl=torch.tensor([depth]) if has_maps else None,
    )


def _panel(scale: ScaleTrace) -> np.ndarray:
    return panel(GREY, scale_map(scale, 0, 4))


def test_dropped_tokens_are_dark_and_full_ones_untouched() -> None:
    pixels = _panel(_scale([True, False, True, True], [4, 0, 1, 3])).astype(int)
    assert (pixels[10, 10] == 200).all(), "all blocks: the picture as it is"
    assert pixels[10, 50].max() < 80, "did not run: dark"
    few, most = pixels[50, 10], pixels[50, 50]
    assert most.sum() > few.sum(), "the more blocks, the brighter"


def test_a_scale_that_did_not_run_is_pale() -> None:
    assert _panel(_scale([True] * 4, [4] * 4, ran=False)).min() > 180


@pytest.mark.parametrize(
    ("unconditional", "text"),
    [
        (0, "3/4 tokens, 50 % of blocks, one branch"),
        (2, "3/4 tokens, 50 % of blocks, two branches on 2 tokens"),
        (3, "3/4 tokens, 50 % of blocks, two branches"),
    ],
)
def test_a_caption_names_tokens_blocks_and_branches(unconditional: int, text: str) -> None:
    found = scale_map(_scale([True, False, True, True], [4, 0, 1, 3], unconditional=unconditional), 0, 4)
    assert found.caption == text
    assert found.depth_hw is not None
    assert found.depth_hw.tolist() == [[4, -1], [1, 3]]


@pytest.mark.parametrize(
    "policy", ["ld-pruning:energy_share=0.6", "depthvar:reference_scale=-2", "skip-scales:count=1"]
)
def test_maps_of_a_call_are_what_it_counted(toy_pipe: Pipeline, policy: str) -> None:
    trace = toy_pipe(["a red cat", "two dogs"], policy=policy, seed=3, trace=True).trace
    for image in range(2):
        for scale, found in zip(trace.scales, scale_maps(trace, image), strict=True):
            assert (found.depth_hw is not None) == scale.ran
            if scale.ran:
                row = scale.work.rows[(image, True)]
                assert found.num_tokens == row.head_tokens
                assert found.block_share * found.num_blocks * scale.work.grid_tokens == pytest.approx(
                    sum(row.block_tokens)
                )
                assert (found.num_guided > 0) == ((image, False) in scale.work.rows)


def test_a_scale_that_did_not_run_says_so() -> None:
    assert scale_map(_scale([True] * 4, [4] * 4, ran=False), 0, 4).caption == "did not run"


def test_maps_must_have_been_recorded() -> None:
    with pytest.raises(FoveateError, match="trace=True"):
        scale_map(_scale([True] * 4, [4] * 4, has_maps=False), 0, 4)
    with pytest.raises(FoveateError, match="image_index must be from 0 to 0, got 1"):
        scale_map(_scale([True] * 4, [4] * 4), 1, 4)
    with pytest.raises(FoveateError, match="have its shape"):
        ScaleMap(scale=0, grid=(2, 2), num_blocks=4, depth_hw=np.zeros((1, 4), dtype=np.int16))


def test_the_sheet_holds_one_panel_per_scale_and_the_picture() -> None:
    trace = Trace(shape=SHAPE, text_tokens={(0, True): 3}, bytes_per_element=4)
    trace.scales = [_scale([True] * 4, [4] * 4), _scale([True, False, False, False], [4, 0, 0, 0])]
    sheet = np.asarray(compute_map(GREY, trace, 0, columns=3))
    assert sheet.shape[1] == 3 * (256 + 12) + 12
    assert compute_map(GREY.resize((32, 96)), trace, 0, columns=4).width == 4 * (230 + 12) + 12
    assert compute_map(GREY.resize((32, 96)), trace, 0, columns=1).width == 720
    assert (sheet[60:170, 20:130] == 200).all(), "first panel: everything ran"
    assert sheet[250, 280 + 200].max() < 80, "second panel: the last token did not run"
