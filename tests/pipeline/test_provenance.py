"""Image files that can be made again: bit for bit, one image's own row alone, with every difference named."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from foveate.core.errors import FoveateError
from foveate.core.warnings import CallWarning
from foveate.pipeline import bulk
from foveate.pipeline.encoding import JPEG_TEXT_BYTES, Encoder
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import differences, read_image_config, regenerate, save_image

PROMPTS = ["a red cat", "a rocket \u2764"]


def draw(pipe: Pipeline, **options: Any) -> PipelineOutput:
    return pipe(
        PROMPTS,
        num_images_per_prompt=2,
        policy="ld-pruning:energy_share=0.5|drop-branch:count=1",
        negative_prompt=["green", "blue"],
        guidance_scale=[1, 2, 3, 3, 3, 3, 3],
        **options,
    )


def save(output: PipelineOutput, row: int, path: Path, **options: Any) -> Path:
    assert isinstance(output.images, list)
    return save_image(output.images[row], path, output.row_config(row), **options)


def text_in(path: Path) -> str:
    """Everything that the file holds beside pixels, as somebody else's program would look for it."""
    return path.read_bytes().decode("latin-1")


@pytest.fixture(scope="module")
def output(toy_pipe: Pipeline) -> PipelineOutput:
    """Four images; tests leave them as they are."""
    return draw(toy_pipe, seed=[3, 5])


@pytest.fixture
def file(output: PipelineOutput, tmp_path: Path) -> Path:
    return save(output, 3, tmp_path / "b.png")


@pytest.fixture
def old_file(output: PipelineOutput, tmp_path: Path) -> Path:
    """A file of format 1."""
    text = PngImagePlugin.PngInfo()
    text.add_text("foveate", json.dumps({**output.config, "row": 3}))
    path = tmp_path / "old.png"
    output.images[3].save(path, pnginfo=text)
    return path


def test_regenerates_bit_for_bit(toy_pipe: Pipeline, file: Path) -> None:
    again = regenerate(file, toy_pipe)
    assert again.is_identical
    assert again.differences == ()
    assert sorted(p.name for p in file.parent.iterdir()) == ["b.png"]


def test_a_file_holds_its_own_row_and_no_other(toy_pipe: Pipeline, file: Path) -> None:
    config = read_image_config(file)
    assert config["format"] == 2
    assert (config["prompt"], config["negative_prompt"], config["seed"]) == (PROMPTS[1], "blue", 6)
    assert config["encoder"] == {"format": "png", "quality": None, "lossless": True}
    assert {"policy", "dtype", "versions", "weights"} <= set(config)
    assert not {"prompts", "negative_prompts", "seeds", "row", "batch"} & set(config)
    held = text_in(file)
    assert "rocket" in held
    for other in ("red cat", "green"):
        assert other not in held
    # The row alone is drawn, not the batch.
    assert len(regenerate(file, toy_pipe).output.seeds) == 1


def test_the_first_format_is_still_read(toy_pipe: Pipeline, old_file: Path, tmp_path: Path) -> None:
    again = regenerate(old_file, toy_pipe)
    assert again.is_identical
    assert again.differences == ()
    assert again.output.prompts[again.row] == PROMPTS[1]
    assert again.output.seeds == (3, 4, 5, 6)
    # What is written now is of the second format.
    saved = save_image(again.image, tmp_path / "new.png", again.config)
    assert read_image_config(saved)["prompt"] == PROMPTS[1]
    assert regenerate(saved, toy_pipe).is_identical


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.WebP", "a.PNG"])
def test_other_formats_carry_the_same(toy_pipe: Pipeline, output: PipelineOutput, tmp_path: Path, name: str) -> None:
    path = save(output, 3, tmp_path / name)
    with Image.open(path) as image:
        assert image.format == {"jpg": "JPEG"}.get(path.suffix[1:].lower(), path.suffix[1:].upper())
        assert image.size == (256, 256)
        seen, drawn = (np.asarray(i.convert("L").reduce(8)).astype(int) for i in (image, output.images[3]))  # type: ignore
    # The toy draws noise, which lossy formats keep in the large only.
    assert np.abs(seen - drawn).mean() < 2
    config = read_image_config(path)
    kinds = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".png": "png"}
    assert config["encoder"]["format"] == kinds[path.suffix.lower()]
    assert {**config, "encoder": None} == {**output.row_config(3), "encoder": None}
    assert "red cat" not in text_in(path)
    again = regenerate(path, toy_pipe)
    assert (again.is_identical, again.differences) == (True, ())


