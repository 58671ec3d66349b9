"""The pipeline on the toy: alone and in a batch, cancelled, streamed, seeded, reported, and every refusal."""

import gc
import json
import logging
import subprocess
import sys
import weakref
from dataclasses import replace
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from foveate.core.errors import Cancelled, FoveateError
from foveate.engine.forecast import forecast
from foveate.engine.kv_cache import KVCache
from foveate.engine.state import Request, RequestState
from foveate.families.published import PUBLISHED
from foveate.pipeline import output as pipeline_output
from foveate.pipeline.call import Job, resolve
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.policies.registry import load_policy

PROMPTS = ["a red cat", "two big dogs on the left of the house"]


def _requests(pipe: Pipeline, job: Job) -> tuple[Request, ...]:
    return pipe.runner.requests(job, pipe.runner.encode(job))


def draw(pipe: Pipeline, prompts: Any, **options: Any) -> np.ndarray:
    return stack_uint8(pipe(prompts, output_type="np", **options).images)


def test_alone_equals_batch_bit_for_bit(toy_pipe: Pipeline) -> None:
    batch = draw(toy_pipe, PROMPTS, seed=[3, 9], num_images_per_prompt=2, batch_invariant=True, policy="ld-pruning")
    alone = draw(toy_pipe, PROMPTS[1], seed=10, batch_invariant=True, policy="ld-pruning")
    assert batch.shape == (4, 256, 256, 3)
    assert np.array_equal(batch[3], alone[0])
    assert not np.array_equal(batch[2], batch[3])


def test_merged_trace_counts_what_a_batch_counts(toy_pipe: Pipeline) -> None:
    options: dict[str, Any] = {"seed": 1, "output_type": "latent", "trace": True, "policy": "drop-branch:count=2"}
    batch = toy_pipe(PROMPTS, **options)
    apart = toy_pipe(PROMPTS, batch_invariant=True, **options)
    assert batch.report.flops_run == apart.report.flops_run
    assert batch.report.tokens_run == apart.report.tokens_run == 2 * 521
    assert batch.report.kv_bytes_peak == apart.report.kv_bytes_peak == apart.report.kv_bytes_bound
    depths = [scale.depth_Bl.shape for scale in apart.trace.scales if scale.depth_Bl is not None]
    assert depths == [scale.depth_Bl.shape for scale in batch.trace.scales if scale.depth_Bl is not None] != []


@pytest.mark.parametrize("policy", ["full", "skip-scales:count=2", "drop-branch:count=3", "uniform-depth"])
def test_forecast_equals_count(toy_pipe: Pipeline, policy: str) -> None:
    output = toy_pipe([PROMPTS[0]], seed=1, output_type="latent", policy=policy)
    job = resolve([PROMPTS[0]], {"seed": 1, "policy": policy}, toy_pipe.model.spec)
    request = _requests(toy_pipe, job)[0]
    shape = toy_pipe.model.transformer.shape
    bound = load_policy(policy).bind(job.schedule, shape)
    assert bound.is_static
    assert forecast(bound, request, shape) == output.trace.cost
    assert (policy == "full") == (output.report.flops_ratio == 1.0)


def test_forecast_is_an_upper_bound(toy_pipe: Pipeline) -> None:
    output = toy_pipe(PROMPTS, seed=1, output_type="latent", policy="ld-pruning")
    job = resolve(PROMPTS, {"seed": 1, "policy": "ld-pruning"}, toy_pipe.model.spec)
    shape = toy_pipe.model.transformer.shape
    cost = forecast(job.policy.bind(job.schedule, shape), _requests(toy_pipe, job)[0], shape)
    assert cost.flops >= output.report.flops_run
    assert cost.tokens >= output.report.tokens_run


def test_cancel_leaves_nothing(toy_pipe: Pipeline) -> None:
    before = draw(toy_pipe, PROMPTS[0], seed=5)
    seen = []

    def stop(pipe: Pipeline, scale: int, left: int, tensors: dict[str, Any]) -> None:
        seen.append((scale, left, tuple(tensors["latents"].shape)))
        if scale == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        toy_pipe(PROMPTS[0], seed=5, callback_on_step_end=stop)
    assert seen == [(0, 6, (1, 8, 16, 16)), (1, 5, (1, 8, 16, 16)), (2, 4, (1, 8, 16, 16))]
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) in (KVCache, RequestState)]
    assert np.array_equal(before, draw(toy_pipe, PROMPTS[0], seed=5))


def test_closed_stream_leaves_nothing(toy_pipe: Pipeline) -> None:
    events = toy_pipe.stream(PROMPTS[0], seed=5)
    assert next(events).scale == 0
    events.close()  # type: ignore[attr-defined]
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is KVCache]


