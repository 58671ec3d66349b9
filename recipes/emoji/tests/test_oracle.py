"""The oracle against the engine on forced codes, and its rules, fills and table on toys."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.layers import init_weights
from foveate.core.policy import Policy
from foveate.core.schedule import ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, ForcedSampler
from foveate.engine.state import Request
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.policies.ld_pruning import LDPruning
from foveate.policies.skip_scales import SkipScales
from foveate.tokenizers.autoencoder import AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer, codes_to_bits
from recipes.emoji.__main__ import main
from recipes.emoji.oracle import RULES, Choice, Oracle, Seen, filled, keep
from recipes.emoji.tests.toy_corpus import write_corpus
from recipes.emoji.tokenizer import new_autoencoder

GRIDS = ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8))
SHAPE = AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, patch=4)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    torch.manual_seed(5)
    return Oracle(new_autoencoder(SHAPE).eval(), GRIDS, torch.rand(3, 3, 64, 64) * 2 - 1)


def by_engine(oracle: Oracle, policy: Policy) -> np.ndarray:
    """What a policy makes of the same codes, through the engine."""
    schedule = ScaleSchedule.from_grids(GRIDS)
    shape = InfinityConfig(depth=1, width=32, heads=2, bits=8, text_width=12, pool_heads=2, text_tokens=8, ff_width=64)
    model = Infinity(shape)
    init_weights(model)
    count = len(oracle.full)
    symbols = tuple(codes_to_bits(codes).flatten(1, 2).long() for codes in oracle.codes)
    request = Request(
        schedule=schedule,
        guidance=GuidanceSchedule(weights=(1.0,) * len(schedule)),
        temperatures=(1.0,) * len(schedule),
        filters=(Filter(top_k=1, top_p=0.0),) * len(schedule),
        sampler=ForcedSampler(symbols=symbols),
        conditions=tuple(torch.randn(4, 12) for _ in range(count)),
        num_images=count,
    )
    engine = Engine(model.eval(), BSQTokenizer(oracle.autoencoder))
    *_, last = engine.run(policy.bind(schedule, model.shape), request)
    return oracle.decode(last.f_hat_BZHW)


@pytest.mark.parametrize(
    ("choice", "policy"),
    [
        ("mass:0.6,0.6:previous", LDPruning(energy_share=0.6, lhep_scales=2, sats=False)),
        ("mass:0.4,0.4,0.4:zero", LDPruning(energy_share=0.4, lhep_scales=3, sats=False, fill="zero")),
        ("mass:0.5,0:zero", LDPruning(energy_share=0.5, lhep_scales=2, sats=False, fill="zero", skip_last=1)),
        ("random:0,0:nearest", SkipScales(count=2)),
    ],
)
def test_the_oracle_is_the_engine_with_true_codes(oracle: Oracle, choice: str, policy: Policy) -> None:
    images = oracle.run(Choice.parse(choice)).images
    assert (images != oracle.full).any()
    np.testing.assert_array_equal(images, by_engine(oracle, policy))


def test_all_tokens_give_the_full_reconstruction(oracle: Oracle) -> None:
    for rule in RULES:
        outcome = oracle.run(Choice(rule=rule, shares=(1.0, 1.0), fill="zero"))
        assert (outcome.kept, outcome.kept_of_all) == (1.0, 1.0)
        np.testing.assert_array_equal(outcome.images, oracle.full)


def test_shares_are_counted(oracle: Oracle) -> None:
    outcome = oracle.run(Choice(rule="energy", shares=(0.5, 0.25), fill="zero"))
    assert outcome.kept == pytest.approx((18 + 16) / 100)
    assert outcome.kept_of_all == pytest.approx((1 + 4 + 16 + 18 + 16) / (1 + 4 + 16 + 36 + 64))


def seen(grid: tuple[int, int]) -> Seen:
    return Seen(f_hat_BZHW=torch.randn(2, 4, 8, 8), residual_BZhw=torch.randn(2, 4, 6, 6), grid=grid, scale=3)


def test_rules_keep_what_they_say() -> None:
    kept = keep("checkerboard", 0.5, seen((4, 4))).unflatten(1, (4, 4))
    assert kept[0].tolist() == [[(y + x) % 2 == 0 for x in range(4)] for y in range(4)]
    lattice = keep("energy-lattice", 0.3, seen((6, 6))).unflatten(1, (6, 6))
    assert lattice[:, ::3, ::3].all()
    assert lattice.sum((1, 2)).tolist() == [math.ceil(0.3 * 36)] * 2
    # One latent stands out: the energy of its patch is smoothed over the patches around it, and is nowhere else.
    flat = Seen(f_hat_BZHW=torch.zeros(1, 1, 8, 8), residual_BZhw=torch.zeros(1, 1, 8, 8), grid=(8, 8), scale=3)
    flat.f_hat_BZHW[..., 3, 3] = 1.0
    top = keep("energy", 0.05, flat).unflatten(1, (8, 8))[0].nonzero()
    assert (top <= 5).all()

    assert torch.equal(keep("residual", 0.1, flat), torch.arange(64)[None] < 7), "no energy: ties go by index"


def test_nearest_fill_against_a_loop() -> None:
    codes, previous = torch.randn(1, 2, 4, 5), torch.randn(1, 2, 2, 2)
    keep_Bl = torch.rand(1, 20, generator=torch.Generator().manual_seed(1)) < 0.3
    places = [divmod(int(index), 5) for index in keep_Bl[0].nonzero()]
    wanted = torch.empty_like(codes)
    for y in range(4):
        for x in range(5):
            near = min(places, key=lambda place: (place[0] - y) ** 2 + (place[1] - x) ** 2)
            wanted[0, :, y, x] = codes[0, :, near[0], near[1]]
    assert torch.equal(filled(codes, keep_Bl, previous, "nearest", 0.3), wanted)
    half = torch.where(keep_Bl.view(1, 1, 4, 5), codes, wanted / 2)
    assert torch.equal(filled(codes, keep_Bl, previous, "half-nearest", 0.3), half)


@pytest.mark.parametrize(
    "text", ["energy", "energy:0.5", "energy:a:zero", "energi:0.5:zero", "energy:0.5:none", "energy:2:zero"]
)
def test_what_is_no_choice_is_refused(text: str) -> None:
    with pytest.raises(FoveateError, match=r"RULE:SHARE|no rule|no fill|shares must be in"):
        Choice.parse(text)
    assert str(Choice.parse("energy:0.5,0:half-nearest")) == "energy:0.5,0:half-nearest"


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "corpus", 256)
    save_file(weights(), tmp_path / "t.safetensors")
    command = ["oracle", str(tmp_path / "corpus"), "--tokenizer", str(tmp_path / "t.safetensors"), "--drawings", "2"]
    assert main([*command, "--choice", "energy:0.5:zero", "--choice", "mass:0.5,0.5:nearest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| energy:0.5:zero", "| mass:0.5,0.5:nearest"]
    assert lines[2].split(" | ")[1:3] == ["0.50", "0.80"]
    assert main([*command, "--budget", "0.06M"]) == 2
    assert "must have images of 128 x 128 pixels, got 256 x 256" in capsys.readouterr().err


def weights() -> dict[str, Tensor]:
    return new_autoencoder(SHAPE).state_dict()
