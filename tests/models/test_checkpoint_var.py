"""Published weights of the VAR family at toy size: shapes told from weights, nests, buffers, refusals."""

import logging

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import CheckpointError
from foveate.models.var import GRIDS_256, GRIDS_512, VAR, VARConfig
from foveate.tokenizers.autoencoder import VQ_F16, Autoencoder, AutoencoderConfig
from foveate.weights.var import infer_var_config, load_var
from foveate.weights.vq import infer_vq_config, load_vq

GRIDS = ((1, 1), (2, 2), (5, 5))
CONFIGS = [
    VARConfig(
        depth=3,
        width=16,
        heads=2,
        num_classes=7,
        codebook_size=12,
        latent_channels=4,
        grids=GRIDS,
        shared_aln=shared_aln,
        ff_width=24,
    )
    for shared_aln in (False, True)
]
VQ_CONFIG = AutoencoderConfig(
    latent_channels=4,
    base_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    codebook_size=12,
    num_refiners=3,
)


def random_state(module: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(t.shape, generator=generator) for key, t in module.state_dict().items()}


def nested(state: dict[str, Tensor], nest: str) -> dict[str, Tensor]:
    return {nest + key: tensor for key, tensor in state.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("config", CONFIGS, ids=["own", "shared"])
@pytest.mark.parametrize("nest", ["", "trainer.var_wo_ddp.", "var_wo_ddp."])
def test_transformer_loads_and_tells_its_shape(config: VARConfig, nest: str) -> None:
    state = random_state(VAR(config))
    found = nested(state, nest)
    if nest:
        found |= nested(random_state(Autoencoder(VQ_CONFIG)), nest.replace("var_wo_ddp", "vae_local"))
    assert infer_var_config(found, GRIDS) == config
    model = VAR(config)
    load_var(model, found)
    assert_same(model.state_dict(), state)


def test_constant_buffers_may_be_there() -> None:
    state = random_state(VAR(CONFIGS[0]))
    buffers = {
        "lvl_1L": torch.zeros(1, 30, dtype=torch.long),
        "attn_bias_for_masking": torch.zeros(1, 1, 30, 30),
        "blocks.2.attn.zero_k_bias": torch.zeros(16),
    }
    model = VAR(CONFIGS[0])
    load_var(model, state | buffers, dtype=torch.float64)
    assert model.head.weight.dtype == torch.float64
    assert torch.equal(model.head.weight, state["head.weight"].double())
    assert model.block(2).attn.zero_k_bias.abs().max() == 0


@pytest.mark.parametrize("grids", [GRIDS_256, GRIDS_512], ids=["256", "512"])
def test_published_schedules_follow_from_the_number_of_positions(grids: tuple[tuple[int, int], ...]) -> None:
    config = VARConfig(depth=1, width=4, heads=2, num_classes=2, codebook_size=4, grids=grids, ff_width=4)
    assert config.starts[-1] in (680, 2240)
    assert infer_var_config(VAR(config).state_dict()) == config


def test_unknown_schedules_must_be_given() -> None:
    state = random_state(VAR(CONFIGS[0]))
    with pytest.raises(CheckpointError, match="30 positions of 3 scales, no published schedule; give the grids"):
        infer_var_config(state)
    with pytest.raises(CheckpointError, match="not the given one, 1x1 2x2 4x4; give the grids"):
        infer_var_config(state, ((1, 1), (2, 2), (4, 4)))


def test_weights_that_do_not_fit_are_named_and_change_nothing() -> None:
    state = random_state(VAR(CONFIGS[0]))
    model = VAR(CONFIGS[0])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    changed = {key: tensor for key, tensor in state.items() if key != "blocks.1.ffn.fc2.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.ffn\.fc2\.bias; 1 unknown: extra"):
        load_var(model, changed | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"pos_1LC wants \(1, 30, 16\), got \(1, 31, 16\)"):
        load_var(model, state | {"pos_1LC": torch.zeros(1, 31, 16)})
    with pytest.raises(CheckpointError, match="6 missing: .*5 unknown: shared_ada_lin.1.weight"):
        load_var(model, random_state(VAR(CONFIGS[1])))
    with pytest.raises(CheckpointError, match=r"lack blocks\.0\.attn\.scale_mul_1H11"):
        infer_var_config({key: tensor for key, tensor in state.items() if "scale_mul" not in key}, GRIDS)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("mark", "whose"),
    [
        ("cfg_uncond", "an Infinity transformer"),
        ("crop_embed.weight", "a Switti transformer"),
        ("quantize.embedding.weight", "a VQ autoencoder"),
    ],
)
def test_other_families_are_refused_by_name(mark: str, whose: str) -> None:
    with pytest.raises(CheckpointError, match=f"those of {whose}.*expected a VAR transformer"):
        infer_var_config({mark: torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="those of a VAR transformer.*expected a VQ autoencoder"):
        infer_vq_config({"class_emb.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("nest", ["", "trainer.vae_local.", "vae_local.", "vae."])
def test_autoencoder_loads_and_tells_its_shape(nest: str) -> None:
    state = random_state(Autoencoder(VQ_CONFIG))
    found = nested(state | {"quantize.ema_vocab_hit_SV": torch.zeros(10, 12)}, nest)
    if nest.endswith("vae_local."):
        found |= nested(random_state(VAR(CONFIGS[0])), nest.replace("vae_local", "var_wo_ddp"))
    assert infer_vq_config(found) == VQ_CONFIG
    model = Autoencoder(VQ_CONFIG)
    load_vq(model, found)
    assert_same(model.state_dict(), state)


def test_adversary_is_dropped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    state = random_state(Autoencoder(VQ_CONFIG))
    model = Autoencoder(VQ_CONFIG)
    with caplog.at_level(logging.WARNING, logger="foveate"):
        load_vq(model, state | {"disc.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(1)})
    assert_same(model.state_dict(), state)
    assert "not loaded: disc.main.0.weight, loss.logvar" in caplog.text
    with pytest.raises(CheckpointError, match="1 missing: post_quant_conv.bias; 1 unknown: more"):
        load_vq(model, {k: t for k, t in state.items() if k != "post_quant_conv.bias"} | {"more": torch.zeros(1)})


def test_published_autoencoder_has_the_published_number_of_weights() -> None:
    """108.9 million, of which 64.7 million decode."""
    with torch.device("meta"):
        model = Autoencoder(VQ_F16)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.decoder)]
    assert [round(count, 1) for count in millions] == [108.9, 64.7]
    assert model.config.stride == 16


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (VARConfig(depth=16, width=1024, heads=16), 310.3),
        (VARConfig(depth=30, width=1920, heads=30), 2010.0),
        (VARConfig(depth=36, width=2304, heads=36, grids=GRIDS_512, shared_aln=True), 2353.9),
    ],
    ids=["d16", "d30", "d36-s"],
)
def test_published_transformers_have_the_published_number_of_weights(config: VARConfig, millions: float) -> None:
    with torch.device("meta"):
        model = VAR(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