def test_quality_is_stored_and_used_again(toy_pipe: Pipeline, output: PipelineOutput, tmp_path: Path) -> None:
    for name in ("a.jpg", "a.webp"):
        path = save(output, 0, tmp_path / name, encoder=Encoder.for_file(name, 60))
        encoder = read_image_config(path)["encoder"]
        assert (encoder["quality"], encoder["lossless"]) == (60, False)
        assert encoder["pillow"]
        assert encoder["codec"]
        assert path.stat().st_size < save(output, 0, tmp_path / f"best-{name}").stat().st_size
        again = regenerate(path, toy_pipe)
        assert again.is_identical
        assert again.encoder == Encoder.for_file(name, 60)
        # The image itself is the one that was drawn, not the lossy one.
        assert np.array_equal(np.asarray(again.image), np.asarray(output.images[0]))
    path = save(output, 0, tmp_path / "b.webp", encoder=Encoder.for_file("b.webp", is_lossless=True))
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(output.images[0]))
    assert read_image_config(path)["encoder"] == {"format": "webp", "quality": None, "lossless": True}
    assert regenerate(path, toy_pipe).is_identical


def test_another_encoder_is_a_difference(toy_pipe: Pipeline, output: PipelineOutput, tmp_path: Path) -> None:
    path = save(output, 0, tmp_path / "a.jpg")
    config = read_image_config(path)
    with Image.open(path) as image:
        content = Encoder.for_file("a.jpg").encode(
            image.convert("RGB"), json.dumps({**config, "encoder": {**config["encoder"], "pillow": "1.0"}})
        )
    path.write_bytes(content)
    again = regenerate(path, toy_pipe)
    # Its pixels went through the encoder twice.
    assert not again.is_identical
    assert [re.sub(r"then, .*", "then", line) for line in again.differences] == ["encoder.pillow: 1.0 then"]


@pytest.mark.parametrize("name", ["a.gif", "a.bmp", "a.tiff", "a", "a.jpg.txt"])
def test_only_what_carries_a_configuration_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(FoveateError, match=r"ends in \.png, \.jpg, \.jpeg, \.webp"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / name, {})
    assert list(tmp_path.iterdir()) == []


