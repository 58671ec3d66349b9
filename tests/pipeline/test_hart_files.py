"""HART from its published files at toy size: by name and alias, from a clone, converted; what it needs and refuses."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from foveate.conditioning.qwen2 import QwenText, RandomPlacedText
from foveate.core.errors import CheckpointError
from foveate.families.convert import convert
from foveate.families.memory import memory_need
from foveate.families.published import PUBLISHED
from foveate.models.hart import HART, HARTConfig
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.full import Full
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.weights.random_weights import fill_randomly

NAME, REPO = "hart-0.7b-1024px", "mit-han-lab/hart-0.7b-1024px"
TOY = HARTConfig(
    depth=2, width=64, heads=4, codebook_size=64, latent_channels=8, text_width=24, text_tokens=6, ff_width=128,
    diff_width=32, diff_depth=1,
)  # fmt: skip
VQ = AutoencoderConfig(
    latent_channels=8, base_channels=32, channel_multipliers=(1,) * 5, num_res_blocks=1, codebook_size=64
)
FACTS = {"num_heads": 4, "context_token": 6}


@pytest.fixture(autouse=True)
def toy_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published entry at toy size, with the sides of 256 pixels."""
    entry = PUBLISHED[NAME]
    grids = tuple((n, n) for n in (1, 2, 4, 8, 16))
    spec = replace(entry.spec, transformer=TOY, autoencoder=VQ, grids=grids, budgets=("0.06M",))
    monkeypatch.setitem(PUBLISHED, NAME, replace(entry, spec=spec))
    text = RandomPlacedText(width=24, max_tokens=6, device=torch.device("cpu"))
    monkeypatch.setattr(QwenText, "from_pretrained", lambda *_args, **_kwargs: text)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of the repository: a plain and an averaged transformer, and a tokenizer with what a training leaves."""
    plain, average, autoencoder = HART(TOY), HART(TOY), Autoencoder(VQ)
    for seed, module in enumerate((plain, average, autoencoder)):
        fill_randomly(module, seed)
    (tmp_path / "llm").mkdir()
    (tmp_path / "tokenizer").mkdir()
    buffers = {"lvl_1L": torch.zeros(1, 341), "attn_bias_for_masking": torch.zeros(1, 1, 2, 2)}
    save_file(plain.state_dict(), tmp_path / "llm" / "model.safetensors")
    torch.save({**average.state_dict(), **buffers}, tmp_path / "llm" / "ema_model.bin")
    (tmp_path / "llm" / "config.json").write_text(json.dumps(FACTS))
    state = {f"vae.{key}": tensor.contiguous() for key, tensor in autoencoder.state_dict().items()}
    extra = {
        "vae.decoder2.conv_in.weight": torch.ones(2),
        "vae.post_quant_conv2.bias": torch.ones(2),
        "vae.quantize.ema_vocab_hit_SV": torch.zeros(5, 64),
        "disc.main.weight": torch.ones(2),
    }
    save_file(state | extra, tmp_path / "tokenizer" / "model.safetensors")
    return tmp_path


def latent_of(pipe: Pipeline, **options: object) -> torch.Tensor:
    return pipe("a red cat", seed=1, output_type="latent", **options).images  # type: ignore[return-value]


def test_by_alias_the_average_and_its_facts_are_fetched(
    clone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    def one(repo: str, name: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append(f"{repo}/{name}@{revision}")
        return str(clone / name)

    def many(repo: str, *, revision: str | None, local_files_only: bool, allow_patterns: list[str]) -> str:
        asked.append(f"{repo}/{allow_patterns[0]}@{revision}")
        return str(clone)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", many)
    with caplog.at_level(logging.WARNING, logger="foveate"):
        named = Pipeline.from_pretrained("hart-0.7b", revision="v1")
    assert asked == [f"{REPO}/{part}@v1" for part in ("llm/ema_model.bin", "llm/config.json", "tokenizer/*")]
    assert named.model.spec.name == NAME
    assert named.model.spec.transformer == TOY
    assert "a second decoder are not loaded: decoder2.conv_in.weight, post_quant_conv2.bias" in caplog.text
    cloned = Pipeline.from_pretrained(clone)
    assert cloned.model.spec == replace(named.model.spec, name="ema_model")
    assert torch.equal(latent_of(named), latent_of(cloned))
    (clone / "llm" / "config.json").write_text(json.dumps(FACTS | {"num_heads": 2}))
    assert Pipeline.from_pretrained("hart-0.7b").model.spec.transformer == replace(TOY, heads=2)
    (clone / "llm" / "config.json").write_text(json.dumps(FACTS))
    single = Pipeline.from_pretrained(clone / "llm" / "model.safetensors")
    assert not torch.equal(latent_of(single), latent_of(cloned))


def test_without_the_config_beside_them_weights_are_refused(clone: Path) -> None:
    (clone / "llm" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"ema_model\.bin: .*how many heads.*put the config\.json"):
        Pipeline.from_pretrained(clone)


def test_a_converted_transformer_generates_the_same(clone: Path, tmp_path: Path) -> None:
    done = convert(clone / "llm" / "ema_model.bin", tmp_path / "out" / "hart.safetensors")
    assert done.kind == "HART"
    vq = convert(clone / "tokenizer", tmp_path / "vae.safetensors")
    assert vq.kind == "VQ"
    again = Pipeline.from_pretrained(done.files[0], autoencoder=vq.files[0])
    assert torch.equal(latent_of(again), latent_of(Pipeline.from_pretrained(clone)))


def test_random_weights_run_by_name_and_take_what_was_forecast() -> None:
    pipe = Pipeline.from_pretrained("hart-0.7b", weights="random")
    output = pipe("a red cat", seed=1, output_type="latent")
    config = output.config
    assert config["more_smooth"]
    assert config["top_k"] == [600] * 5
    assert config["guidance_scale"] == [4.5] * 5
    assert output.report.flops_ratio == 1.0
    assert output.report.kv_bytes_bound == output.report.kv_bytes_peak
    need = memory_need(pipe.model.spec, torch.float32, Full())
    assert output.trace.peak_kv_bytes == need.kv
    assert need.transformer == sum(p.nbytes for p in pipe.model.transformer.parameters())
    plain = output.images
    assert torch.equal(latent_of(pipe), plain)
    for changed in ({"negative_prompt": "a dog"}, {"more_smooth": False}, {"rng": "reference"}, {"guidance_scale": 2}):
        assert not torch.equal(latent_of(pipe, **changed), plain)
    fitted = pipe("a red cat", seed=1, output_type="latent", policy="random-tokens", budget=0.6).report
    assert fitted.flops_ratio == pytest.approx(0.6, rel=0.02)
    assert 0 < fitted.refiner_flops_run < fitted.flops_run
    assert 0 < fitted.ms.refiner < fitted.ms.total
    batch = pipe(["a dog", "a red cat"], seed=1, output_type="latent").images
    assert torch.equal(batch[1:], plain)