def test_stream_equals_call(toy_pipe: Pipeline) -> None:
    events = list(toy_pipe.stream(PROMPTS, previews=3, seed=2, policy="ld-pruning"))
    called = toy_pipe(PROMPTS, seed=2, policy="ld-pruning")
    assert [event.images is not None for event in events] == [False] * 4 + [True] * 3
    output = events[-1].output
    assert output is not None
    assert all(event.output is None for event in events[:-1])
    assert np.array_equal(stack_uint8(output.images), stack_uint8(called.images))
    assert np.array_equal(stack_uint8(events[-1].images), stack_uint8(called.images))  # type: ignore[arg-type]
    assert sum(event.tokens_run for event in events) == called.report.tokens_run
    assert sum(event.tokens_full for event in events) == called.report.tokens_full == 2 * 521
    assert output.config == called.config


def test_seeds_come_back_and_reproduce(toy_pipe: Pipeline) -> None:
    drawn = toy_pipe(PROMPTS, num_images_per_prompt=2, output_type="latent")
    start = drawn.seeds[0]
    assert drawn.seeds == (start, start + 1, start, start + 1)
    assert drawn.prompts == (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])
    again = toy_pipe(PROMPTS, num_images_per_prompt=2, output_type="latent", seed=start)
    assert torch.equal(drawn.images, again.images)  # type: ignore[arg-type]
    other = toy_pipe(PROMPTS, num_images_per_prompt=2, output_type="latent", seed=start + 1)
    assert not torch.equal(drawn.images, other.images)  # type: ignore[arg-type]


def test_reference_draws_follow_the_generator(toy_pipe: Pipeline) -> None:
    generator = torch.Generator().manual_seed(11)
    by_generator = toy_pipe(PROMPTS, rng="reference", generator=generator, output_type="latent")
    by_seed = toy_pipe(PROMPTS, rng="reference", seed=11, output_type="latent")
    assert torch.equal(by_generator.images, by_seed.images)  # type: ignore[arg-type]
    assert by_generator.seeds == ()
    assert by_seed.seeds == (11, 11)


def test_config_holds_every_default_as_json(toy_pipe: Pipeline) -> None:
    config = toy_pipe(PROMPTS[0], seed=4, output_type="latent", cfg=3.0, policy="skip-scales").config
    assert json.loads(json.dumps(config)) == config
    assert config["guidance_scale"] == [3.0] * 7
    assert config["temperature"] == [0.5] * 7
    assert (config["width"], config["height"], config["pixels"], config["aspect_ratio"]) == (256, 256, "0.06M", "1:1")
    assert config["policy"]["parts"] == [{"policy": "skip-scales", "count": 1}]
    assert len(config["weights"]["sha256"]) == 64
    assert set(config["versions"]) == {"foveate", "torch", "numpy", "python", "tokenizers"}
    assert config["versions"]["tokenizers"] == version("tokenizers")
    assert "text_encoders" not in config["weights"]


