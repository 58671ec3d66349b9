"""Published weights on this disk and on the hub, at toy size: what is found, what is drawn, which pairs are refused."""

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from foveate.conditioning.t5 import T5Text
from foveate.core.errors import CheckpointError, FoveateError
from foveate.families.published import PUBLISHED
from foveate.families.registry import family_named
from foveate.families.spec import Defaults, ModelSpec, Published, WeightSource
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.models.switti import SwittiConfig
from foveate.models.var import GRIDS_256, GRIDS_512, VAR, VARConfig
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import regenerate, save_image
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.weights.random_weights import fill_randomly
from tests.conftest import toy_text_encoder

VQ = AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=1,
                       codebook_size=64)  # fmt: skip
TOY_VAR = VARConfig(depth=2, width=64, heads=4, codebook_size=64, latent_channels=8, grids=GRIDS_256)
BSQ = AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=1)
TOY_INFINITY = InfinityConfig(depth=2, width=64, heads=4, bits=8, text_width=24, pool_heads=4, text_tokens=64)


def filled(module: nn.Module, seed: int = 1) -> nn.Module:
    fill_randomly(module, seed)
    return module


@pytest.fixture
def var_folder(tmp_path: Path) -> Path:
    """A VAR model under the names of the published files, as pickles."""
    torch.save(filled(VAR(TOY_VAR)).state_dict(), tmp_path / "var_toy.pth")
    torch.save(filled(Autoencoder(VQ), 2).state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    return tmp_path


def test_var_from_files_draws_classes_and_draws_them_again(var_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(var_folder / "var_toy.pth")
    assert (pipe.model.spec.family, pipe.model.spec.name, pipe.model.weights) == ("var", "var_toy", "pretrained")
    output = pipe(["goldfish", 207], seed=3)
    assert output.prompts == ("goldfish", "207")
    assert output.config["guidance_scale"] == [4.0] * 10
    assert output.images[0].size == (256, 256)  # type: ignore[union-attr]
    again = pipe([1, "golden retriever"], seed=3)
    assert [image.tobytes() for image in output.images] == [image.tobytes() for image in again.images]  # type: ignore
    save_image(output.images[1], tmp_path / "one.png", output.row_config(1))  # type: ignore[arg-type]
    assert regenerate(tmp_path / "one.png", pipe).is_identical


def test_var_smooths_and_refuses_what_it_has_not(var_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(var_folder)
    plain, smooth = (pipe("tench", seed=1, more_smooth=flag, output_type="latent").images for flag in (False, True))
    assert not torch.equal(plain, smooth)  # type: ignore[arg-type]
    alone = pipe(["tench", "volcano"], seed=1, more_smooth=True, output_type="latent").images[0]
    torch.testing.assert_close(alone, smooth[0], rtol=0.0, atol=1e-3)
    with pytest.raises(FoveateError, match="takes no negative_prompt"):
        pipe("tench", negative_prompt="volcano")
    with pytest.raises(FoveateError, match="generates 256x256 only"):
        pipe("tench", aspect_ratio="2:1")
    with pytest.raises(FoveateError, match="size must be one of 256x256 "):
        pipe("tench", width=512, height=512)
    with pytest.raises(FoveateError, match="no ImageNet class 'tensh'.*tench"):
        pipe("tensh")


def test_the_tokenizer_of_another_family_is_refused(var_folder: Path) -> None:
    torch.save(filled(Autoencoder(BSQ)).state_dict(), var_folder / "infinity_vae.pth")
    with pytest.raises(CheckpointError, match="those of an Infinity autoencoder, expected a VQ autoencoder"):
        Pipeline.from_pretrained(var_folder / "var_toy.pth", autoencoder=var_folder / "infinity_vae.pth")
    other = AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1,) * 5, num_res_blocks=1,
                              codebook_size=32)  # fmt: skip
    torch.save(Autoencoder(other).state_dict(), var_folder / "small.pth")
    with pytest.raises(CheckpointError, match="wants 64 codes of 8 channels, the autoencoder offers 32 codes"):
        Pipeline.from_pretrained(var_folder / "var_toy.pth", autoencoder=var_folder / "small.pth")


def test_what_is_missing_beside_a_transformer_is_named(var_folder: Path) -> None:
    (var_folder / "vae_ch160v4096z32.pth").unlink()
    with pytest.raises(CheckpointError, match=r"var_toy\.pth needs .* beside it, found none; or give its path"):
        Pipeline.from_pretrained(var_folder / "var_toy.pth")
    torch.save({"a": torch.zeros(1)}, var_folder / "what.pth")
    with pytest.raises(CheckpointError, match="unknown model family"):
        Pipeline.from_pretrained(var_folder / "what.pth")
    with pytest.raises(CheckpointError, match=r"must hold one transformer, found var_toy\.pth, what\.pth"):
        Pipeline.from_pretrained(var_folder)


@pytest.mark.parametrize(
    ("model", "autoencoder", "right"),
    [
        ("infinity-2b", "infinity_vae_d32.pth", "infinity_vae_d32reg.pth"),
        ("infinity-125m", "infinity_vae_d32reg.pth", "infinity_vae_d16.pth"),
        ("infinity-8b", "infinity_vae_d64.pth", "infinity_vae_d56_f8_14_patchify.pth"),
    ],
)
def test_published_pairs_are_strict(model: str, autoencoder: str, right: str) -> None:
    with pytest.raises(CheckpointError, match=f"{model} was trained with {right}; with {autoencoder}"):
        Pipeline.from_pretrained(model, autoencoder=autoencoder)


def toy_entry(conditioner: str = "t5-xl") -> Published:
    spec = ModelSpec(
        name="infinity-toy",
        family="infinity",
        transformer=TOY_INFINITY,
        autoencoder=BSQ,
        conditioner=conditioner,
        budgets=("0.06M",),
        defaults=Defaults(guidance_scale=3.0),
    )
    hub = "someone/weights"
    return Published(
        spec=spec,
        transformer=WeightSource(repo=hub, path="shards"),
        autoencoder=WeightSource(repo=hub, path="infinity_vae_d16.pth"),
        text_encoders=("someone/text",),
        licence="MIT",
    )


def test_a_friendly_name_is_fetched_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = filled(Infinity(TOY_INFINITY)).state_dict()
    nested = {"trainer": {"gpt_fsdp": state}}
    (tmp_path / "shards").mkdir()
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    for i, half in enumerate(halves):
        save_file({key: value.contiguous() for key, value in half.items()}, tmp_path / "shards" / f"{i}.safetensors")
    weight_map = {key: f"{i}.safetensors" for i, half in enumerate(halves) for key in half}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"vae": filled(Autoencoder(BSQ), 3).state_dict()}, tmp_path / "infinity_vae_d16.pth")
    torch.save(nested, tmp_path / "tuned.pth")
    asked: list[object] = []

    def one(repo: str, name: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append((repo, name, revision))
        return str(tmp_path / name)

    def many(repo: str, *, revision: str | None, local_files_only: bool, allow_patterns: list[str]) -> str:
        asked.append((repo, *allow_patterns, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", many)
    monkeypatch.setitem(PUBLISHED, "infinity-toy", toy_entry())
    monkeypatch.setattr(T5Text, "from_pretrained", lambda *args, **kwargs: toy_text_encoder())
    pipe = Pipeline.from_pretrained("infinity-toy", revision="v2")
    assert asked == [("someone/weights", "shards/*", "v2"), ("someone/weights", "infinity_vae_d16.pth", "v2")]
    tuned = Pipeline.from_pretrained(tmp_path / "tuned.pth")
    assert tuned.model.spec == replace(pipe.model.spec, name="tuned")
    a, b = (p("a red cat", seed=1, output_type="latent").images for p in (pipe, tuned))
    assert torch.equal(a, b)  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="more_smooth is for VAR, Switti and HART; "):
        pipe("a cat", more_smooth=True)


@pytest.mark.parametrize("repo", ["FoundationVision/Infinity", "foundationvision/var"])
def test_a_repository_of_many_models_is_not_fetched_whole(repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_kwargs: pytest.fail("fetched"))
    with pytest.raises(FoveateError, match=r"is known by model name.*ask for one of (infinity|var)-"):
        Pipeline.from_pretrained(repo)


def test_a_repository_of_one_published_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(repo: str, **_options: object) -> str:
        fetched.append(repo)
        raise OSError("the test ends here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    repo = PUBLISHED["switti-1024"].transformer.repo
    with pytest.raises(FoveateError, match="the test ends here"):
        Pipeline.from_pretrained(repo)
    assert fetched == [repo]


def test_the_hub_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise OSError("401 Client Error\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(FoveateError, match=r"no var_d16\.pth from FoundationVision/var on the hub: 401 Client Error$"):
        Pipeline.from_pretrained("var-d16")


def test_switti_needs_to_know_whether_scales_are_remembered(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="use_ar"):
        family_named("switti").transformer.infer({}, {})
    spec = PUBLISHED["switti-1024"].spec
    assert isinstance(spec.transformer, SwittiConfig)
    assert spec.defaults.guidance_window == (0, 11)
    assert spec.kind.guidance((6.0,) * 14, spec.defaults.guidance_window).weights[11:] == (1.0, 1.0, 1.0)
    assert PUBLISHED["switti-512"].spec.grids == GRIDS_512


@pytest.mark.parametrize("name", ["var-d16", "switti-512-ar"])
def test_random_weights_of_a_shape_draw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published entry at toy size: the same code paths from name to image."""
    spec = PUBLISHED[name].spec
    if spec.family == "var":
        small = VARConfig(depth=2, width=64, heads=4, codebook_size=64, latent_channels=8, grids=GRIDS_256)
        grids = GRIDS_256
    else:
        grids = GRIDS_256
        small = SwittiConfig(  # type: ignore[assignment]
            depth=2, width=64, heads=4, codebook_size=64, latent_channels=8, num_levels=10, use_ar=True,
            text_width=24, pooled_width=12,
        )  # fmt: skip
    toy = ModelSpec(
        name=name, family=spec.family, transformer=small, autoencoder=VQ, conditioner=spec.conditioner,
        budgets=("0.06M",), ratios=("1:1",), grids=grids, defaults=spec.defaults,
    )  # fmt: skip
    entry = PUBLISHED[name]
    monkeypatch.setitem(
        PUBLISHED,
        name,
        Published(spec=toy, transformer=entry.transformer, autoencoder=entry.autoencoder, text_encoders=(), licence=""),
    )
    pipe = Pipeline.from_pretrained(name, weights="random")
    output = pipe("volcano", seed=1, top_k=0, top_p=0.0)
    assert output.images[0].size == (256, 256)  # type: ignore[union-attr]
    assert output.report.flops_ratio == 1.0


def test_parts_that_would_have_no_effect_are_refused(toy_folder: Path) -> None:
    with pytest.raises(FoveateError, match="autoencoder has no effect on random weights; leave it out"):
        Pipeline.from_pretrained("var-d16", weights="random", autoencoder="vae.pth")
    with pytest.raises(FoveateError, match="text_encoder has no effect on .*, which holds its own; leave it out"):
        Pipeline.from_pretrained(toy_folder, text_encoder="someone/text")


def test_a_converted_file_is_still_known_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="infinity-2b was trained with infinity_vae_d32reg.pth"):
        Pipeline.from_pretrained("infinity-2b", autoencoder=tmp_path / "infinity_vae_d32.safetensors")


def test_local_files_only_reaches_the_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(filled(Infinity(TOY_INFINITY)).state_dict(), tmp_path / "tuned.pth")
    torch.save(filled(Autoencoder(BSQ), 3).state_dict(), tmp_path / "vae.pth")
    asked: list[object] = []

    def load(*args: object, **kwargs: object) -> object:
        asked.append(kwargs["local_files_only"])
        return toy_text_encoder()

    monkeypatch.setattr(T5Text, "from_pretrained", load)
    for flag in (False, True):
        Pipeline.from_pretrained(tmp_path / "tuned.pth", local_files_only=flag)
    assert asked == [False, True]


def test_a_pickle_of_more_than_tensors_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "args": Path("x")}, tmp_path / "run.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors and is not opened; save its state dict alone"):
        Pipeline.from_pretrained(tmp_path / "run.pth")
