"""Recipes: every shipped one runs from corpus to a model that draws, on either route, and a call may pause."""

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from foveate.core.errors import FoveateError
from foveate.families.packaged import packaged_models
from foveate.models.infinity import Infinity
from foveate.pipeline.pipeline import Pipeline
from recipes.emoji import stages
from recipes.emoji.loop import PauseError
from recipes.emoji.recipe import Route, load_corpus_config, load_recipe
from recipes.emoji.stages import train
from recipes.emoji.start import Start
from recipes.emoji.tests.toy_corpus import write_corpus
from recipes.emoji.tokenizer import new_autoencoder

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.soak
@pytest.mark.parametrize("name", ["emoji_tiny", "emoji"])
def test_a_dry_run_of_every_shipped_recipe_ends_in_a_model_that_draws(name: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "run" / "corpus", 256)
    lines: list[str] = []
    folder = train(CONFIGS / f"{name}.yaml", tmp_path / "run", log=lines.append, route=Route(device="cpu", is_dry=True))
    assert {path.name for path in (tmp_path / "run" / "dry").iterdir()} >= {"tokenizer.png", "samples.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"corpus", "dry"}, "nothing is taken for a result"
    assert [line for line in lines if line.startswith("stage")] == [
        f"stage {stage}" for stage in ("corpus", "tokenizer", "places", "transformer", "export", "sampling")
    ]
    rounding = [float(line.split()[3]) for line in lines if line.startswith("stored in float16")]
    assert min(rounding) > 0
    chosen = json.loads((tmp_path / "run" / "dry" / "sampling.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["defaults"] | chosen == config["defaults"] | {"weights": chosen["weights"]}
    assert len(chosen["temperature"]) == len(Pipeline.from_pretrained(folder).model.spec.default_schedule)
    drawn = Pipeline.from_pretrained(folder)("a red apple", seed=1)
    assert drawn.images[0].size == (256, 256)
    assert (folder / "NOTICE").read_text(encoding="utf-8")


def test_a_call_pauses_and_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole recipe at toy size, from corpus to a model that generates."""
    monkeypatch.setattr(stages, "matmul_peak", partial(stages.matmul_peak, sizes=(64,)))
    write_corpus(tmp_path / "run" / "corpus", 256)
    file = tmp_path / "toy.yaml"
    data = yaml.safe_load((CONFIGS / "emoji_tiny.yaml").read_text(encoding="utf-8"))
    for name in ("corpus", "notice", "card"):
        data[name] = str(CONFIGS / data[name])
    data["dtype"] = "float32"
    data["autoencoder"] |= {"channel_multipliers": [1, 1, 1]}
    data["tokenizer"]["optimisation"] |= {"minutes": 1e-6, "batch": 2}
    data["places"] = {"steps": 1, "batch": 2, "checks": 2}
    data["transformer"]["shape"] |= {"depth": 2, "width": 64}
    data["transformer"] |= {"window": 8, "compiles": False}
    data["transformer"]["optimisation"] |= {"minutes": 0.02, "batch": 2}
    data["sheet"] = ["apple"]
    data["sampling"] = {"guidance": [2.0], "temperatures": [0.5], "factors": [], "prompts": 2}
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    lines: list[str] = []
    with pytest.raises(FoveateError, match="nothing to export"):
        train(file, tmp_path / "run", "export", log=lines.append, route=Route(device="cpu"))
    train(file, tmp_path / "run", "tokenizer", log=lines.append, route=Route(device="cpu"))
    with pytest.raises(PauseError, match=r"paused at 0\.0 of"):
        train(file, tmp_path / "run", log=lines.append, route=Route(device="cpu"), stop_after=0.0)
    early = train(file, tmp_path / "run", "export", log=lines.append, route=Route(device="cpu"))
    assert lines[-1] == "exported after 0.0 of 0.02 minutes"
    assert (early / "config.json").is_file()
    folder = train(file, tmp_path / "run", log=lines.append, route=Route(device="cpu"))
    written = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    train(file, tmp_path / "run", "sampling", log=lines.append, route=Route(device="cpu"))
    assert (folder / "config.json").read_bytes() == written, "a choice that was not exported is exported now"


@pytest.mark.soak
def test_a_run_away_from_home_brings_back_what_an_export_here_needs(tmp_path: Path) -> None:
    write_corpus(tmp_path / "run" / "corpus", 256)
    bundle, root = tmp_path / "bundle", CONFIGS.parents[2]
    bundle.mkdir()
    with tarfile.open(bundle / "corpus.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "run" / "corpus", "corpus")
    shape = load_recipe(CONFIGS / "emoji.yaml", Route(device="cpu")).tokenizer.shape
    save_file(new_autoencoder(shape).half().state_dict(), bundle / "tokenizer.safetensors")
    command = ["bash", "recipes/emoji/away.sh", bundle, tmp_path / "away", tmp_path / "out", "600"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([*map(str, command), "--device", "cpu", "--dry-run"], cwd=root, check=True, env=environment)
    back = list((tmp_path / "out").iterdir())
    assert len(back) <= 8
    assert max(path.stat().st_size for path in back) < 16 * 2**20
    start, route = Start(model=tmp_path / "out"), Route(device="cpu", minutes_scale=0.0)
    folder = train(CONFIGS / "emoji.yaml", tmp_path / "run", "model", lambda _: None, route, start)
    brought = load_file(tmp_path / "out" / "autoencoder.safetensors")
    kept = load_file(folder / "autoencoder.safetensors")
    assert all(torch.equal(kept[name], brought[name]) for name in brought)


def test_sections_of_a_device_go_over_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu, cuda = (load_recipe(CONFIGS / "emoji.yaml", Route(device=device)) for device in ("cpu", "cuda"))
    plain = yaml.safe_load((CONFIGS / "emoji.yaml").read_text(encoding="utf-8"))
    assert cpu.transformer.optimisation.batch == plain["transformer"]["optimisation"]["batch"]
    assert cuda.transformer.optimisation.batch == plain["cuda"]["transformer"]["optimisation"]["batch"] == 32
    assert cuda.transformer.optimisation.constant_share == cpu.transformer.optimisation.constant_share == 0.5
    minutes = cuda.tokenizer.optimisation.minutes + cuda.transformer.optimisation.minutes
    assert minutes < 9, "a command on a GPU that is lent ends after ten minutes"
    assert len(load_corpus_config(CONFIGS / "emoji_core5_corpus.yaml").styles) == 5


def test_the_default_model_has_the_scales_and_size_that_the_methods_need() -> None:
    base, recipe = (load_recipe(CONFIGS / f"{name}.yaml", Route(device="cpu")) for name in ("emoji_tiny", "emoji"))
    assert (recipe.name, recipe.sheet, recipe.corpus) == ("emoji", base.sheet, base.corpus)
    transformer = recipe.transformer
    assert (len(transformer.schedule), transformer.schedule.num_tokens) == (10, 2521)
    assert transformer.schedule.grids[-1][0] * recipe.tokenizer.shape.stride == 256
    assert recipe.ratios == ("1:1", "4:3", "3:4")
    assert [schedule.grids[-1] for schedule in transformer.schedules] == [(32, 32), (27, 36), (36, 27)]
    assert transformer.path_rate == 0.1
    assert 10e6 < sum(p.numel() for p in Infinity(transformer.shape).parameters()) < 16e6


def test_the_ten_scale_model_can_begin_with_the_small_one() -> None:
    small, large = (load_recipe(CONFIGS / f"{name}.yaml", Route(device="cpu")) for name in ("emoji_tiny", "emoji_ten"))
    start = Start(model=packaged_models()["emoji-tiny"])
    codes = start.older_codes(large.tokenizer)
    assert codes is not None
    assert codes.grid == (16, 16)
    assert start.older_codes(small.tokenizer) is None, "its own tokenizer is trained further"
    assert start.own_tokenizer(large.tokenizer, codes) is None
    weights = start.transformer(large.transformer.shape)
    assert weights is not None
    assert 10e6 < sum(value.numel() for value in weights.values()) < 16e6
    assert large.notice.startswith(large.name)
    with pytest.raises(FoveateError, match="scales must begin with those of"):
        start.older_codes(replace(large.tokenizer, grids=large.tokenizer.grids[1:]))


def test_a_given_tokenizer_stays_as_it_is(tmp_path: Path) -> None:
    write_corpus(tmp_path / "run" / "corpus", 256)
    beside = {"corpus": "emoji_corpus.yaml", "notice": "emoji_NOTICE.txt", "card": "emoji_card.md"}
    own = {"base": str(CONFIGS / "emoji.yaml"), "autoencoder": {"channel_multipliers": [1, 1]}, "dtype": "float32"}
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(own | {name: str(CONFIGS / path) for name, path in beside.items()}))
    route = Route(device="cpu", keeps_tokenizer=True, is_dry=True)
    with pytest.raises(FoveateError, match="name it with --tokenizer"):
        train(file, tmp_path / "run", "tokenizer", lambda _: None, route)
    given = new_autoencoder(load_recipe(file, route).tokenizer.shape).state_dict()
    save_file(given, tmp_path / "given.safetensors")
    start = Start(tokenizer=tmp_path / "given.safetensors")
    made = train(file, tmp_path / "run", "tokenizer", lambda _: None, route, start)
    kept = load_file(made)
    assert all(torch.equal(kept[name], given[name]) for name in given)
    made = train(file, tmp_path / "run", "tokenizer", lambda _: None, replace(route, keeps_tokenizer=False), start)
    moved = load_file(made)
    assert not all(torch.equal(moved[name], given[name]) for name in given)


@pytest.mark.parametrize("text", [b"", b"plain words", b"[1, 2]", b"a: [", b"\xff\xfe\x00", b"weights:\ndtype: x"])
def test_what_is_no_recipe_is_one_line(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(text)
    with pytest.raises(FoveateError, match="cannot read the training file"):
        load_recipe(tmp_path / "bad.yaml", Route(device="cpu"))


def test_a_dtype_that_nothing_is_trained_in_is_refused_at_once(tmp_path: Path) -> None:
    path = CONFIGS / "emoji_tiny.yaml"
    (tmp_path / "toy.yaml").write_text(f"base: {path}\ndtype: bf16\ncorpus: {CONFIGS / 'emoji_corpus.yaml'}\n")
    with pytest.raises(FoveateError, match="no dtype for training 'bf16'; did you mean bfloat16"):
        load_recipe(tmp_path / "toy.yaml", Route(device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(FoveateError, match="needs a GPU"):
        load_recipe(CONFIGS / "emoji.yaml", Route(device="cuda"))
    with pytest.raises(FoveateError, match="must be cpu or cuda"):
        load_recipe(CONFIGS / "emoji.yaml", Route(device="tpu"))