def test_config_names_kernels_and_text_encoders(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(toy_pipe.model, text_encoders=(str(tmp_path), "google/flan-t5-xl"), device=torch.device("cuda"))
    job = resolve(PROMPTS[0], {"seed": 1}, model.spec)
    monkeypatch.setattr(pipeline_output, "processor_name", str)
    monkeypatch.setattr(pipeline_output, "installed_version", lambda name: f"{name} 3")
    for uses_triton, kernels in ((True, "triton"), (False, "torch")):
        config = pipeline_output.describe(job, model, uses_triton=uses_triton)
        assert (config["kernels"], "triton" in config["versions"]) == (kernels, uses_triton)
        assert config["versions"]["transformers"] == "transformers 3", "it runs the text encoders"
    assert config["weights"]["text_encoders"] == [tmp_path.name, "google/flan-t5-xl"]


def test_output_types_agree(toy_pipe: Pipeline) -> None:
    pil = toy_pipe(PROMPTS[0], seed=1)
    array = draw(toy_pipe, PROMPTS[0], seed=1)
    tensor = toy_pipe(PROMPTS[0], seed=1, output_type="pt").images
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(stack_uint8(pil.images), array)
    assert np.array_equal((tensor * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy(), array)
    with pytest.raises(FoveateError, match="return_dict is an option of diffusers"):
        toy_pipe(PROMPTS[0], **cast(Any, {"return_dict": False}))


def test_negative_prompt_matters_only_with_guidance(toy_pipe: Pipeline) -> None:
    plain = draw(toy_pipe, PROMPTS[0], seed=1)
    assert not np.array_equal(plain, draw(toy_pipe, PROMPTS[0], seed=1, negative_prompt="green apple"))
    unguided = draw(toy_pipe, PROMPTS[0], seed=1, cfg=1)
    assert np.array_equal(unguided, draw(toy_pipe, PROMPTS[0], seed=1, cfg=1, negative_prompt="green apple"))


def test_size_outside_of_training_warns(toy_pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "foveate"):
        output = toy_pipe(PROMPTS[0], seed=1, aspect_ratio="3:2", output_type="latent")
    assert "3:2 at 0.06M" in caplog.text
    assert output.config["width"] > output.config["height"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be above 2.94e-39, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\]"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number, 1 or more, got 0"),
        ({"guidance_scale": [1.0, 2.0]}, "guidance_scale needs one number or 7"),
        ({"guidance_scale": 2.0, "cfg": 2.0}, "alias cfg"),
        ({"guidance_scale": float("nan")}, "must be finite"),
        ({"tau": [0.5] * 8}, "temperature needs one number or 7"),
        ({"temperature": 0}, "temperature must be above .*, got 0; top_k=1"),
        ({"top_k": [1] * 6 + [-1]}, "top_k must be a whole number, 0 or more, got -1$"),
        ({"top_k": 1.5}, "top_k must be a whole number, 0 or more, got 1.5$"),
        ({"height": 256}, "both height and width"),
        ({"height": 250, "width": 250}, "size must be one of .*256x256.*got 250x250"),
        ({"height": 256, "width": 256, "pixels": "1M"}, "not both"),
        ({"aspect_ratio": "9:17"}, "aspect ratio must be one of"),
        ({"aspect_ratio": 1.49}, "aspect ratio must be one of .*got '1.49'"),
        ({"pixels": "9M"}, "no pixel budget '9M'; there are 0.06M"),
        ({"generator": torch.Generator()}, 'generator needs rng="reference"'),
        ({"rng": "reference", "batch_invariant": True}, 'batch_invariant needs rng="keyed"'),
        ({"rng": "dice"}, "rng must be keyed or reference"),
        ({"seed": -1}, "seed must be an integer"),
        ({"seed": [1, 2]}, "seed needs one integer or one per prompt"),
        ({"output_type": "jpg"}, "output_type must be one of"),
        ({"negative_prompt": ""}, "negative_prompt must not be empty"),
        ({"policy": "ld-prunning"}, "did you mean ld-pruning"),
    ],
)
def test_refusals_say_the_remedy(toy_pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message) as caught:
        resolve(PROMPTS[0], options, toy_pipe.model.spec)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers(toy_pipe: Pipeline) -> None:
    options: dict[str, Any] = {
        "seed": np.int64(3), "guidance_scale": np.float32(3), "top_k": np.int64(1), "top_p": np.float64(0.5),
        "temperature": [np.float32(0.5)] * 7, "num_images_per_prompt": np.int64(2), "width": np.int32(256),
        "height": np.int32(256),
    }  # fmt: skip
    plain = {name: value.item() for name, value in options.items() if name != "temperature"}
    output = toy_pipe(PROMPTS[0], output_type="latent", **options)
    assert output.config == toy_pipe(PROMPTS[0], output_type="latent", temperature=0.5, **plain).config
    assert json.loads(json.dumps(output.config)) == output.config
    assert output.seeds == (3, 4)


def test_a_list_may_hold_numbers_of_any_kind(toy_pipe: Pipeline) -> None:
    for values in (torch.full((7,), 2.0), [Decimal(2)] * 7, np.full(7, 2.0), [torch.tensor(2)] * 7):
        assert resolve(PROMPTS[0], {"guidance_scale": values}, toy_pipe.model.spec).guidance_scale == (2.0,) * 7


@pytest.mark.parametrize(("ratio", "name"), [(1, "1:1"), (1.5, "3:2"), (4 / 3, "4:3"), (1.333, "4:3"), (4 / 7, "4:7")])
def test_an_aspect_ratio_may_be_a_number(toy_pipe: Pipeline, ratio: float, name: str) -> None:
    for value in (ratio, np.float32(ratio)):
        assert resolve(PROMPTS[0], {"aspect_ratio": value}, toy_pipe.model.spec).ratio == name


def test_an_index_of_a_class_may_come_from_numpy() -> None:
    spec = PUBLISHED["var-d16"].spec
    for prompts in (207, np.int64(207), [np.int32(207)], "207"):
        assert resolve(prompts, {"seed": 1}, spec).prompts == ("207",)


