"""Loading of weights at toy size: names, nesting, refusals, damaged files, shards."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foveate.core.errors import CheckpointError
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.weights.files import read_weights, save_sharded
from foveate.weights.infinity import (
    infer_autoencoder_config,
    infer_infinity_config,
    load_autoencoder,
    load_transformer,
)

CONFIG = InfinityConfig(
    depth=4, width=16, heads=2, bits=4, text_width=12, pool_heads=4, chunks=2, text_tokens=6, ff_width=32
)
AE_CONFIG = AutoencoderConfig(
    latent_channels=4, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, patch=2
)


def random_state(module: torch.nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(t.shape, generator=generator) for key, t in module.state_dict().items()}


@pytest.fixture
def state() -> dict[str, Tensor]:
    return random_state(Infinity(CONFIG))


@pytest.fixture
def ae_state() -> dict[str, Tensor]:
    return random_state(Autoencoder(AE_CONFIG))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def flat_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of a model without chunks."""
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "block_chunks":
            parts[:4] = ["blocks", str(int(parts[1]) * 2 + int(parts[3]))]
        renamed[".".join(parts)] = tensor
    return renamed


def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names with wrappers around convolutions and norms."""
    renamed = {}
    for key, tensor in state.items():
        stem, _, end = key.rpartition(".")
        renamed[f"{stem}.{'norm' if 'norm' in stem.rpartition('.')[2] else 'conv'}.{end}"] = tensor
    return renamed


def test_transformer_loads_and_tells_its_shape(state: dict[str, Tensor]) -> None:
    assert infer_infinity_config(state) == CONFIG
    model = Infinity(CONFIG)
    load_transformer(model, state)
    assert_same(model.state_dict(), state)


def test_blocks_may_be_named_with_or_without_chunks(state: dict[str, Tensor]) -> None:
    flat = flat_blocks(state)
    assert infer_infinity_config(flat).chunks == 1
    assert infer_infinity_config(flat).depth == 4
    model = Infinity(CONFIG)
    load_transformer(model, flat)
    assert_same(model.state_dict(), state)
    one_chunk = Infinity(infer_infinity_config(flat))
    load_transformer(one_chunk, state)
    assert torch.equal(one_chunk.block(3).ffn.fc1.weight, state["block_chunks.1.module.1.ffn.fc1.weight"])


def test_constant_buffers_are_optional(state: dict[str, Tensor]) -> None:
    constants = {"block_chunks.0.module.0.sa.zero_k_bias": torch.ones(16), "lvl_1L": torch.zeros(1, 5)}
    constants["attn_bias_for_masking"] = torch.zeros(1, 1, 5, 5)
    model = Infinity(CONFIG)
    load_transformer(model, state | constants)
    assert_same(model.state_dict(), state)
    assert torch.equal(model.block(0).sa.zero_k_bias, torch.zeros(16))


def test_both_shapes_of_the_head_temperatures(state: dict[str, Tensor]) -> None:
    key = "block_chunks.1.module.0.sa.scale_mul_1H11"
    turned = state | {key: state[key].reshape(1, 1, 2, 1)}
    model = Infinity(CONFIG)
    load_transformer(model, turned)
    assert_same(model.state_dict(), state)
    first = "block_chunks.0.module.0.sa.scale_mul_1H11"
    assert infer_infinity_config(state | {first: state[first].reshape(1, 1, 2, 1)}).heads == 2


def test_training_checkpoint(state: dict[str, Tensor], tmp_path: Path) -> None:
    nested = {"epoch": 3, "trainer": {"gpt_fsdp": state, "gpt_fsdp_opt": {"head.weight": torch.zeros(1)}}}
    torch.save(nested, tmp_path / "ar.pth")
    weights = read_weights(tmp_path / "ar.pth")
    assert infer_infinity_config(weights) == CONFIG
    model = Infinity(CONFIG)
    load_transformer(model, weights)
    assert_same(model.state_dict(), state)


def test_dtype_is_changed_only_when_asked(state: dict[str, Tensor]) -> None:
    model = Infinity(CONFIG)
    load_transformer(model, {key: tensor.bfloat16() for key, tensor in state.items()})
    assert model.compute_dtype == torch.float32
    load_transformer(model, state, dtype=torch.bfloat16)
    assert model.compute_dtype == torch.bfloat16
    assert torch.equal(model.head.weight, state["head.weight"].bfloat16())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head.bias": None}, ["1 missing", "head.bias"]),
        ({"head.extra": torch.zeros(1)}, ["1 unknown", "head.extra"]),
        ({"head.bias": torch.zeros(3)}, ["head.bias", "(8,)", "(3,)"]),
        ({"head.bias": torch.zeros(8, dtype=torch.int8)}, ["head.bias", "wants floats, got torch.int8"]),
        ({"block_chunks.1.module.1.sa.q_bias": None}, ["1 missing", "block_chunks.1.module.1.sa.q_bias"]),
    ],
)
def test_what_does_not_fit_is_named(
    state: dict[str, Tensor], change: dict[str, Tensor | None], words: list[str]
) -> None:
    changed = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
    model = Infinity(CONFIG)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_transformer(model, changed)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert_same(model.state_dict(), before)


def test_many_missing_keys_are_counted(state: dict[str, Tensor], ae_state: dict[str, Tensor]) -> None:
    other = {f"other.{key}": tensor for key, tensor in ae_state.items()}
    with pytest.raises(CheckpointError, match=rf"{len(state)} missing: .*{len(other)} unknown: ") as caught:
        load_transformer(Infinity(CONFIG), other)
    assert len(str(caught.value)) < 400
    with pytest.raises(CheckpointError, match="cfg_uncond"):
        infer_infinity_config(other)


def test_the_other_half_of_a_model_is_refused_by_name(state: dict[str, Tensor], ae_state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="those of an Infinity autoencoder, expected an Infinity transformer"):
        load_transformer(Infinity(CONFIG), ae_state)
    with pytest.raises(CheckpointError, match="those of an Infinity transformer, expected an Infinity autoencoder"):
        load_autoencoder(Autoencoder(AE_CONFIG), state)


@pytest.mark.parametrize(("key", "family"), [("class_emb.weight", "VAR"), ("crop_embed.weight", "Switti")])
def test_other_families_are_refused_by_name(state: dict[str, Tensor], key: str, family: str) -> None:
    for call in (infer_infinity_config, lambda weights: load_transformer(Infinity(CONFIG), weights)):
        with pytest.raises(CheckpointError, match=f"those of .*{family} .*expected an Infinity transformer"):
            call({key: torch.zeros(1), **{k: v for k, v in state.items() if k != "cfg_uncond"}})


def test_vq_autoencoder_is_refused(ae_state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"those of a VQ autoencoder"):
        infer_autoencoder_config(ae_state | {"quantize.embedding.weight": torch.zeros(8, 4)})


@pytest.mark.parametrize("rename", [dict, wrapped])
@pytest.mark.parametrize("nest", ["", "vae.", "ema."])
def test_autoencoder_under_all_its_names(ae_state: dict[str, Tensor], rename: object, nest: str) -> None:
    published = {nest + key: tensor for key, tensor in rename(ae_state).items()}
    published[f"{nest}quantizer.lfq.mask"] = published[f"{nest}quantize.lfq.mask"] = torch.arange(4)
    assert infer_autoencoder_config(published) == AE_CONFIG
    model = Autoencoder(AE_CONFIG)
    load_autoencoder(model, published)
    assert_same(model.state_dict(), ae_state)


def test_vae_comes_before_ema(ae_state: dict[str, Tensor], tmp_path: Path) -> None:
    other = random_state(Autoencoder(AE_CONFIG), seed=2)
    torch.save({"ema": other, "vae": ae_state}, tmp_path / "vae.pth")
    model = Autoencoder(AE_CONFIG)
    load_autoencoder(model, read_weights(tmp_path / "vae.pth"))
    assert_same(model.state_dict(), ae_state)


def test_autoencoder_refusals(ae_state: dict[str, Tensor]) -> None:
    twice = ae_state | {"decoder.conv_in.conv.weight": ae_state["decoder.conv_in.weight"]}
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.weight twice"):
        load_autoencoder(Autoencoder(AE_CONFIG), twice)
    with pytest.raises(CheckpointError, match=r"unknown: quant_conv\.weight"):
        load_autoencoder(Autoencoder(AE_CONFIG), ae_state | {"quant_conv.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"missing: decoder\.conv_in\.bias"):
        load_autoencoder(Autoencoder(AE_CONFIG), {k: v for k, v in ae_state.items() if k != "decoder.conv_in.bias"})


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_damaged_files_are_named_in_one_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "whole.pth")
    bad = {"empty.safetensors": b"", "empty.pth": b"", "junk.safetensors": b"x" * 99, "junk.pth": b"\x80junk" * 9}
    bad |= {f"cut{end}": (tmp_path / f"whole{end}").read_bytes()[:-600] for end in (".safetensors", ".pth")}
    bad |= {"notes.txt": b"hello", "list.pth": pickle.dumps([1]), "code.pth": pickle.dumps(Touch(tmp_path / "ran"))}
    bad["bad.safetensors.index.json"] = b'{"weight_map": 3}'
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in [*bad, "absent.pth", "absent"]:
        with pytest.raises(CheckpointError) as caught:
            read_weights(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert_same(read_weights(tmp_path / "whole.pth"), state)
    assert_same(read_weights(tmp_path / "whole.safetensors"), state)


def test_shards(state: dict[str, Tensor], tmp_path: Path) -> None:
    limit = 8 * 1024
    written = save_sharded(state, tmp_path / "out", "transformer", max_bytes=limit)
    count = len(written) - 1
    assert count > 2
    assert written[0].name == f"transformer-00001-of-{count:05d}.safetensors"
    assert written[-1].name == "transformer.safetensors.index.json"
    assert max(p.stat().st_size for p in written[:-1]) <= limit
    for path in (tmp_path / "out", tmp_path / "out" / "transformer", written[-1]):
        assert_same(read_weights(path), state)
    save_sharded({"a": torch.ones(2)}, tmp_path / "out", "other")
    smaller = {"b": torch.zeros(2)}
    assert [p.name for p in save_sharded(smaller, tmp_path / "out", "transformer")] == ["transformer.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["other.safetensors", "transformer.safetensors"]
    assert_same(read_weights(tmp_path / "out" / "transformer"), smaller)
    with pytest.raises(CheckpointError, match=r"other\.safetensors, transformer\.safetensors"):
        read_weights(tmp_path / "out")


def test_strides_and_shared_storages_survive_a_pickle(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {"turned": base.T, "part": base[1:3, 2:5], "half": base[0].half(), "whole": base}
    torch.save(state, tmp_path / "views.pth")
    assert_same(read_weights(tmp_path / "views.pth"), state)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_weights(tmp_path / "old.pth"), state)


def test_broken_shards_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    *shards, index = save_sharded(state, tmp_path, "t", max_bytes=8 * 1024)
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"ghost": shards[0].name}}))
    with pytest.raises(CheckpointError, match="lack ghost"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="beside the index"):
        read_weights(tmp_path)
    index.write_text(json.dumps(content))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"shard {shards[1].name} is missing"):
        read_weights(tmp_path)
