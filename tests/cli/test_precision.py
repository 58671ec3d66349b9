"""`--quantization` and `--decoder-dtype`: drawn, recorded, drawn again, measured, and counted by `env`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foveate.families.memory import transformer_bytes
from foveate.pipeline.provenance import read_image_config
from tests.conftest import TOY_SPEC


def test_flags(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    model = ("-m", toy_folder, "--seed", 1)
    flags = ("--quantization", "int8", "--decoder-dtype", "bfloat16")
    assert run("generate", "a cat", *model, *flags, "-o", "a.png").code == 0
    config = read_image_config(tmp_path / "a.png")
    assert (config["quantization"], config["decoder_dtype"]) == ("int8", "bfloat16")
    again = run("generate", "--from", "a.png", "-m", toy_folder, "--json").data
    assert again["identical"]
    assert again["differences"] == []
    run("generate", "--from", "a.png", "-m", toy_folder, "--quantization", "fp8").assert_refused("--quantization")
    report = run("bench", "memory", "-m", toy_folder, "--quantization", "int8", "--runs", 1, "--json").data
    assert report["model"]["quantization"] == "int8"
    assert report["weights_bytes"]["transformer"] < 0.6 * transformer_bytes(TOY_SPEC, torch.float32)
    needs = [run("env", "-m", "infinity-2b", *flag, "--json").data["model"] for flag in ((), flags[:2])]
    assert needs[1]["bytes"]["bfloat16"]["transformer"] < 0.6 * needs[0]["bytes"]["bfloat16"]["transformer"]
    assert [need["quantization"] for need in needs] == [None, "int8"]
