"""A share of the compute as an option of a call: met, stored as the fitted policy, and the same in any company."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.conditioning.qwen2 import RandomPlacedText
from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import ScaleSchedule
from foveate.engine.forecast import forecast, full_cost
from foveate.families.published import published_model
from foveate.models.hart import HART
from foveate.pipeline.budget import fitted, request_of, with_budget
from foveate.pipeline.call import resolve
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import read_image_config, regenerate, save_image
from foveate.policies.registry import load_policy


def test_a_budget_is_spent_and_the_fitted_policy_is_stored(toy_pipe: Pipeline, tmp_path: Path):
    out = toy_pipe("a red cat", seed=3, policy="random-tokens:num_scales=4", budget=0.5)
    assert out.report.flops_ratio == pytest.approx(0.5, rel=0.02)
    assert out.report.notes == ()
    (part,) = out.config["policy"]["parts"]
    assert (part["policy"], part["num_scales"], out.config["asked"]) == ("random-tokens", 4, {"budget": 0.5})
    path = save_image(out.images[0], tmp_path / "a.png", out.row_config(0))
    again = regenerate(path, toy_pipe)
    assert (again.is_identical, again.differences) == (True, ())
    assert read_image_config(path)["asked"] == {"budget": 0.5}
    assert "asked" not in again.config


@pytest.mark.parametrize("negative", [(), ("a dog",)])
def test_a_text_of_padded_tokens_is_counted_as_it_is(negative: tuple[str, ...]):
    """HART at 1024 pixels reads 300 tokens of every prompt, and two for none; a negative prompt has 300, too."""
    spec = published_model("hart-0.7b").spec
    with torch.device("meta"):
        shape = HART(spec.transformer).shape
    job = resolve("a red cat", {"policy": "random-tokens", "budget": 0.3, "negative_prompt": negative or None}, spec)
    found = with_budget(job, shape)
    conditioner = RandomPlacedText(width=8, max_tokens=300, device=torch.device("cpu"))
    conditions = conditioner.encode(["a red cat", *(negative or [""])])
    request = replace(request_of(job.schedule, job.guidance, shape), conditions=tuple(conditions))
    own = forecast(found.policy.bind(job.schedule, shape), request, shape).flops
    assert own / full_cost(request, shape).flops == pytest.approx(0.3, rel=0.002)


def test_without_a_policy_the_default_family_is_fitted(toy_pipe: Pipeline):
    out = toy_pipe("a red cat", seed=3, budget=np.float32(0.6), output_type="latent")
    assert out.config["policy"]["parts"][0]["policy"] == "fovea"
    assert out.report.flops_ratio == pytest.approx(0.6, rel=0.02)


def test_an_image_does_not_depend_on_its_company(toy_pipe: Pipeline):
    long = "a red cat on the left of the house " * 3
    options = {"policy": "random-tokens", "budget": 0.6, "output_type": "latent"}
    together = toy_pipe(["a red cat", long], seed=[3, 4], **options)
    alone = [toy_pipe(text, seed=seed, **options) for text, seed in (("a red cat", 3), (long, 4))]
    assert torch.equal(together.images, torch.cat([one.images for one in alone]))
    assert {out.config["policy"]["fingerprint"] for out in (together, *alone)} == {
        together.config["policy"]["fingerprint"]
    }


def test_the_report_says_where_a_budget_is_an_upper_bound(toy_pipe: Pipeline):
    policy = "random-tokens:num_scales=2|ld-pruning:sats=false"
    report = toy_pipe("a red cat", seed=3, policy=policy, budget=0.7, output_type="latent").report
    assert report.flops_ratio < 0.7
    assert "ld-pruning:sats=false: the budget is an upper bound" in report.notes[-1]


def test_fit_budget_gives_the_policy_that_a_call_runs(toy_pipe: Pipeline):
    policy = fv.fit_budget(toy_pipe, policy="drop-branch:count=1|random-tokens", budget=0.5)
    assert policy.parts_of()[0] == load_policy("drop-branch:count=1")
    options = {"policy": "random-tokens", "budget": 0.5, "guidance_scale": 1.0}
    out = toy_pipe("a red cat", seed=3, output_type="latent", **options)
    assert out.config["policy"]["spec"] == fv.fit_budget(toy_pipe, **options).spec
    with pytest.raises(FoveateError, match="^fit_budget needs budget, the share"):
        fv.fit_budget(toy_pipe, policy="random-tokens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"^budget must be in \(0, 1\], got 0$"),
        ({"budget": 1.5}, r"^budget must be in \(0, 1\], got 1.5$"),
        ({"budget": "half"}, r"^budget must be in \(0, 1\], got 'half'$"),
        ({"latency_budget_ms": 0}, "^latency_budget_ms must be a number above 0, got 0$"),
        ({"budget": 0.5, "latency_budget_ms": 100}, "^give a budget or a latency_budget_ms, not both$"),
        ({"budget": 0.5, "policy": "ld-pruning"}, "^no budget can be set for ld-pruning: "),
        ({"budget": 0.05, "policy": "random-tokens"}, "keep_ratio reaches .* of the FLOPs on this schedule, not 5 %"),
    ],
)
def test_budgets_that_cannot_be_are_refused(toy_pipe: Pipeline, options, message: str):
    with pytest.raises(FoveateError, match=message):
        toy_pipe("a red cat", seed=1, **options)


@pytest.mark.parametrize("tokens", [5, 100, 200])
def test_prompts_of_other_lengths_are_within_two_percent_of_a_large_model(tokens: int):
    """Infinity-2B at 2,521 tokens; costs are counted for prompts of 32 tokens."""
    width, blocks = 2048, 32
    shape = ModelShape(
        num_blocks=blocks, width=width, ff_width=4 * width, num_heads=16, head_width=128, head_outputs=64,
        input_channels=32, has_cross_attention=True, text_token_flops=2 * 2 * width**2 * blocks,
    )  # fmt: skip
    schedule, guidance = ScaleSchedule.from_template(1.0, "0.25M"), GuidanceSchedule(weights=(3.0,) * 10)
    policy = fitted(load_policy("depthvar"), 0.4, schedule, guidance, shape)
    request = replace(request_of(schedule, guidance, shape), conditions=(torch.empty(tokens, 0),))
    share = forecast(policy.bind(schedule, shape), request, shape).flops / full_cost(request, shape).flops
    assert share == pytest.approx(0.4, rel=0.02)
