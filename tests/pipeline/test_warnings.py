"""What a call did otherwise than its words suggest: a stable code in the report and one line on the logger."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.core.errors import BrokenNumbersError, FoveateError
from foveate.core.warnings import WARNING_CODES, CallWarning, log_warnings
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy

pytestmark = pytest.mark.usefixtures("on_a_machine_with_c_code")


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"aspect_ratio": "3:2"}, "untrained_size", "toy was trained on 1:1 at 0.06M; 3:2 at 0.06M is outside"),
        ({"guidance_scale": 0}, "guidance_ignores_prompt", "the image follows no prompt at all"),
        ({"cfg": 0.0, "negative_prompt": "a dog"}, "guidance_ignores_prompt", "the image follows the negative prompt"),
        ({"guidance_scale": 1, "negative_prompt": "a dog"}, "negative_prompt_ignored", "guidance_scale 1; raise it"),
        (
            {"guidance_scale": 1, "policy": "drop-branch"},
            "policy_without_effect",
            "policy drop-branch did not stop",
        ),
    ],
)
def test_what_is_not_as_asked_is_said_once(toy_pipe: Pipeline, caplog, options, code: str, says: str):
    with caplog.at_level(logging.WARNING, logger="foveate"):
        report = toy_pipe("a red cat", seed=1, output_type="latent", **options).report
    (warning,) = report.warnings
    assert warning.code == code
    assert says in warning.message
    assert warning.to_json() == {"code": code, "message": warning.message}
    assert [record.getMessage() for record in caplog.records] == [warning.message]


def test_a_cut_prompt_is_named_with_what_it_lost(toy_pipe: Pipeline, caplog):
    long = "a red cat on the left of " * 20
    with caplog.at_level(logging.WARNING, logger="foveate"):
        report = toy_pipe(["a red cat", long, long], seed=1, output_type="latent").report
    (warning,) = report.warnings
    assert warning.code == "prompt_cut"
    lost = toy_pipe.model.text.num_cut(long)
    assert lost > 10
    assert warning.message == f"the prompt {long[:40] + '...'!r} is too long: its last {lost} tokens were cut"
    assert len(caplog.records) == 1


def test_an_ordinary_call_has_none(toy_pipe: Pipeline, caplog):
    with caplog.at_level(logging.WARNING, logger="foveate"):
        report = toy_pipe("a red cat", seed=1, negative_prompt="a dog", policy="ld-pruning:sats=false").report
    assert report.warnings == ()
    assert not caplog.records


def test_what_belongs_to_the_model_is_logged_once_and_reported_by_every_call(toy_pipe: Pipeline, caplog):
    unpinned = CallWarning(code="weights_unpinned", message="a toy without a commit")
    with caplog.at_level(logging.WARNING, logger="foveate"):
        pipe = Pipeline(replace(toy_pipe.model, warnings=(unpinned,)))
        found = [pipe("a red cat", seed=1, output_type="latent").report.warnings for _ in range(2)]
    assert found == [(unpinned,)] * 2
    assert [record.getMessage() for record in caplog.records] == [unpinned.message]


def test_plain_kernels_are_said_on_a_cpu(toy_pipe: Pipeline, monkeypatch, caplog):
    plain = CallWarning(code="kernels_plain", message="no compiler")
    monkeypatch.setattr("foveate.kernels.native.warnings", lambda: (plain,))
    with caplog.at_level(logging.WARNING, logger="foveate"):
        pipe = Pipeline(toy_pipe.model)
        assert pipe("a red cat", seed=1, output_type="latent").report.warnings == (plain,)
    assert [record.getMessage() for record in caplog.records] == [plain.message]


def test_codes_are_those_of_the_contract(caplog):
    assert len(set(WARNING_CODES)) == 12
    with caplog.at_level(logging.WARNING, logger="foveate"):
        log_warnings(CallWarning(code=code, message=f"100 % {code}") for code in WARNING_CODES)
    assert [record.getMessage() for record in caplog.records] == [f"100 % {code}" for code in WARNING_CODES]


def test_a_setting_that_was_chosen_on_another_model_is_said(toy_pipe: Pipeline, tmp_path: Path):
    def codes(policy: str, **options: float) -> list[str]:
        out = toy_pipe("a red cat", seed=1, output_type="latent", policy=policy, **options)
        assert out.row_config(0).get("warnings", []) == [warning.to_json() for warning in out.report.warnings]
        return [warning.code for warning in out.report.warnings if warning.code != "policy_without_effect"]

    path = tmp_path / "tuned.yaml"
    said = {"model": "toy", "sha256": toy_pipe.model.sha256, "bound": "psnr.mean >= 30", "command": "foveate tune"}
    load_policy("random-tokens").to_yaml(path, said)
    assert codes(str(path)) == []
    load_policy("random-tokens").to_yaml(path, {**said, "sha256": "0123456789abcdef"})
    assert codes(str(path)) == ["policy_measured_elsewhere"]
    assert codes(str(path), budget=0.6) == []
    assert codes("preset-draft") == ["policy_measured_elsewhere"]
    assert codes("preset-draft:softness=0.5") == codes("ld-pruning:skip_last=1") == []
    warnings = toy_pipe("a red cat", seed=1, output_type="latent", policy=str(path)).report.warnings
    assert [warning.message for warning in warnings if warning.code == "policy_measured_elsewhere"] == [
        "tuned.yaml was chosen on toy (0123456789ab), where it keeps psnr.mean >= 30; nothing is known of it on these "
        "weights of toy: measure it with foveate compare --policy tuned.yaml --model toy"
    ]


# Broken numbers


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tau": 1e-39}, "temperature must be above 2.94e-39, got 1e-39; top_k=1 always takes the likeliest"),
        ({"cfg": 1e300}, "guidance_scale must be finite numbers in float32, at most 3.4e+38, got 1e\\+300"),
        ({"cfg": 10**400}, "guidance_scale must be finite numbers in float32"),
        ({"tau": float("nan")}, "temperature must be finite numbers"),
        (
            {"num_images_per_prompt": 10**12},
            "num_images_per_prompt must be 4096 or less in one call, got 1000000000000",
        ),
        ({"cfg": -3.5e38}, "guidance_scale must be finite numbers in float32"),
        ({"cfg": 3e38}, "scale 0: guidance and temperature took logits out of the range of float32"),
        ({"tau": 1e-38}, "scale 0: guidance and temperature took logits out of the range of float32"),
    ],
)
def test_options_that_overflow_float32_are_refused(toy_pipe: Pipeline, options, says: str):
    with pytest.raises(FoveateError, match=says.replace("e+38", r"e\+38")):
        toy_pipe("a red cat", seed=1, **options)


def test_a_broken_decoder_is_an_error_and_no_black_image(toy_pipe: Pipeline):
    autoencoder = toy_pipe.model.tokenizer.autoencoder
    name, weight = next((n, p) for n, p in autoencoder.named_parameters() if n.startswith("decoder") and p.ndim == 4)
    before = weight.data[0, 0, 0, 0].item()
    weight.data[0, 0, 0, 0] = float("nan")
    try:
        with pytest.raises(BrokenNumbersError, match="images 0, 1: the decoder gave pixels that are not finite"):
            toy_pipe(["a red cat", "a dog"], seed=1)
    finally:
        weight.data[0, 0, 0, 0] = before
    assert toy_pipe(["a red cat"], seed=1).images, name


# What is handed out


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_tensors_are_ordinary_ones(toy_pipe: Pipeline, output_type: str):
    """Neither inference tensors, which autograd and in-place operations refuse, nor views of the engine's state."""
    images = toy_pipe("a red cat", seed=1, output_type=output_type).images
    assert isinstance(images, torch.Tensor)
    assert not images.is_inference()
    images.requires_grad_(requires_grad=True)
    images.sum().backward()
    assert images.grad is not None
    for event in toy_pipe.stream("a red cat", seed=1, output_type=output_type, previews=2):
        assert event.images is None or not event.images.is_inference()


def test_a_saving_by_depth_shows_in_token_blocks(toy_pipe: Pipeline):
    report = toy_pipe("a red cat", seed=1, policy="depthvar", output_type="latent").report
    assert report.tokens_run == report.tokens_full
    assert 0 < report.token_blocks_run < report.token_blocks_full
    full = toy_pipe("a red cat", seed=1, output_type="latent").report
    assert full.token_blocks_run == full.token_blocks_full == 2 * 3 * full.tokens_full


@pytest.mark.parametrize("prompt", ["a\0cat", "a cat \ud83d", "\udfff"])
def test_a_prompt_that_is_no_text_is_refused(toy_pipe: Pipeline, prompt: str):
    with pytest.raises(FoveateError, match="prompt holds characters that are not text"):
        toy_pipe(prompt)
    with pytest.raises(FoveateError, match="negative_prompt holds characters that are not text"):
        toy_pipe("a cat", negative_prompt=prompt)