# Runs in a process without shape checks, which would refuse these types before our own code sees them.
WRONG_TYPES = """
import sys, numpy as np
from foveate.core.errors import FoveateError
from foveate.pipeline.pipeline import Pipeline

pipe = Pipeline.from_pretrained(sys.argv[1])
cases = [(None, {}), (1.5, {}), (5, {}), ([None], {}), (np.array(3), {})]
cases += [("a", {name: value}) for name, value in (
    ("seed", 1.5), ("seed", "7"), ("seed", [1.5]), ("seed", np.array(3.0)), ("guidance_scale", "3"), ("tau", "x"),
    ("cfg", ["a"] * 7), ("cfg", ["2"] * 7), ("cfg", [np.ones(2)] * 7), ("cfg", [None] * 7),
    ("top_k", {}), ("top_k", 1.5), ("num_images_per_prompt", 1.5), ("num_images_per_prompt", "2"),
    ("aspect_ratio", (4, 3)), ("aspect_ratio", float("nan")), ("negative_prompt", 5), ("generator", "x"),
    ("policy", None), ("pixels", 1),
)]
cases += [("a", {"width": "256", "height": "256"}), ("a", {"width": 256.0, "height": 256.0})]
for prompts, options in cases:
    try:
        pipe(prompts, **options)
    except FoveateError as error:
        assert "\\n" not in str(error), error
    else:
        raise AssertionError((prompts, options))
"""


def test_wrong_types_are_refused_in_one_line(toy_folder: Path) -> None:
    subprocess.run([sys.executable, "-c", WRONG_TYPES, str(toy_folder)], check=True, timeout=120)


@pytest.mark.parametrize("prompts", ["", "  ", [], ["a cat", ""]])
def test_empty_prompts_are_refused(toy_pipe: Pipeline, prompts: Any) -> None:
    with pytest.raises(FoveateError, match="prompt"):
        toy_pipe(prompts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "num_inference_steps",
            "num_inference_steps is an option of diffusers; a next-scale model runs every scale once",
        ),
        ("guidance", "did you mean guidance_scale"),
    ],
)
def test_unknown_options_are_named(toy_pipe: Pipeline, name: str, message: str) -> None:
    options: Any = {name: 3}
    with pytest.raises(FoveateError, match=message):
        toy_pipe(PROMPTS[0], **options)


def test_policies_do_not_leak_into_the_next_call(toy_pipe: Pipeline) -> None:
    before = draw(toy_pipe, PROMPTS[0], seed=1)
    pruned = draw(toy_pipe, PROMPTS[0], seed=1, policy="skip-scales")
    assert not np.array_equal(before, pruned)
    assert np.array_equal(before, draw(toy_pipe, PROMPTS[0], seed=1))


def test_keys_and_values_are_gone_before_the_last_picture_is_decoded(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier images of a stream need them afterwards; the last one needs their room."""
    pipe = Pipeline.from_pretrained(toy_folder)
    caches: list[weakref.ref[KVCache]] = []
    open_cache, decode = KVCache.__init__, pipe.model.tokenizer.decode
    held: list[bool] = []

    def noted(cache: KVCache, *args: object, **kwargs: object) -> None:
        caches.append(weakref.ref(cache))
        open_cache(cache, *args, **kwargs)  # type: ignore[arg-type]

    def decoded(latent: torch.Tensor) -> torch.Tensor:
        held.append(any(cache() is not None for cache in caches))
        return decode(latent)

    monkeypatch.setattr(KVCache, "__init__", noted)
    monkeypatch.setattr(pipe.model.tokenizer, "decode", decoded)
    for _ in pipe.stream("a cat", previews=3, seed=1):
        pass
    assert caches
    assert held == [True, True, False]


def test_layers_that_run_in_tiles_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where the library's products depend on the rows beside them: in the log, and in the image's configuration."""
    monkeypatch.setattr("foveate.kernels.invariance.is_row_independent", lambda _: False)
    with caplog.at_level("INFO", logger="foveate"):
        pipe = Pipeline.from_pretrained("emoji-tiny")
    assert "256x1024 (in tiles of 64)" in caplog.text
    assert pipe.model.transformer.block(0).ffn.fc1.tile_rows == 64
    assert "256x1024 (in tiles of 64)" in pipe("owl", seed=1, output_type="latent").config["tiled_layers"]
    monkeypatch.undo()
    assert Pipeline.from_pretrained("emoji-tiny").model.tiled_layers == ()


@pytest.mark.parametrize("options", [{}, {"rng": "reference"}, {"guidance_scale": 1.0}])
def test_flops_of_single_images_add_up_to_those_of_the_call(toy_pipe: Pipeline, options: dict[str, Any]) -> None:
    prompts = ["a red cat", "two big dogs left of the house"]
    found = toy_pipe(prompts, seed=3, policy="ld-pruning", **options)
    run, full = found.trace.flops_by_image, found.report.flops_full_by_image
    assert (sum(run), sum(full)) == (found.report.flops_run, found.report.flops_full)
    for index, prompt in enumerate(prompts):
        alone = toy_pipe(prompt, seed=3, policy="ld-pruning", **options).report
        assert full[index] == alone.flops_full
        if "rng" not in options:
            alone = toy_pipe(prompt, seed=found.seeds[index], policy="ld-pruning", **options).report
            assert run[index] == alone.flops_run