def test_encoders_refuse_what_they_cannot_do(tmp_path: Path) -> None:
    for quality in (0, 101, -1, True):
        with pytest.raises(FoveateError, match="quality must be a whole number from 1 to 100"):
            Encoder(format="jpeg", quality=quality)
    with pytest.raises(FoveateError, match="png is lossless"):
        Encoder.for_file("a.png", 90)
    with pytest.raises(FoveateError, match="jpeg is never lossless"):
        Encoder.for_file("a.jpg", is_lossless=True)
    with pytest.raises(FoveateError, match="leave one of the two out"):
        Encoder.for_file("a.webp", 90, is_lossless=True)
    with pytest.raises(FoveateError, match="let the name and the format agree"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png", {}, encoder=Encoder.for_file("a.jpg"))


def test_a_jpeg_that_cannot_hold_the_text_is_refused_and_others_hold_it(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    rest = len(
        json.dumps({"format": 2, "x": "", "encoder": Encoder.for_file("a.jpg").to_json()}, separators=(",", ":"))
    )
    fits = {"format": 2, "x": "y" * (JPEG_TEXT_BYTES - rest)}
    assert read_image_config(save_image(image, tmp_path / "fits.jpg", fits))["x"] == fits["x"]
    longer = {"format": 2, "x": fits["x"] + "y"}
    with pytest.raises(FoveateError, match=r"long\.jpg: the configuration takes 65001 bytes .* write png or webp"):
        save_image(image, tmp_path / "long.jpg", longer)
    for name in ("a.png", "a.webp"):
        assert read_image_config(save_image(image, tmp_path / name, longer))["x"] == longer["x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.webp", "fits.jpg"]


def test_a_batch_that_is_not_exact_is_drawn_again_as_large(toy_pipe: Pipeline, tmp_path: Path) -> None:
    output = draw(toy_pipe, seed=11, rng="reference")
    path = save(output, 2, tmp_path / "a.png")
    config = read_image_config(path)
    assert config["batch"] == {"size": 4, "index": 2}
    assert (config["prompt"], config["negative_prompt"], config["seed"]) == (PROMPTS[1], "blue", 11)
    assert "red cat" not in text_in(path)
    again = regenerate(path, toy_pipe)
    assert again.output.prompts == (PROMPTS[1],) * 4
    assert again.row == 2
    assert (again.is_identical, again.differences) == (True, ())
    # In a batch of another size, or at another place, something else is drawn.
    other = save_image(output.images[2], tmp_path / "b.png", {**config, "batch": {"size": 3, "index": 2}})  # type: ignore
    assert not regenerate(other, toy_pipe).is_identical
    other = save_image(output.images[2], tmp_path / "c.png", {**config, "batch": {"size": 4, "index": 1}})  # type: ignore
    assert not regenerate(other, toy_pipe).is_identical


@pytest.mark.parametrize("rng", ["keyed", "reference"])
def test_a_stored_batch_is_drawn_as_stored(toy_pipe: Pipeline, tmp_path: Path, rng: str) -> None:
    output = draw(toy_pipe, seed=11, rng=rng)
    assert isinstance(output.images, list)
    path = save_image(output.images[1], tmp_path / "a.webp", output.row_config(1, store_batch=True))
    batch = read_image_config(path)["batch"]
    assert batch["prompts"] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert batch["negative_prompts"] == ["green"] * 2 + ["blue"] * 2
    assert batch["seeds"] == ([11, 12, 11, 12] if rng == "keyed" else [11] * 4)
    assert (batch["size"], batch["index"]) == (4, 1)
    again = regenerate(path, toy_pipe)
    assert again.output.prompts == output.prompts
    assert again.output.seeds == output.seeds
    assert (again.is_identical, again.differences) == (True, ())


def test_a_batch_too_large_for_memory_is_refused_before_it_is_made(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = draw(toy_pipe, seed=11, rng="reference")
    config = output.row_config(2)
    for size in (10**12, 10**30):
        path = save_image(output.images[2], tmp_path / "a.png", {**config, "batch": {"size": size, "index": 2}})  # type: ignore
        with pytest.raises(FoveateError, match=f"{size} do not fit .* the largest batch that fits is"):
            regenerate(path, toy_pipe)
    # Where nobody says how much memory there is, too.
    monkeypatch.setattr(bulk, "available_bytes", lambda device: None)
    with pytest.raises(FoveateError, match="the largest batch that fits is 4096"):
        regenerate(path, toy_pipe)


def test_a_callers_own_generator_is_named(toy_pipe: Pipeline, tmp_path: Path) -> None:
    output = toy_pipe("a cat", rng="reference", generator=torch.Generator().manual_seed(1))
    assert output.row_config(0)["seed"] is None
    with pytest.raises(FoveateError, match="generated with a caller's generator"):
        regenerate(save(output, 0, tmp_path / "a.png"), toy_pipe)


def test_warnings_are_stored_and_are_no_difference(toy_pipe: Pipeline, output: PipelineOutput, tmp_path: Path) -> None:
    warned = CallWarning(code="untrained_size", message="it never saw such a size")
    report = replace(output.report, warnings=(warned,))
    path = save(replace(output, report=report), 3, tmp_path / "a.jpg")
    assert read_image_config(path)["warnings"] == [{"code": "untrained_size", "message": "it never saw such a size"}]
    assert regenerate(path, toy_pipe).differences == ()
    own = {warning.code for warning in output.report.warnings}
    assert {each["code"] for each in output.row_config(3).get("warnings", [])} == own
    assert own <= {"kernels_plain"}, "nothing else is wrong with this call"


def test_other_pixels_and_threads_are_noticed(toy_pipe: Pipeline, file: Path) -> None:
    config = read_image_config(file)
    picture = np.asarray(Image.open(file)).copy()
    picture[0, 0] ^= 1
    config["versions"]["torch"] = "1.0"
    threads = torch.get_num_threads()
    config["threads"] = threads + 1
    other = save_image(Image.fromarray(picture), file.with_name("c.png"), config)
    again = regenerate(other, toy_pipe)
    assert not again.is_identical
    assert again.differences == (
        f"threads: {threads + 1} then, {threads} now",
        f"versions.torch: 1.0 then, {torch.__version__} now",
    )
    assert torch.get_num_threads() == threads, "how many there are is the caller's to say"


def test_the_registered_model_is_loaded_as_it_was(
    toy_pipe: Pipeline, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, dict[str, object]]] = []

    def load(name: str, **options: object) -> Pipeline:
        loaded.append((name, options))
        return toy_pipe

    monkeypatch.setattr(Pipeline, "from_pretrained", load)
    other = file.with_name("c.png")
    save_image(Image.open(file), other, read_image_config(file) | {"model": "emoji", "device": "cuda"})
    assert "device: cuda then, cpu now" in regenerate(other).differences
    formats = {"dtype": "float32", "decoder_dtype": None, "quantization": None}
    assert loaded == [("emoji", {"weights": "pretrained", "device": "cuda", "kernels": None, **formats})]


def test_a_cut_prompt_is_warned_of_in_its_own_files_alone(toy_pipe: Pipeline) -> None:
    """Messages repeat prompts, and another image's prompt is nobody's business."""
    long = ['it\'s a "red" cat ' + "left of the dog " * 40, "a green apple " + "right of the house " * 40]
    output = toy_pipe([*long, "a dog"], seed=1, policy="skip-scales:count=4")
    assert [warning.code for warning in output.report.warnings].count("prompt_cut") == 2
    for row, words in enumerate(("cat", "apple")):
        (warning,) = (w for w in output.row_config(row)["warnings"] if w["code"] == "prompt_cut")
        assert words in warning["message"]
    assert "prompt_cut" not in json.dumps(output.row_config(2))


def test_differences_ignore_the_row_and_warnings() -> None:
    then, now = {"row": 1, "a": {"b": 1}, "warnings": [1]}, {"a": {"b": 2}, "c": 3}
    assert differences(then, now) == ["a.b: 1 then, 2 now", "c: None then, 3 now"]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"bad": object()})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FoveateError, match="no folder"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "x" / "a.png", {})


