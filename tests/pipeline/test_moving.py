"""Pipelines on another device, and scripts that were written for diffusers.

There is no second device here: the meta device, which holds no numbers, stands for one, so whatever does not move with
a model is found by its device.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foveate.conditioning.text import RandomPooledText, RandomText
from foveate.core.errors import FoveateError
from foveate.engine.graphs import Captured, Graphs
from foveate.families.loading import LoadedModel
from foveate.families.moving import moved
from foveate.families.offload import Offload, parts_of
from foveate.kernels.linear import Linear
from foveate.models.var import VAR
from foveate.pipeline.foreign import CALL, LOADING
from foveate.pipeline.options import OPTIONS
from foveate.pipeline.pipeline import Pipeline
from foveate.tokenizers.autoencoder import Autoencoder
from tests.pipeline.test_published import TOY_VAR, VQ, filled

META, CPU = torch.device("meta"), torch.device("cpu")

SNIPPET = """
import torch
from diffusers import DiffusionPipeline

seen = []


def note(pipe, step, timestep, callback_kwargs):
    seen.append(callback_kwargs["latents"].shape)
    return callback_kwargs


pipe = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
pipe = pipe.to("cpu")
pipe.set_progress_bar_config(disable=True)
result = pipe(
    prompt="a red cat",
    negative_prompt="a dog",
    height=256,
    width=256,
    guidance_scale=2.5,
    num_images_per_prompt=2,
    output_type="pil",
    callback_on_step_end=note,
)
image = result.images[0]
image.save("cat.png")
"""


def tensors_in(part: object, seen: set[int] | None = None) -> Iterator[torch.Tensor | torch.device]:
    """Every tensor and every device that an object of ours holds, however deep."""
    seen = set() if seen is None else seen
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, torch.Tensor | torch.device):
        yield part
        return
    held: list[object] = []
    if isinstance(part, dict):
        held = list(part.values())
    elif isinstance(part, list | tuple):
        held = list(part)
    elif isinstance(part, nn.Module) or type(part).__module__.startswith("foveate."):
        held = list(vars(part).values()) if hasattr(part, "__dict__") else []
        if is_dataclass(part):
            held += [getattr(part, name) for name in part.__dataclass_fields__ if hasattr(part, name)]
    for value in held:
        yield from tensors_in(value, seen)


@pytest.fixture(autouse=True)
def no_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows no autocast of the meta device, and the checks of types ask a transformer for its dtype."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)


@pytest.fixture
def var_model(tmp_path: Path) -> LoadedModel:
    torch.save(filled(VAR(TOY_VAR)).state_dict(), tmp_path / "var_toy.pth")
    torch.save(filled(Autoencoder(VQ), 2).state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    return Pipeline.from_pretrained(tmp_path).model


def places(model: LoadedModel) -> set[str]:
    held = [found for part in (model, model.transformer, model.tokenizer, model.text) for found in tensors_in(part)]
    assert len(held) > 50
    return {found.type if isinstance(found, torch.device) else found.device.type for found in held}


def with_loud_tiles(model: LoadedModel) -> LoadedModel:
    """As if a layer had failed the probe."""
    layers = [layer for layer in model.transformer.modules() if isinstance(layer, Linear)]  # type: ignore[attr-defined]
    layers[0].tile_rows = layers[0].whole_rows = 64
    return replace(model, tiled_layers=("64x64",))


def test_everything_of_a_model_moves(toy_folder: Path, var_model: LoadedModel) -> None:
    for model in (Pipeline.from_pretrained(toy_folder).model, var_model):
        assert places(model) == {"cpu"}
        tiled = with_loud_tiles(model)
        there = moved(tiled, META)
        assert (places(there), there.device, there.tiled_layers) == ({"meta"}, META, ())
        assert {
            layer.tile_rows
            for layer in there.transformer.modules()  # type: ignore[attr-defined]
            if isinstance(layer, Linear)
        } == {None}


def test_text_encoders_that_are_read_on_demand_are_read_where_the_model_is(toy_folder: Path) -> None:
    model = Pipeline.from_pretrained(toy_folder, release_text_encoder=True).model
    text: Any = model.text
    before: Any = text.encode(["a red cat"])[0]
    assert before.device == CPU
    there: Any = moved(model, META).text
    assert {found.type for found in tensors_in(there.load(there.device)) if isinstance(found, torch.device)} <= {"meta"}
    assert {found.device for found in tensors_in(there.load(there.device)) if isinstance(found, torch.Tensor)} == {META}
    # What was encoded for the other device is forgotten.
    assert text.num_cut("a red cat") == 0
    with pytest.raises(KeyError):
        there.num_cut("a red cat")


def test_text_features_without_weights_are_made_where_the_model_is(toy_folder: Path) -> None:
    text = RandomText(width=24, max_tokens=8, device=CPU)
    model = Pipeline.from_pretrained(toy_folder).model
    there: Any = moved(replace(model, text=RandomPooledText(tokens=text, pooled_width=4)), META).text
    found = there.encode(["a"])[0]
    assert (found.tokens_TE.device, found.pooled_F.device, text.encode(["a"])[0].device) == (META, META, CPU)


def test_a_move_that_fails_brings_back_what_had_moved(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, moves = Pipeline.from_pretrained(toy_folder).model, []

    def noted(module: nn.Module, device: torch.device) -> None:
        moves.append((type(module).__name__, device))
        if (moves[-1]) == ("MiniLM", META):
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(nn.Module, "to", noted)
    with pytest.raises(torch.OutOfMemoryError):
        moved(model, META)
    modules = ["Infinity", "Autoencoder", "MiniLM"]
    assert moves == [(name, device) for device in (META, CPU) for name in modules]


def test_a_pipeline_stays_itself_and_keeps_its_bits(toy_folder: Path, toy_pipe: Pipeline) -> None:
    pipe = Pipeline.from_pretrained(toy_folder)
    options: Any = {"seed": 3, "output_type": "latent"}
    before, runner = toy_pipe("a red cat", **options).images, pipe.runner
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.device("cpu"), dtype="float32") is pipe
    assert pipe.to(torch.float32) is pipe
    # From a device and back: on the way there numbers are lost, so the engine alone is looked at.
    pipe.model = runner.model = replace(pipe.model, device=META)
    engine = runner.engine
    assert pipe.to("cpu") is pipe
    assert pipe.runner is runner
    assert runner.model is pipe.model
    assert (pipe.model.device, runner.engine is engine, runner.engine.model is pipe.model.transformer) == (
        CPU,
        False,
        True,
    )
    assert torch.equal(pipe("a red cat", **options).images, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_there_is_not_is_refused(toy_pipe: Pipeline) -> None:
    with pytest.raises(
        FoveateError, match='^device cuda needs a CUDA build of torch and a GPU, there is none; use "cpu"$'
    ):
        toy_pipe.to("cuda")
    with pytest.raises(FoveateError, match='^device must be "cpu", "cuda" or "cuda:N", got \'mps\'$'):
        toy_pipe.to("mps")


@pytest.mark.parametrize("wanted", [("cpu", torch.bfloat16), (torch.bfloat16,), ("cpu", "bfloat16")])
def test_another_dtype_is_refused_with_the_remedy(toy_pipe: Pipeline, wanted: tuple[Any, ...]) -> None:
    message = '^to\\(\\) moves a pipeline and keeps its dtype, float32; load it with dtype="bfloat16", which'
    with pytest.raises(FoveateError, match=message):
        toy_pipe.to(*wanted)


def test_what_belongs_to_a_device_is_not_moved_from_it(toy_folder: Path) -> None:
    def offloaded(pipe: Pipeline) -> None:
        pipe.runner.offload = Offload(parts_of(pipe.model), CPU)

    def captured(pipe: Pipeline) -> None:
        pipe.runner.engine = replace_graphs(pipe)

    def interpreted(pipe: Pipeline) -> None:
        pipe.runner.uses_triton = True

    def quantised(pipe: Pipeline) -> None:
        pipe.model = replace(pipe.model, precision=replace(pipe.model.precision, quantization="int8"))

    cases: list[tuple[Callable[[Pipeline], None], str]] = [
        (offloaded, '^offload moves the modules itself.*device="cpu" and without offload$'),
        (captured, '^captured CUDA graphs belong to .*: load a pipeline with device="cpu"$'),
        (interpreted, '^Triton kernels run on a GPU: load a pipeline with device="cpu"$'),
        (quantised, '^int8 weights are laid out for .*: load a pipeline with device="cpu"$'),
    ]
    for prepare, message in cases:
        pipe = Pipeline.from_pretrained(toy_folder)
        pipe.model = pipe.runner.model = replace(pipe.model, device=META)
        prepare(pipe)
        engine = pipe.runner.engine
        with pytest.raises(FoveateError, match=message):
            pipe.to("cpu")
        assert (pipe.model.device, pipe.runner.engine) == (META, engine)


def never(step: Callable[[], torch.Tensor]) -> Captured:
    raise AssertionError("nothing is captured here")


def replace_graphs(pipe: Pipeline) -> Any:
    engine = pipe.runner.engine
    return type(engine)(engine.model, engine.tokenizer, Graphs(never), None)


def test_a_script_for_diffusers_runs_with_its_import_changed(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_pipe: Pipeline
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"MODEL": str(toy_folder)}
    script = SNIPPET.replace(
        "from diffusers import DiffusionPipeline", "from foveate import Pipeline as DiffusionPipeline"
    )
    exec(compile(script, "snippet", "exec"), names)
    assert len(names["seen"]) == 7
    seed = names["result"].seeds[0]
    again = toy_pipe("a red cat", negative_prompt="a dog", guidance_scale=2.5, seed=seed).images[0]
    assert again.tobytes() == names["image"].tobytes()
    assert os.listdir(tmp_path) == ["cat.png"]


@pytest.mark.parametrize("name", CALL)
def test_options_of_diffusers_alone_are_refused_with_what_to_do(toy_pipe: Pipeline, name: str) -> None:
    assert name not in OPTIONS
    with pytest.raises(FoveateError, match=f"^{name} is an option of diffusers; ") as caught:
        toy_pipe("a red cat", **{name: 3})
    assert "\n" not in str(caught.value)


def test_arguments_of_loading_that_there_are_not_are_refused(toy_folder: Path) -> None:
    load: Any = Pipeline.from_pretrained
    for name, remedy in LOADING.items():
        with pytest.raises(FoveateError) as caught:
            load(toy_folder, **{name: None})
        assert str(caught.value) == f"{name} is an option of diffusers; {remedy}"
    with pytest.raises(FoveateError, match="^no option of from_pretrained 'dtyp'; did you mean dtype"):
        load(toy_folder, dtyp="float32")
    with pytest.raises(FoveateError, match="^give dtype or its alias torch_dtype, not both$"):
        load(toy_folder, dtype="float32", torch_dtype="float32")
    with pytest.raises(FoveateError, match="^torch_dtype must be one of float32, bfloat16, float16, got half$"):
        load(toy_folder, torch_dtype="half")
    assert load(toy_folder, torch_dtype=torch.bfloat16).model.dtype is torch.bfloat16


def test_a_generator_is_refused_with_what_to_do(toy_pipe: Pipeline) -> None:
    with pytest.raises(FoveateError, match='generator needs rng="reference"; use seed with rng="keyed"'):
        toy_pipe("a red cat", generator=torch.Generator().manual_seed(0))
