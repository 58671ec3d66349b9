"""PNG files that can be made again: bit for bit, with every difference named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from foveate.core.errors import FoveateError
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import differences, read_png_config, regenerate, save_png


@pytest.fixture
def file(toy_pipe: Pipeline, tmp_path: Path) -> Path:
    output = toy_pipe.generate(
        ["a red cat", "a rocket \u2764"],
        num_images_per_prompt=2,
        seed=[3, 5],
        policy="ld-pruning:energy_share=0.5|drop-branch:count=1",
        negative_prompt="green",
        guidance_scale=[1, 2, 3, 3, 3, 3, 3],
    )
    assert isinstance(output.images, list)
    return save_png(output.images[3], tmp_path / "b.png", output.row_config(3))


def test_regenerates_bit_for_bit(toy_pipe: Pipeline, file: Path) -> None:
    again = regenerate(file, toy_pipe)
    assert again.is_identical
    assert again.differences == ()
    assert read_png_config(file)["row"] == 3
    assert sorted(p.name for p in file.parent.iterdir()) == ["b.png"]


def test_other_pixels_and_threads_are_noticed(toy_pipe: Pipeline, file: Path) -> None:
    config = read_png_config(file)
    picture = np.asarray(Image.open(file)).copy()
    picture[0, 0] ^= 1
    config["versions"]["torch"] = "1.0"
    threads = torch.get_num_threads()
    config["threads"] = threads + 1
    other = save_png(Image.fromarray(picture), file.with_name("c.png"), config)
    again = regenerate(other, toy_pipe)
    assert not again.is_identical
    assert again.differences == (f"versions.torch: 1.0 then, {torch.__version__} now",)
    assert torch.get_num_threads() == threads


def test_the_registered_model_is_loaded_as_it_was(
    toy_pipe: Pipeline, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, dict[str, object]]] = []

    def load(name: str, **options: object) -> Pipeline:
        loaded.append((name, options))
        return toy_pipe

    monkeypatch.setattr(Pipeline, "from_pretrained", load)
    other = file.with_name("c.png")
    save_png(Image.open(file), other, read_png_config(file) | {"model": "emoji", "device": "cuda"})
    assert "device: cuda then, cpu now" in regenerate(other).differences
    formats = {"dtype": "float32", "decoder_dtype": None, "quantization": None}
    assert loaded == [("emoji", {"weights": "pretrained", "device": "cuda", **formats})]


def test_differences_ignore_the_row() -> None:
    then, now = {"row": 1, "a": {"b": 1}}, {"a": {"b": 2}, "c": 3}
    assert differences(then, now) == ["a.b: 1 then, 2 now", "c: None then, 3 now"]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"bad": object()})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FoveateError, match="no folder"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "x" / "a.png", {})


def test_refuses_what_it_did_not_write(tmp_path: Path, file: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(FoveateError, match="carries no configuration"):
        regenerate(tmp_path / "plain.png")
    with pytest.raises(FoveateError, match="cannot read"):
        regenerate(tmp_path / "none.png")
    with pytest.raises(FoveateError, match="local model, toy"):
        regenerate(file)


@pytest.mark.parametrize("content", ["[1]", "3", '{"format": 2}', "{"])
def test_chunk_must_be_of_our_format(tmp_path: Path, content: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("foveate", content)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(FoveateError, match=r"a\.png: the configuration"):
        read_png_config(tmp_path / "a.png")


def test_bombs_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(FoveateError, match="cannot read .* as a picture"):
        read_png_config(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 0), ("threads", "x"), ("threads", 10**12), ("row", "x"), ("row", 4), ("row", -1), ("seeds", "abcd"),
        ("num_images_per_prompt", 0), ("temperature", "x"), ("top_k", ["a"] * 7), ("prompts", 5), ("policy", []),
        ("policy", {"parts": [{}]}),
    ],
)  # fmt: skip
def test_damaged_values_are_one_line(toy_pipe: Pipeline, file: Path, name: str, value: object) -> None:
    save_png(Image.open(file), file, {**read_png_config(file), name: value})
    with pytest.raises(FoveateError) as caught:
        regenerate(file, toy_pipe)
    assert "\n" not in str(caught.value)