def test_refuses_what_it_did_not_write(tmp_path: Path, file: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(FoveateError, match="carries no configuration"):
        regenerate(tmp_path / "plain.png")
    with pytest.raises(FoveateError, match="cannot read"):
        regenerate(tmp_path / "none.png")
    with pytest.raises(FoveateError, match="local model, toy"):
        regenerate(file)


@pytest.mark.parametrize("content", ["[1]", "3", '{"format": 3}', '{"format": "2"}', "{}", "{", "[" * 100_000])
def test_chunk_must_be_of_our_format(tmp_path: Path, content: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("foveate", content)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(FoveateError, match=r"a\.png: the configuration"):
        read_image_config(tmp_path / "a.png")


def test_bombs_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(FoveateError, match="cannot read .* as an image: "):
        read_image_config(file)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_comments_of_others_are_none_of_ours(tmp_path: Path, name: str) -> None:
    for comment in (b"ASCII\0\0\0steps: 20", b"UNICODE\0{}", b"\xff\xfe", "a camera", b'ASCII\0\0\0{"format": 2}'):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = comment
        Image.new("RGB", (4, 4)).save(tmp_path / name, exif=exif)
        with pytest.raises(FoveateError, match="carries no configuration"):
            read_image_config(tmp_path / name)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0foveate {"
    Image.new("RGB", (4, 4)).save(tmp_path / name, exif=exif)
    with pytest.raises(FoveateError, match="the configuration in the file is damaged"):
        read_image_config(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png"])
def test_damaged_files_are_one_line(output: PipelineOutput, tmp_path: Path, name: str) -> None:
    whole = save(output, 0, tmp_path / name).read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole[: generator.integers(1, len(whole))])
        for place in generator.integers(0, min(len(broken), 4000), 8):
            broken[place] = generator.integers(0, 256)
        (tmp_path / name).write_bytes(broken)
        try:
            read_image_config(tmp_path / name)
        except FoveateError as error:
            assert "\n" not in str(error)  # noqa: PT017 - what survives the damage is no failure


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 0), ("threads", "x"), ("threads", 10**12), ("threads", None), ("seed", "x"), ("seed", -1),
        ("seed", 1.5), ("seed", 2**63), ("seed", [1]), ("prompt", 5), ("prompt", ""), ("prompt", None),
        ("prompt", ["a"]), ("negative_prompt", 5), ("negative_prompt", ""), ("temperature", "x"), ("top_k", ["a"] * 7),
        ("policy", []),
        ("policy", {"parts": [{}]}), ("width", 10**9), ("rng", "x"), ("batch", 5), ("batch", {"size": 2}),
        ("batch", {"size": 2, "index": 2}), ("batch", {"size": 2, "index": -1}), ("batch", {"size": "x", "index": 0}),
        ("batch", {"size": 2, "index": 0, "prompts": ["a"], "negative_prompts": None, "seeds": [1]}),
        ("batch", {"size": 1, "index": 0, "prompts": [5], "negative_prompts": None, "seeds": [1]}),
        ("batch", {"size": 2, "index": 0, "prompts": ["a", "b"], "negative_prompts": None, "seeds": [1]}),
    ],
)  # fmt: skip
def test_damaged_values_are_one_line(toy_pipe: Pipeline, file: Path, name: str, value: object) -> None:
    save_image(Image.open(file), file, {**read_image_config(file), name: value})
    with pytest.raises(FoveateError) as caught:
        regenerate(file, toy_pipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoder", [5, [], {}, {"format": "gif", "quality": None}, {"format": "jpeg", "quality": "x"}])
def test_a_damaged_encoder_is_one_line(
    toy_pipe: Pipeline, output: PipelineOutput, tmp_path: Path, encoder: Any
) -> None:
    path = tmp_path / "a.png"
    text = json.dumps({**output.row_config(0), "encoder": encoder})
    path.write_bytes(Encoder().encode(output.images[0], text))  # type: ignore[arg-type]
    with pytest.raises(FoveateError):
        regenerate(path, toy_pipe)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("row", "x"), ("row", 4), ("row", -1), ("seeds", "abcd"), ("seeds", [1]), ("num_images_per_prompt", 0),
        ("num_images_per_prompt", 10**12), ("prompts", 5), ("prompts", []),
    ],
)  # fmt: skip
def test_damaged_values_of_the_first_format_are_one_line(
    toy_pipe: Pipeline, old_file: Path, name: str, value: object
) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("foveate", json.dumps({**read_image_config(old_file), name: value}))
    Image.open(old_file).save(old_file, pnginfo=text)
    with pytest.raises(FoveateError) as caught:
        regenerate(old_file, toy_pipe)
    assert "\n" not in str(caught.value)
