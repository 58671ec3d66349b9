"""`foveate generate`: files, JSON, the round trip through a file, and that failures lose nothing that was drawn."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.cli import image_files
from foveate.cli.generate import refuse_numbers
from foveate.core.errors import FoveateError
from foveate.core.trace import Trace
from foveate.pipeline import bulk
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import read_image_config, save_image
from tests.randomness import few

pytestmark = pytest.mark.usefixtures("on_a_machine_with_c_code")


FOLDERS = ("out.v2", "run-1.5", "2024.05.01", "emoji-0.06M", ".hidden", "a.folder", "x.png/")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_writes_pictures_and_one_json_object(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    ran = run(
        "generate", "A red cat!", "two dogs", "-m", toy_folder, "-n", 2, "--seed", 7, "-p", "skip-scales:count=2",
        "-o", "out", "--json",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    data = ran.data
    parts = ["schema_version", "images", "policy", "ms", "flops", "tokens", "token_blocks", "warnings"]
    assert list(data) == parts
    assert data["schema_version"] == 1
    assert [image["path"] for image in data["images"]] == [
        "out/a-red-cat-7.png", "out/a-red-cat-8.png", "out/two-dogs-7.png", "out/two-dogs-8.png",
    ]  # fmt: skip
    assert [image["seed"] for image in data["images"]] == [7, 8, 7, 8]
    assert data["images"][2]["prompt"] == "two dogs"
    assert data["policy"]["spec"] == "skip-scales:count=2"
    assert len(data["policy"]["fingerprint"]) == 12
    assert set(data["ms"]) == {"text", "transformer", "refiner", "decoder", "total"}
    assert data["ms"]["refiner"] == data["flops"]["refiner_run"] == 0
    assert 0 < data["flops"]["run"] < data["flops"]["full"]
    assert data["tokens"] == {"run": 4 * 121, "full": 4 * 521}
    # Three blocks, and two branches that both run.
    assert data["token_blocks"] == {"run": 4 * 121 * 6, "full": 4 * 521 * 6}
    assert data["warnings"] == []
    assert names(tmp_path) == [Path(image["path"]).name for image in data["images"]]
    config = read_image_config(tmp_path / "out" / "two-dogs-7.png")
    assert (config["prompt"], config["seed"]) == ("two dogs", 7)
    assert "red cat" not in json.dumps(config)


def test_table_and_paths_for_people(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    ran = run("generate", "a cat", "--model", toy_folder, "--seed", 1, "--output", "one.png", "--guidance-scale", "1")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-1] == "one.png"
    for word in ("time", "FLOPs", "tokens", "token-blocks", "predicted speedup", "256x256"):
        assert word in ran.out
    assert names(tmp_path) == ["one.png"]
    assert read_image_config(tmp_path / "one.png")["guidance_scale"] == [1.0] * 7


def test_previews_and_trace(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run("generate", "a cat", "-m", toy_folder, "--seed", 1, "-o", "out", "--preview", "--trace", "--json")
    assert ran.code == 0, ran.err
    image = ran.data["images"][0]
    assert image["previews"] == [f"out/a-cat-1-scale-{scale:02}.png" for scale in range(6)]
    assert pixels_of(tmp_path / image["previews"][0]).shape == (256, 256, 3)
    assert pixels_of(tmp_path / image["map"]).shape[0] > 256
    assert image["trace"] == ran.data["trace"] == "out/a-cat-1-trace.json"
    trace = Trace.from_json(json.loads((tmp_path / ran.data["trace"]).read_text()))
    assert trace.cost.tokens == ran.data["tokens"]["run"]


def test_every_batch_has_a_trace(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    draw = ("generate", "a cat", "-n", 3, "--seed", 1, "-m", toy_folder, "-p", "skip-scales:count=3", "--trace")
    data = run(*draw, "-o", "out", "--batch-size", 2, "--json").data
    traces = [image["trace"] for image in data["images"]]
    assert traces == ["out/a-cat-1-trace.json"] * 2 + ["out/a-cat-3-trace.json"]
    assert "trace" not in data
    read = [Trace.from_json(json.loads((tmp_path / name).read_text())) for name in dict.fromkeys(traces)]
    assert [len(trace.text_tokens) for trace in read] == [4, 2]
    assert sum(trace.cost.flops for trace in read) == data["flops"]["run"]
    lines = run(*draw, "-o", "again", "--batch-size", 2).out.splitlines()
    assert lines[-2:] == ["again/a-cat-1-trace.json", "again/a-cat-3-trace.json"]


def test_batches_change_sums_and_pixels_in_nothing(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    draw = ("generate", "a cat", "a dog", "-n", 2, "--seed", "7,9", "-m", toy_folder, "-p", "depthvar", "--json")
    whole, parts = (run(*draw, "-o", name, *flags).data for name, flags in (("all", ()), ("3", ("--batch-size", 3))))
    for key in ("policy", "flops", "tokens", "token_blocks", "warnings"):
        assert whole[key] == parts[key]
    for one, other in zip(whole["images"], parts["images"], strict=True):
        assert Path(one["path"]).name == Path(other["path"]).name
        assert np.array_equal(pixels_of(tmp_path / one["path"]), pixels_of(tmp_path / other["path"]))
        configs = [read_image_config(tmp_path / image["path"]) for image in (one, other)]
        assert configs[0] == configs[1]


def test_a_policy_of_depth_saves_token_blocks_and_says_so(run: Callable[..., Any], toy_folder: Path) -> None:
    draw = ("generate", "a cat", "-m", toy_folder, "--seed", 1, "-p", "depthvar")
    data = run(*draw, "--json").data
    assert data["tokens"]["run"] == data["tokens"]["full"]
    assert data["token_blocks"]["run"] < data["token_blocks"]["full"]
    text = run(*draw).out
    run_, full = data["token_blocks"].values()
    assert re.search(rf"token-blocks +{run_} of {full} \({run_ / full:.1%}\)", text)
    assert "(0.0%" not in text


def test_warnings_of_all_batches_are_listed_once(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    draw = ("generate", "a cat", "-n", 2, "--batch-size", 1, "-m", toy_folder, "--aspect-ratio", "4:3", "--seed", 1)
    ran = run(*draw, "-p", "skip-scales:count=3", "--json")
    (warning,) = ran.data["warnings"]
    assert warning["code"] == "untrained_size"
    for image in ran.data["images"]:
        assert read_image_config(tmp_path / image["path"])["warnings"] == [warning]


def test_a_huge_number_of_images_is_drawn_as_they_come_or_refused(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = ("generate", "a cat", "--seed", 3, "-m", toy_folder, "-p", "skip-scales:count=3")
    run(*draw, "-n", 10**12, "--rng", "reference").assert_refused(
        "1000000000000 do not fit into memory", "largest batch"
    )
    run(*draw, "-n", 10**12, "-o", "x.png").assert_refused("is one image file, but 1000000000000 are asked for")
    run(*draw, "-n", 10**19).assert_refused("need seeds of 2^63 and more; ask for fewer images")
    run(*draw, "--batch-size", 10**12).assert_refused(
        "a batch of 1000000000000 images", "the largest batch that fits is"
    )
    run(*draw, "--batch-size", 0).assert_refused("--batch-size must be 1 or more, got 0")
    assert list(tmp_path.iterdir()) == []
    calls, stream = [], Pipeline.stream

    def twice(*arguments: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stream(*arguments, **options)

    monkeypatch.setattr(Pipeline, "stream", twice)
    ran = run(*draw, "-n", 10**12, "--batch-size", 2, "-o", "out")
    assert (ran.code, ran.out) == (130, "")
    assert ran.err == "foveate: 4 of 1000000000000 images are in out\nfoveate: interrupted\n"
    assert names(tmp_path) == [f"a-cat-{seed}.png" for seed in (3, 4, 5, 6)]


def test_one_picture_that_does_not_fit_is_refused(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "available_bytes", lambda device: 1000)
    run("generate", "a cat", "-m", toy_folder).assert_refused(
        "not even one image fits", "choose a smaller size or model"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["a.jpeg", "a.JPG", "a.png", "deep/a.Webp"])
def test_one_file_in_every_format(run: Callable[..., Any], toy_folder: Path, tmp_path: Path, output: str) -> None:
    draw = ("generate", "a cat", "--seed", 3, "-m", toy_folder, "-p", "skip-scales:count=3", "-o", output)
    assert run(*draw, "--json").data["images"] == [{"path": output, "seed": 3, "prompt": "a cat"}]
    assert names(tmp_path) == [Path(output).name]
    formats = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}
    with Image.open(tmp_path / output) as image:
        assert image.format == formats[Path(output).suffix[1:].lower()]
    assert read_image_config(tmp_path / output)["seed"] == 3
    again = run("generate", "--from", output, "-m", toy_folder, "--json")
    assert (again.code, again.data["identical"], again.data["differences"]) == (0, True, [])
    # A lossy file is drawn again as one, with the same bytes in its pixels.
    made = Path(again.data["images"][0]["path"])
    assert made.name == f"a-again{Path(output).suffix}"
    assert np.array_equal(pixels_of(tmp_path / made), pixels_of(tmp_path / output))
    assert read_image_config(tmp_path / made) == read_image_config(tmp_path / output)


def test_a_folder_in_every_format(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    draw = ("generate", "a cat", "-n", 2, "--seed", 3, "-m", toy_folder, "-p", "skip-scales:count=3", "--json")
    for flags, encoder in (
        (("--format", "jpg"), ("jpeg", 95, False)),
        (("--format", "webp", "--quality", 40), ("webp", 40, False)),
        (("--format", "webp", "--lossless"), ("webp", None, True)),
        (("--format", "png"), ("png", None, True)),
    ):
        data = run(*draw, *flags, "-o", "-".join(map(str, flags)).strip("-")).data
        for image in data["images"]:
            assert Path(image["path"]).name == f"a-cat-{image['seed']}.{flags[1]}"
            stored = read_image_config(tmp_path / image["path"])["encoder"]
            assert (stored["format"], stored["quality"], stored["lossless"]) == encoder
    for flags, words in (
        (("--quality", 0, "-o", "x.jpg"), "quality must be a whole number from 1 to 100, got 0"),
        (("--quality", 90), "png is lossless"),
        (("--lossless", "-o", "x.jpg"), "a jpeg is never lossless"),
        (("--lossless", "--quality", 9, "-o", "x.webp"), "leave one of the two out"),
        (("--format", "gif"), "--format"),
    ):
        run("generate", "a", *flags, "-m", toy_folder).assert_refused(words)
    run("generate", "a", "--format", "jpg", "-o", "x.png", "-m", toy_folder).assert_refused(
        "disagree; leave --format out"
    )
    assert run("generate", "a", "--format", "jpg", "-o", "x.jpeg", "-m", toy_folder).code == 0


@pytest.mark.parametrize(
    "output", ["a.gif", "a.BMP", "a.tiff", "a.avif", "a.pdf", "a.svg", "out/b.jpgg", "a.json", "a.mp4"]
)
def test_other_files_are_refused(run: Callable[..., Any], toy_folder: Path, tmp_path: Path, output: str) -> None:
    draw = ("generate", "a cat", "--seed", 3, "-m", toy_folder, "-p", "skip-scales:count=3", "-o")
    run(*draw, output).assert_refused(
        f"cannot write {output}: an image ends in .png, .jpg, .jpeg, .webp; for a folder of this name add a slash"
    )
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_folders_with_a_slash(run: Callable[..., Any], toy_folder: Path) -> None:
    """And then, as it is a folder, without."""
    output = "out/b.jpgg"
    draw = ("generate", "a cat", "--seed", 3, "-m", toy_folder, "-p", "skip-scales:count=3", "-o")
    assert run(*draw, f"{output}/").out.splitlines()[-1] == f"{output}/a-cat-3.png"
    assert run(*draw, output).out.splitlines()[-1] == f"{output}/a-cat-3-2.png"


@pytest.mark.parametrize("output", few(FOLDERS, "out.v2", ".hidden", "x.png/", more=1))
def test_folders_may_have_dots(run: Callable[..., Any], toy_folder: Path, output: str) -> None:
    draw = ("generate", "a cat", "--seed", 3, "-m", toy_folder, "-p", "skip-scales:count=3", "-o", output)
    assert run(*draw).out.splitlines()[-1] == f"{Path(output)}/a-cat-3.png"


def test_an_ending_alone_is_no_name(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    run("generate", "a", "-o", "out/.jpg", "-m", toy_folder).assert_refused("no name in front of the ending")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_no_jpeg_can_hold_is_refused_before_it_is_drawn(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.cli.loading.open_pipeline", lambda *arguments, **options: pytest.fail("it was loaded"))
    long, refusal = "cat " * 20_000, ("a jpeg", "write png or webp")
    run("generate", long, "-o", "a.jpg", "-m", toy_folder).assert_refused(*refusal)
    run("generate", "a", "--negative-prompt", long, "-o", "a.jpg", "-m", toy_folder).assert_refused(*refusal)
    short = "cat " * 1_000
    run("generate", short, "-n", 99, "--format", "jpg", "--store-batch", "-m", toy_folder).assert_refused(*refusal)
    with pytest.raises(pytest.fail.Exception):
        run("generate", short, "-n", 99, "--format", "jpg", "-m", toy_folder)


def test_a_stored_batch_is_drawn_as_a_whole(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    draw = (
        "generate",
        "a cat",
        "a dog",
        "--seed",
        "3,5",
        "-m",
        toy_folder,
        "-p",
        "skip-scales:count=3",
        "--store-batch",
    )
    for rng in ("keyed", "reference"):
        flags = ("--rng", rng, *(("--seed", "3") if rng == "reference" else ()))
        asked = [part for part in draw if part not in ("--seed", "3,5")] if rng == "reference" else draw
        images = run(*asked, *flags, "-o", rng, "--json").data["images"]
        stored = read_image_config(tmp_path / images[1]["path"])
        assert stored["batch"]["prompts"] == ["a cat", "a dog"]
        again = run("generate", "--from", images[1]["path"], "-m", toy_folder, "-o", "again.png", "--json")
        assert (again.code, again.data["identical"]) == (0, True)
        assert again.data["images"][0]["prompt"] == "a dog"
        assert read_image_config(tmp_path / "again.png") == stored


def test_from_draws_the_row_of_a_batch_in_the_published_order(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path
) -> None:
    draw = ("generate", "a cat", "a dog", "-n", 2, "--seed", 5, "--rng", "reference", "-m", toy_folder, "--json")
    image = run(*draw).data["images"][2]
    assert read_image_config(tmp_path / image["path"])["batch"] == {"size": 4, "index": 2}
    again = run("generate", "--from", image["path"], "-m", toy_folder, "--json").data
    assert (again["identical"], again["images"][0]["prompt"], again["images"][0]["seed"]) == (True, "a dog", 5)
    assert {"token_blocks", "warnings"} <= set(again)


def test_config_file_and_flags_that_win(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "c.yaml").write_text(
        f"prompts: p.txt\nmodel: {toy_folder}\nseed: 5\nnum_images: 1\nguidance-scale: [1, 2, 2, 2, 2, 2, 2]\n"
        "top-k: 3\njson: true\n"
    )
    data = run("generate", "--config", "c.yaml", "--seed", 9, "-o", "x.png").data
    assert data["images"] == [{"path": "x.png", "seed": 9, "prompt": "a cat"}]
    config = read_image_config(tmp_path / "x.png")
    assert config["guidance_scale"] == [1.0] + [2.0] * 6
    assert config["top_k"] == [3] * 7
    (tmp_path / "c.yaml").write_text("generate: {polici: full}\n")
    run("generate", "a", "--config", "c.yaml").assert_refused("polici", "Did you mean --policy?")
    for text in ("prompts: [a cat, a dog]\n", "prompt: a cat\n", "generate: {prompts: [a cat]}\n"):
        (tmp_path / "c.yaml").write_text(text)
        run("generate", "a", "--config", "c.yaml").assert_refused("prompts stand in the command, or one a line")
    (tmp_path / "c.yaml").write_text("- a\n")
    run("generate", "a", "--config", "c.yaml").assert_refused("must map flags to values")
    (tmp_path / "c.yaml").write_text("a: [\n")
    run("generate", "a", "--config", "c.yaml").assert_refused("is not YAML")


def test_prompts_of_a_file_follow_those_of_the_command(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a red dog\n\n8\n")
    ran = run("generate", "a cat", "--prompts", "p.txt", "--seed", "7,8,9", "-m", toy_folder, "--json")
    assert [(i["prompt"], i["seed"]) for i in ran.data["images"]] == [("a cat", 7), ("a red dog", 8), ("8", 9)]


@pytest.mark.parametrize("prompt", ["8", "7,8", "1.5"])
def test_a_number_is_a_prompt_for_classes_alone(prompt: str) -> None:
    refuse_numbers([prompt], draws_classes=True)
    refuse_numbers(["8 apples", "..."], draws_classes=False)
    with pytest.raises(FoveateError, match="is a number; several values of a flag have commas, as in --seed 7,8"):
        refuse_numbers(["a cat", prompt], draws_classes=False)


def test_a_size_is_a_budget_or_pixels_under_both_names(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path
) -> None:
    for flags in (("--size", "0.06m"), ("--size", "256x256"), ("--pixels", "0.06M", "--aspect-ratio", "1:1")):
        assert run("generate", "a", "-m", toy_folder, *flags, "-o", "x.png").code == 0
        config = read_image_config(tmp_path / "x.png")
        assert (config["width"], config["height"], config["pixels"]) == (256, 256, "0.06M")


def test_draws_in_the_published_order(
    run: Callable[..., Any], toy_folder: Path, toy_pipe: Pipeline, tmp_path: Path
) -> None:
    draw = ("generate", "a cat", "-m", toy_folder, "--rng", "reference", "-o", "x.png")
    assert run(*draw, "--seed", 7).code == 0
    assert read_image_config(tmp_path / "x.png")["rng"] == "reference"
    by_library = toy_pipe("a cat", seed=7, rng="reference", output_type="np").images
    assert np.array_equal(pixels_of(tmp_path / "x.png"), by_library[0])
    run(*draw, "--seed", "7,8").assert_refused("takes one integer seed")


def test_says_that_a_gpu_is_here(run: Callable[..., Any], toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = ("generate", "a cat", "-m", toy_folder)
    assert run(*draw).err == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run(*draw).err == "foveate: a GPU is here; --device cuda uses it\n"
    assert run(*draw, "--quiet").err == run(*draw, "--device", "cpu").err == ""


def test_from_draws_on_another_device_and_says_so(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    run("generate", "a cat", "-m", toy_folder, "-o", "cpu.png")
    config = read_image_config(tmp_path / "cpu.png") | {"device": "cuda"}
    with Image.open(tmp_path / "cpu.png") as picture:
        save_image(picture, tmp_path / "cuda.png", config)
    again = run("generate", "--from", "cuda.png", "-m", toy_folder, "--device", "cpu", "--quiet", "--json")
    assert again.err == "foveate: warning: cuda.png was generated on cuda and now on cpu: pixels may differ\n"
    assert (again.code, again.data["differences"]) == (0, ["device: cuda then, cpu now"])


def test_from_asks_for_the_kernels_again_where_a_gpu_runs_them(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("generate", "a cat", "-m", toy_folder, "-o", "cpu.png")
    config = read_image_config(tmp_path / "cpu.png")
    with Image.open(tmp_path / "cpu.png") as image:
        save_image(image, tmp_path / "triton.png", config | {"device": "cuda", "kernels": "triton"})
        save_image(image, tmp_path / "cuda.png", config | {"device": "cuda", "kernels": "torch"})
    loaded: list[tuple[Any, Any]] = []

    def load(*_: object, **options: object) -> None:
        loaded.append((options["device"], options["kernels"]))
        raise FoveateError("loaded")

    monkeypatch.setattr(Pipeline, "from_pretrained", load)
    for name, flags in (("triton.png", []), ("triton.png", ["--device", "cpu"]), ("cuda.png", [])):
        run("generate", "--from", name, "-m", toy_folder, *flags).assert_refused("loaded")
    run("generate", "a cat", "-m", toy_folder, "--device", "cuda", "--kernels", "triton").assert_refused("loaded")
    assert loaded == [("cuda", "triton"), ("cpu", None), ("cuda", None), ("cuda", "triton")]


def test_from_makes_the_same_pixels_again(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    first = run("generate", "a cat", "a dog", "-m", toy_folder, "-p", "ld-pruning", "--temperature", "0.7", "--json")
    source = first.data["images"][1]["path"]
    again = run("generate", "--from", source, "-m", toy_folder, "--json")
    assert again.code == 0, again.err
    assert again.data["identical"] is True
    assert again.data["differences"] == []
    assert again.data["images"][0]["seed"] == first.data["images"][1]["seed"]
    pixels = pixels_of(tmp_path / source)
    assert np.array_equal(pixels, pixels_of(tmp_path / again.data["images"][0]["path"]))

    other = pixels.copy()
    other[0, 0] ^= 1
    config = read_image_config(tmp_path / source)
    config["versions"]["numpy"] = "0.1"
    save_image(Image.fromarray(other), tmp_path / "other.png", config)
    again = run("generate", "--from", "other.png", "-m", toy_folder)
    assert again.code == 1
    assert "not identical" in again.out
    assert "versions.numpy: 0.1 then" in again.out

    del config["seed"]
    save_image(Image.fromarray(other), tmp_path / "damaged.png", config)
    run("generate", "--from", "damaged.png", "-m", toy_folder).assert_refused("damaged")
    run("generate", "--from", source, "--seed", 3, "--dtype", "bfloat16", "--threads", 2).assert_refused(
        "--from generates a stored image again as it was, so --dtype, --threads, --seed would be ignored; allowed are "
        "--model, --device, --output, --json, --quiet, --config, and with another --model also --autoencoder, "
    )
    run("generate", "--from", source, "--prompts", "p.txt").assert_refused("so --prompts would")
    run("generate", "a", "--from", source, "--revision", "x").assert_refused("so a prompt, --revision would")
    run("generate", "--from", source).assert_refused("local model, toy")
    run("generate", "--from", "none.png").assert_refused("cannot read none.png")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["give at least one prompt"]),
        (["  "], ["must not be empty"]),
        (["a", "-n", "0"], ["num_images_per_prompt must be a whole number, 1 or more, got 0"]),
        (["a", "b", "-o", "x.png"], ["one image file, but 2"]),
        (["a", "--model", "emojy"], ["no model 'emojy'", "did you mean emoji"]),
        (["a", "--policy", "ld-prunning"], ["did you mean ld-pruning"]),
        (["a", "--policy", "skip-scales:cout=1"], ["did you mean count"]),
        (["a", "--policy", "skip-scales:count=-1"], ["count must be 0 or more"]),
        (["a", "--policy", "skip-scales:count=9"], ["count must be less than"]),
        (["a", "--policy", "none.yaml"], ["cannot read policy file none.yaml"]),
        (["a", "--size", "256"], ["--size must be one of 0.06M", "WIDTHxHEIGHT", "'256'"]),
        (["a", "--seed", "7", "8"], ["the prompt '8' is a number", "--seed 7,8", "--prompts"]),
        (["8", "--quiet", "b"], ["the prompt '8' is a number"]),
        (["a", "--prompt", "b"], ["Unknown option: --prompt"]),
        (["--prompts", "none.txt"], ["cannot read prompts from none.txt"]),
        (["a", "--size", "100x100"], ["size must be one of", "256x256"]),
        (["a", "--size", "256x256", "--aspect-ratio", "1:1"], ["leave out --aspect-ratio"]),
        (["a", "--size", "256x256", "--pixels", "1M"], ["--pixels specified multiple times"]),
        (["a", "--aspect-ratio", "7:1"], ["aspect ratio must be one of"]),
        (["a", "--pixels", "9M"], ["0.25M"]),
        (["a", "--temperature", "0"], ["temperature must be above"]),
        (["a", "--temperature", "hot"], ["--temperature must be a number"]),
        (["a", "--guidance-scale", "1,2"], ["one per scale, got 2"]),
        (["a", "--seed", "-1"], ["seed must be"]),
        (["a", "--seed", "1.5"], ["--seed must be a whole number"]),
        (["a", "--top-p", "2"], ["top_p must be in [0, 1]"]),
        (["a", "--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["a", "--device", "abacus"], ["device must be"]),
        (["a", "--device", "meta"], ["device must be"]),
        (["a", "--revision", "main"], ["revision needs a model on the hub"]),
        (["a", "--threads", "0"], ["--threads must be 1 to 4096"]),
        (["a", "--bogus"], ["Unknown option: --bogus", "foveate generate --help"]),
        (["a", "--sed", "1"], ["Did you mean --seed?"]),
        (["a", "--config", "none.yaml"], ["cannot read the configuration none.yaml"]),
    ],
)
def test_refuses_in_one_line_and_leaves_nothing(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    model = [] if "--model" in arguments else ["--model", str(toy_folder)]
    run("generate", *arguments, *model, "--json").assert_refused(*parts)
    assert list(tmp_path.iterdir()) == []


def test_wrong_weights_and_places(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run("generate", "a", "-m", tmp_path / "empty").assert_refused("needs config.json")
    (tmp_path / "file").write_text("in the way")
    run("generate", "a", "-m", toy_folder, "-o", "file/out").assert_refused("cannot write to file/out")
    (tmp_path / "folder.png").mkdir()
    run("generate", "a", "-m", toy_folder, "-o", "folder.png").assert_refused("it is a folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder.png"]


@pytest.mark.parametrize("damage", ["junk", "empty", "half"])
@pytest.mark.parametrize(
    "name",
    ["transformer.safetensors", "autoencoder.safetensors", "text_encoder.safetensors", "tokenizer.json", "config.json"],
)
def test_damaged_files_are_named(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, name: str, damage: str
) -> None:
    broken = shutil.copytree(toy_folder, tmp_path / "broken") / name
    whole = broken.read_bytes()
    broken.write_bytes({"junk": b"no weights", "empty": b"", "half": whole[: len(whole) // 2]}[damage])
    run("generate", "a", "-m", broken.parent).assert_refused(name)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 3 GiB.\nSee the manual"), "not enough memory (CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate 9 bytes"), "not enough memory"),
    ],
)
def test_out_of_memory_is_one_line(
    run: Callable[..., Any], toy_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "stream", fail)
    run("generate", "a cat", "-m", toy_folder).assert_refused(part)
    for text in ("a mistake of ours", "an illegal memory access was encountered", "no channels_last memory format"):
        error = RuntimeError(text)
        with pytest.raises(RuntimeError, match=text):
            run("generate", "a cat", "-m", toy_folder)


def test_what_is_drawn_stays_where_a_file_cannot_be_written(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_but_one(image: Image.Image, path: Path, config: dict[str, Any], **options: Any) -> Path:
        if config["seed"] == 8:
            raise OSError(28, "No space left on device", str(path))
        return save_image(image, path, config, **options)

    draw = ("generate", "a cat", "--seed", 7, "-m", toy_folder, "-p", "skip-scales:count=3", "-o", "out")
    monkeypatch.setattr(image_files, "save_image", save_but_one)
    # Those of its batch are written, and no batch is drawn any more.
    run(*draw, "-n", 5, "--batch-size", 3).assert_refused(
        "out/a-cat-8.png: No space left on device; 2 of 5 images are in out"
    )
    assert names(tmp_path) == ["a-cat-7.png", "a-cat-9.png"]
    shutil.rmtree(tmp_path / "out")
    run(*draw[:2], "--seed", 8, *draw[4:]).assert_refused("out/a-cat-8.png: No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FoveateError("a mistake"), "a mistake; 4 of 6 images are in out"),
        (
            MemoryError(),
            "not enough memory (the allocation failed); try a smaller --batch-size; 4 of 6 images are in out",
        ),
        (
            RuntimeError("CUDA out of memory. Tried\nmore"),
            "(CUDA out of memory. Tried); try a smaller --batch-size; 4 of 6",
        ),
        (OSError(5, "Input/output error", "weights"), "weights: Input/output error; 4 of 6 images are in out"),
    ],
)
def test_what_is_drawn_stays_where_a_later_batch_fails(
    run: Callable[..., Any],
    toy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    words: str,
) -> None:
    stream, calls = Pipeline.stream, []

    def fail_later(*arguments: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        if len(calls) == 3:
            raise error
        return stream(*arguments, **options)

    monkeypatch.setattr(Pipeline, "stream", fail_later)
    draw = (
        "generate",
        "a cat",
        "a dog",
        "-n",
        3,
        "--seed",
        7,
        "-m",
        toy_folder,
        "-p",
        "skip-scales:count=3",
        "-o",
        "out",
    )
    run(*draw, "--batch-size", 2, "--json").assert_refused(words)
    assert calls == [[7, 8], [9, 7], [8, 9]]
    assert names(tmp_path) == ["a-cat-7.png", "a-cat-8.png", "a-cat-9.png", "a-dog-7.png"]
    for path in (tmp_path / "out").iterdir():
        read_image_config(path)


def test_what_stops_at_once_leaves_nothing(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "stream", interrupt)
    ran = run("generate", "a cat", "-m", toy_folder)
    assert (ran.code, ran.out, ran.err) == (130, "", "foveate: interrupted\n")
    assert list(tmp_path.iterdir()) == []
