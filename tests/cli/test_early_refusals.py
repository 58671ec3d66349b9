"""What can be refused without weights is refused before any are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.pipeline import pipeline
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import save_image


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where weights are read."""
    monkeypatch.setattr(pipeline, "load_model", lambda *arguments, **options: pytest.fail("weights were read"))


SHARED = [
    (["--size", "100x100"], "size must be one of"),
    (["--size", "256"], "--size must be one of"),
    (["--size", "256x256", "--aspect-ratio", "1:1"], "leave out --aspect-ratio"),
    (["--aspect-ratio", "7:1"], "aspect ratio must be one of"),
    (["--policy", "ld-prunning"], "did you mean ld-pruning"),
    (["--policy", "skip-scales:count=9"], "count must be less than"),
    (["--policy", "none.yaml"], "cannot read policy file none.yaml"),
    (["--prompts", "none.txt"], "cannot read prompts from none.txt"),
    (["--model", "emojy"], "did you mean emoji"),
    (["--threads", "0"], "--threads must be 1 to 4096"),
    (["--device", "abacus"], "device must be"),
    (["--cuda-graphs"], "--cuda-graphs needs a GPU; add --device cuda, or leave --cuda-graphs out"),
    (["--offload", "--device", "cpu"], "--offload needs a GPU; add --device cuda, or leave --offload out"),
    (["--kernels", "triton"], "--kernels triton needs a GPU; add --device cuda, or leave --kernels triton out"),
    (["--cuda-graphs", "--offload", "--device", "cuda"], "leave --offload or --cuda-graphs out"),
]
SAMPLING = [
    (["--temperature", "0"], "temperature must be above"),
    (["--guidance-scale", "1,2"], "one per scale, got 2"),
    (["--top-p", "2"], "top_p must be in [0, 1]"),
    (["--top-k", "-1"], "top_k must be a whole number, 0 or more, got -1\n"),
    (["--more-smooth"], "more_smooth is for VAR, Switti and HART"),
    (["--negative-prompt", " "], "negative_prompt must not be empty"),
]
GENERATE = [
    (["--seed", "-1"], "seed must be"),
    (["--seed", "1,2"], "seed needs one integer or one per prompt"),
    (["--rng", "reference", "--batch-invariant"], 'batch_invariant needs rng="keyed"'),
    (["-n", str(10**19)], "need seeds of 2^63 and more"),
    (["-n", "2", "-o", "a.png"], "is one image file, but 2 are asked for"),
    (["-o", "a.gif"], "cannot write a.gif"),
    (["-o", "in-the-way/out"], "cannot write to in-the-way/out"),
    (["--quality", "90"], "png is lossless"),
    (["8"], "is a number"),
    ([" "], "prompt must not be empty"),
]
COMPARE = [
    (["--against", "ful"], "did you mean full"),
    (["--fail-if", "beauty < 1"], "no figure 'beauty'"),
    (["--seed", "-1"], "seed must be"),
    (["--html", "in-the-way/a.html"], "cannot write to in-the-way"),
]
SWEEP = [
    (["--over", "count=1..9"], "count must be less than the 7 scales"),
    (["--over", "keep=1..2"], "no field 'keep' in skip-scales"),
    (["--over", "count"], "--over is written FIELD="),
    (["--over", "count=1..2", "--plot", "a.jpeg"], "a plot ends with .png, .svg, .pdf"),
    (["--over", "count=1..2", "--plot", "in-the-way/a.png"], "cannot write to in-the-way"),
    (["--over", "count=1..2", "--store", "in-the-way"], "--store must be a folder"),
    (["--over", "count=1..2", "--fail-if", "depthvar n < 1"], "depthvar is not compared"),
]
TUNE = [
    (["--over", "count=0..x", "--subject-to", "n > 0"], "count must be an int"),
    (["--over", "count=0..3", "--subject-to", "beauty > 0"], "no figure 'beauty'"),
    (["--over", "count=0..3", "--subject-to", "n == 0"], "is an inequality"),
    (["--over", "count=0..3", "--subject-to", "n > 0", "--minimize", "speed"], "no figure 'speed'"),
    (["--over", "count=0..3", "--subject-to", "n > 0", "--held-out", "none.txt"], "cannot read prompts from none.txt"),
    (["--over", "count=0..3", "--subject-to", "n > 0", "--trials", "0"], "trials must be 1 or more"),
    (["--over", "count=0..3", "--subject-to", "n > 0", "-o", "a.json"], "--output must end with .yaml"),
    (["--over", "count=0..3", "--subject-to", "n > 0", "-o", "in-the-way/a.yaml"], "cannot write to in-the-way"),
]
BENCH = [
    (["--output", "in-the-way"], "--output must be a folder"),
    (["--output", "in-the-way/out"], "cannot write to in-the-way/out"),
]


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        *(("generate a", *case) for case in SHARED + SAMPLING + GENERATE),
        *(("compare -p full", *case) for case in SAMPLING + COMPARE),
        *(("compare", *case) if "--policy" in case[0] else ("compare -p full", *case) for case in SHARED),
        *(("sweep -p skip-scales", *case) for case in SWEEP),
        *(
            ("tune -p skip-scales", case[0] if "-o" in case[0] else [*case[0], "-o", "a.yaml"], case[1])
            for case in TUNE
        ),
        *(("bench latency", *case) for case in SHARED + BENCH),
    ],
)
def test_nothing_is_loaded_for_what_is_refused(
    run: Callable[..., Any], tmp_path: Path, command: str, flags: list[str], message: str
) -> None:
    (tmp_path / "in-the-way").write_text("a file")
    model = [] if "--model" in flags else ["--model", "emoji-tiny"]
    run(*command.split(), *flags, *model).assert_refused(message)
    assert [path.name for path in tmp_path.iterdir()] == ["in-the-way"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rng", "reference", "--batch-invariant"], "batch_invariant needs"),
        (["-n", "0"], "num_images_per_prompt must be"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_looked_for(
    run: Callable[..., Any], flags: list[str], message: str
) -> None:
    run("generate", "a", "--model", "emojy", *flags).assert_refused(message)


def test_an_image_that_cannot_be_read_is_named_once(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a file")
    for name, why in (("none.png", "No such file or directory"), ("a.txt", "it is in no known format")):
        ran = run("generate", "--from", name)
        ran.assert_refused(f"cannot read {name} as an image: {why}\n")


def test_a_damaged_picture_is_refused_before_its_model_is_loaded(
    run: Callable[..., Any], toy_pipe: Pipeline, tmp_path: Path
) -> None:
    output = toy_pipe("a cat", seed=1)
    for name, value, message in (
        ("seed", "7", "is damaged"),
        ("top_k", [-1] * 7, "top_k must be a whole number"),
        ("width", 100, "size must be one of"),
        ("policy", {"parts": [{"policy": "gone"}]}, "no policy 'gone' in this installation"),
        ("threads", 0, "threads must be 1 to"),
    ):
        config = {**output.row_config(0), "model": "emoji-tiny", name: value}
        save_image(Image.new("RGB", (256, 256)), tmp_path / "a.png", config)
        run("generate", "--from", "a.png").assert_refused(message)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
