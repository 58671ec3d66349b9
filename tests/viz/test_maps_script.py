"""The page's painting of maps is that of Python: the same pixels from both, in node where it is installed."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.eval.fidelity import psnr
from foveate.viz.maps import panel
from foveate.viz.page import asset
from foveate.viz.page_payload import packed_depth
from foveate.viz.scale_map import ScaleMap
from tests.randomness import numbers

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
SIDE, GRID, BLOCKS = 40, (8, 10), 12
PROGRAM = """
import { readFileSync } from "node:fs";
import { paintCompute, paintDifference, psnr, readDepth } from "./maps.mjs";
const given = JSON.parse(readFileSync(0, "utf-8"));
const image = (data) => ({ width: given.width, height: given.height, data: Uint8ClampedArray.from(data) });
const blank = () => image(new Array(4 * given.width * given.height).fill(0));
const [a, b] = [image(given.a), image(given.b)];
const compute = blank();
const [rows, columns] = given.grid;
paintCompute(compute, a, { rows, columns, blocks: given.blocks, depth: readDepth(given.depth, rows * columns) });
const told = paintDifference(blank(), a, b, 1);
console.log(JSON.stringify({ compute: [...compute.data], told, db: [psnr(a, b), psnr(a, a)] }));
"""


def _rgba(pixels: np.ndarray) -> list[int]:
    return np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 255)], -1).ravel().tolist()


@pytest.mark.parametrize("kind", ["mixed", "full", "skipped"])
def test_pixels_of_the_page_are_those_of_the_sheet(kind: str, tmp_path: Path) -> None:
    random = numbers(f"page maps {kind}")
    one = random.integers(0, 256, (SIDE, SIDE, 3))
    other = np.clip(one + random.integers(-12, 13, one.shape), 0, 255)
    depth = random.integers(-1, BLOCKS + 1, GRID) if kind == "mixed" else np.full(GRID, BLOCKS)
    depth_hw = None if kind == "skipped" else depth.astype(np.int16)
    (tmp_path / "maps.mjs").write_text(asset("maps.js"), encoding="utf-8")
    (tmp_path / "program.mjs").write_text(PROGRAM, encoding="utf-8")
    given = {"width": SIDE, "height": SIDE, "a": _rgba(one), "b": _rgba(other), "grid": GRID, "blocks": BLOCKS,
             "depth": packed_depth(depth_hw)}  # fmt: skip
    ran = subprocess.run(
        ["node", str(tmp_path / "program.mjs")], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    painted = np.array(found["compute"]).reshape(SIDE, SIDE, 4)[..., :3]
    scale = ScaleMap(scale=0, grid=GRID, num_blocks=BLOCKS, depth_hw=depth_hw)
    expected = panel(Image.fromarray(one.astype(np.uint8)), scale).astype(int)
    assert np.abs(painted - expected).max() <= 1, "one rounds, the other cuts"
    difference = np.abs(one - other).max(-1)
    assert found["told"]["most"] == difference.max()
    assert found["told"]["share"] == pytest.approx((difference > 8).mean())
    pair = other.astype(np.uint8)[None], one.astype(np.uint8)[None]
    assert found["db"] == pytest.approx([psnr(*pair)[0], 100.0])
