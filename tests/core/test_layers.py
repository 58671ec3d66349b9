"""Networks are built without random numbers, are empty where weights will come, and start training as torch does."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from foveate.conditioning.minilm import MiniLM, MiniLMConfig
from foveate.conditioning.places import Places, PlacesConfig
from foveate.core import layers
from foveate.core.layers import empty_module, init_weights
from foveate.models.hart import HART, HARTConfig
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.models.switti import Switti, SwittiConfig
from foveate.models.var import VAR, VARConfig
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig

WIDTH = 64
GRIDS = ((1, 1), (2, 2))
VAR_SHAPE = partial(
    VARConfig, depth=2, width=WIDTH, heads=4, num_classes=300, codebook_size=48, latent_channels=8, grids=GRIDS
)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "infinity": lambda: Infinity(
        InfinityConfig(depth=2, width=WIDTH, heads=4, bits=8, text_width=48, pool_heads=4, text_tokens=32)
    ),
    "var": lambda: VAR(VAR_SHAPE()),
    "var, shared": lambda: VAR(VAR_SHAPE(shared_aln=True)),
    "switti": lambda: Switti(
        SwittiConfig(depth=2, width=WIDTH, heads=4, codebook_size=48, latent_channels=8, num_levels=3, use_ar=True)
    ),
    "hart": lambda: HART(
        HARTConfig(depth=2, width=WIDTH, heads=4, codebook_size=48, latent_channels=8, text_width=48, diff_width=32)
    ),
    "autoencoder": lambda: Autoencoder(
        AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1)
    ),
    "vq autoencoder": lambda: Autoencoder(
        AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 2), codebook_size=48)
    ),
    "text encoder": lambda: MiniLM(
        MiniLMConfig(vocab_size=64, max_positions=64, width=24, num_heads=3, num_blocks=2, hidden_width=48)
    ),
    "places": lambda: Places(PlacesConfig(text_width=24)),
}
ZERO_AT_THE_START = (
    "q_bias",
    "v_bias",
    "in_ln.bias",
    "norm.bias",
    "norm1.bias",
    "norm2.bias",
    "norm_out.bias",
    "LayerNorm.bias",
)
ZERO_AT_THE_START += ("crop_cond_scales", "direction_AE")
STANDARD_DEVIATIONS = {
    "class_emb.weight": 1.0,
    "word_embeddings.weight": 1.0,
    "cfg_uncond": 48**-0.5,
    "pos_start": (3 * WIDTH) ** -0.5,
    "pos_1LC": (3 * WIDTH) ** -0.5,
    "mat_q": (3 * WIDTH) ** -0.5,
    "ada_gss": WIDTH**-0.5,
    "ffn.fc1.weight": (3 * WIDTH) ** -0.5,
    "decoder.conv_out.weight": (3 * 9 * 32) ** -0.5,
}
"""By the end of a name; matrices and convolutions are uniform over +-1 / sqrt(fan-in)."""


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_building_draws_no_random_numbers(build: Callable[[], nn.Module]) -> None:
    before = torch.get_rng_state()
    network = build()
    assert torch.equal(torch.get_rng_state(), before)
    random = [name for name, parameter in network.named_parameters() if parameter.unique().numel() > 1]
    assert random == []


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_initialising_draws_every_weight_that_is_no_constant(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    network = build()
    init_weights(network)
    parameters = dict(network.named_parameters())
    constant = [name for name, parameter in parameters.items() if parameter.unique().numel() == 1]
    zero = [name for name in constant if not parameters[name].any()]
    assert all(name.endswith(ZERO_AT_THE_START) for name in zero), zero
    # The others are the weights of norms, and head temperatures.
    others = [name for name in constant if name not in zero and not name.endswith("scale_mul_1H11")]
    norms = ("norm", "ln_wo_grad", "in_ln")
    assert all(any(n in name.lower() for n in norms) and (parameters[name] == 1).all() for name in others), others
    first = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    torch.manual_seed(1)
    init_weights(network)
    assert all(torch.equal(parameter, first[name]) for name, parameter in parameters.items())


def test_random_starts_are_as_wide_as_documented() -> None:
    torch.manual_seed(2)
    networks = [build() for build in NETWORKS.values()]
    found: set[str] = set()
    for network in networks:
        init_weights(network)
        for name, parameter in network.named_parameters():
            for end, wanted in STANDARD_DEVIATIONS.items():
                if name.endswith(end):
                    assert float(parameter.detach().std() / wanted) == pytest.approx(1, abs=0.25), name
                    found.add(end)
    assert found == set(STANDARD_DEVIATIONS)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (partial(layers.Linear, 5, 7), partial(nn.Linear, 5, 7)),
        (partial(layers.Linear, 5, 7, bias=False), partial(nn.Linear, 5, 7, bias=False)),
        (partial(layers.Conv2d, 3, 4, 3, padding=1), partial(nn.Conv2d, 3, 4, 3, padding=1)),
        (partial(layers.Embedding, 9, 4), partial(nn.Embedding, 9, 4)),
    ],
    ids=["linear", "linear without bias", "convolution", "embedding"],
)
def test_layers_start_with_the_bits_of_torch(ours: Callable[[], nn.Module], torchs: Callable[[], nn.Module]) -> None:
    layer = ours()
    torch.manual_seed(3)
    init_weights(layer)
    torch.manual_seed(3)
    wanted = torchs().state_dict()
    found = layer.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_empty_modules_have_the_shapes_and_constants_of_built_ones(build: Callable[[], nn.Module]) -> None:
    before, built = torch.get_rng_state(), build()
    module = empty_module(build, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert not module.training
    own, wanted = dict(module.named_parameters()), dict(built.named_parameters())
    assert own.keys() == wanted.keys()
    for name, parameter in own.items():
        assert (parameter.shape, parameter.dtype, parameter.device.type) == (wanted[name].shape, torch.bfloat16, "cpu")
        assert not parameter.requires_grad
        assert parameter.is_contiguous()
    buffers = dict(module.named_buffers())
    assert buffers.keys() == dict(built.named_buffers()).keys()
    assert all(buffer.device.type == "cpu" and not buffer.any() for buffer in buffers.values())
    assert module.state_dict().keys() == built.state_dict().keys()
