"""`policies`, `models` and `env`: what they print, and what they refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveate.families.loading import model_names
from foveate.policies.registry import PRESETS, REGISTRY, load_policy


def test_policies(run: Callable[..., Any]) -> None:
    data = run("policies", "--json").data
    assert {policy["name"] for policy in data["policies"]} >= set(REGISTRY)
    assert {preset["name"] for preset in data["presets"]} == set(PRESETS)
    for policy in data["policies"]:
        given = ",".join(f"{f['name']}={str(f['default']).lower()}" for f in policy["fields"])
        assert load_policy(policy["name"] + (":" + given if given else "")) == load_policy(policy["name"])
        assert policy["summary"]
    ran = run("policies")
    assert ran.code == 0
    assert "energy_share" in ran.out


def test_one_policy(run: Callable[..., Any]) -> None:
    data = run("policies", "LD_Pruning", "--json").data
    assert [policy["name"] for policy in data["policies"]] == ["ld-pruning"]
    assert "energy_share" in run("policies", "ld-pruning").out
    preset = run("policies", "preset-draft", "--json").data["presets"][0]
    assert {f["name"]: f["default"] for f in preset["fields"]}["shares"] == [0.5, 0.25]
    assert set(preset["provenance"]) >= {"bound", "model", "sha256", "command"}
    shown = run("policies", "preset-draft").out
    assert "no bound was measured" in run("policies", "ld-pruning-draft").out
    assert preset["provenance"]["bound"] == ["psnr.mean >= 30"]
    assert "psnr.mean >= 30" in shown
    assert f"{preset['provenance']['model']}, weights {preset['provenance']['sha256'][:12]}" in shown
    run("policies", "ld-prunin").assert_refused("did you mean ld-pruning")


def test_models(run: Callable[..., Any]) -> None:
    data = run("models", "--json").data
    assert [model["name"] for model in data["models"]] == model_names()
    by_name = {model["name"]: model for model in data["models"]}
    assert by_name["emoji"]["alias_of"] == "emoji-tiny"
    assert by_name["infinity-2b"]["parameters"]["transformer"] > 1_800_000_000
    assert by_name["infinity-2b"]["default_size"] == [1024, 1024]
    assert "infinity-125m" in run("models").out


def test_env(run: Callable[..., Any], toy_folder: Path) -> None:
    data = run("env", "--json").data
    assert data["versions"]["torch"]
    assert data["cpu"]["threads"] >= 1
    assert isinstance(data["cpu"]["has_bf16_instructions"], bool)
    assert "versions.torch" in run("env").out
    needs = run("env", "--json", "--model", toy_folder).data["model"]
    full, half = needs["bytes"]["float32"], needs["bytes"]["bfloat16"]
    assert full["kv"] == 2 * half["kv"] > 0
    assert [full[name] for name in needs["parameters"]] == [4 * count for count in needs["parameters"].values()]
    assert full["peak"] > full["transformer"] + full["kv"] + full["blocks"]
    assert "model.bytes.bfloat16.peak" in run("env", "--model", "infinity-8b").out
    run("env", "--model", "infinity-2").assert_refused("did you mean infinity-2b")


def test_env_says_what_a_run_needs_before_anything_is_loaded(run: Callable[..., Any]) -> None:
    plain = run("env", "--json", "-m", "infinity-2b", "--dtype", "bfloat16").data["model"]
    assert list(plain["bytes"]) == ["bfloat16"]
    assert (plain["size"], plain["batch"], plain["policy"], plain["offload"]) == ([1024, 1024], 1, "full", False)
    changed = run(
        "env", "--json", "-m", "infinity-2b", "--dtype", "bfloat16", "--pixels", "0.25M", "--batch", 2,
        "--policy", "skip-scales:count=2", "--offload", "--release-text-encoder",
    ).data["model"]  # fmt: skip
    assert (changed["size"], changed["batch"], changed["offload"]) == ([512, 512], 2, True)
    assert changed["policy"].startswith("skip-scales")
    before, after = plain["bytes"]["bfloat16"], changed["bytes"]["bfloat16"]
    assert after["decoder"] < before["decoder"] / 3
    assert after["kv"] < before["kv"]
    assert after["phases"]["encoding"] == after["text_encoder"]
    assert before["phases"]["encoding"] == sum(before[part] for part in ("transformer", "autoencoder", "text_encoder"))
    assert after["peak"] == max(after["phases"].values())
    assert "model.bytes.bfloat16.phases.transformer" in run("env", "-m", "infinity-2b", "--dtype", "bfloat16").out
    run("env", "--offload").assert_refused("--model is missing")
    run("env", "-m", "infinity-2b", "--batch", 0).assert_refused("--batch must be 1 or more, got 0")
    run("env", "-m", "infinity-2b", "--size", "100x100").assert_refused("size must be one of")


def test_bound_of_env_is_what_the_engine_allocates(run: Callable[..., Any], toy_folder: Path, toy_pipe: Any) -> None:
    needs = run("env", "--json", "--model", toy_folder).data["model"]
    assert needs["bytes"]["float32"]["kv"] == toy_pipe("a cat", seed=1).report.kv_bytes_bound
