"""Weights under the names of a training: wrappers at any depth, containers in front, averages and optimisers beside."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import CheckpointError
from foveate.families.convert import convert
from foveate.families.loading import Origin, find_spec
from foveate.models.infinity import Infinity
from foveate.models.switti import Switti
from foveate.models.var import VAR
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.weights.files import read_weights
from foveate.weights.infinity import infer_infinity_config, load_autoencoder, load_transformer
from foveate.weights.names import kind_within, plain_names
from foveate.weights.switti import infer_switti_config, load_switti
from foveate.weights.var import infer_var_config, load_var
from foveate.weights.vq import load_vq
from tests.models.test_checkpoint import AE_CONFIG, CONFIG, assert_same, random_state
from tests.models.test_checkpoint_var import CONFIGS, GRIDS, VQ_CONFIG
from tests.models.test_switti import CONFIG as SWITTI

State = dict[str, Tensor]

KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[..., None]]] = {
    "Infinity": (lambda: Infinity(CONFIG), load_transformer),
    "autoencoder": (lambda: Autoencoder(AE_CONFIG), load_autoencoder),
    "VAR": (lambda: VAR(CONFIGS[0]), load_var),
    "VQ": (lambda: Autoencoder(VQ_CONFIG), load_vq),
    "Switti": (lambda: Switti(SWITTI), load_switti),
}

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")


def everywhere(*wrappers: str) -> Callable[[str], str]:
    """Wrappers around every module, the weights' own ones among them."""

    def rename(key: str) -> str:
        *parts, leaf = key.split(".")
        return ".".join([*wrappers, *(name for part in parts for name in (part, *wrappers)), leaf])

    return rename


def in_blocks(*wrappers: str) -> Callable[[str], str]:
    """Wrappers around each block, or around the feed-forward or the convolutions where there are none."""

    def rename(key: str) -> str:
        parts = key.split(".")
        if parts[0] == "block_chunks":
            return ".".join((*parts[:4], *wrappers, *parts[4:]))
        return ".".join((*parts[:2], *wrappers, *parts[2:]))

    return rename


RENAMINGS = {
    **{name: everywhere(name) for name in WRAPPERS},
    **{f"{name} in blocks": in_blocks(name) for name in WRAPPERS},
    "several": everywhere("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    "in front": lambda key: f"module._orig_mod.{key}",
    "model": lambda key: f"model.{key}",
    "state_dict": lambda key: f"state_dict.{key}",
    "lightning": lambda key: f"state_dict.model._orig_mod.{in_blocks('_checkpoint_wrapped_module')(key)}",
    "parallel": lambda key: f"model_state_dict.module.{key}",
}


def renamed(state: State, rename: Callable[[str], str]) -> State:
    return {rename(key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renaming", RENAMINGS)
def test_every_kind_loads_below_wrappers_and_containers(kind: str, renaming: str) -> None:
    build, load = KINDS[kind]
    model = build()
    state = random_state(model)
    found = renamed(state, RENAMINGS[renaming])
    assert found.keys() != state.keys()
    assert kind_within(found) == kind
    load(model, found)
    assert_same(model.state_dict(), state)


def test_shapes_are_told_whatever_is_around() -> None:
    rename = RENAMINGS["several"]
    for nest in ("", "model.", "trainer.gpt_fsdp."):
        names = renamed(random_state(Infinity(CONFIG)), lambda key, nest=nest: nest + rename(key))
        assert infer_infinity_config(names) == CONFIG
    assert infer_var_config(renamed(random_state(VAR(CONFIGS[1])), rename), GRIDS) == CONFIGS[1]
    switti = infer_switti_config(renamed(random_state(Switti(SWITTI)), rename), use_ar=SWITTI.use_ar, heads=4)
    assert switti == replace(SWITTI, ff_width=SWITTI.hidden)


def test_a_plain_state_stays_what_it_is() -> None:
    for kind, (build, _) in KINDS.items():
        state = random_state(build())
        assert plain_names(state, kind) is state


def test_optimisers_averages_and_counts_are_left(tmp_path: Path) -> None:
    model = VAR(CONFIGS[0])
    state = random_state(model)
    average = {f"module.{key}": tensor + 1 for key, tensor in state.items()}
    optimiser = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}}}
    saved = {"ema": average | {"n_averaged": torch.tensor(7)}, "epoch": 3, "optimizer": optimiser}
    torch.save(saved | {"model": {f"_orig_mod.{key}": tensor for key, tensor in state.items()}}, tmp_path / "run.pth")
    load_var(model, read_weights(tmp_path / "run.pth"))
    assert_same(model.state_dict(), state)
    # Where the average is alone, it is taken.
    torch.save(saved, tmp_path / "average.pth")
    load_var(model, read_weights(tmp_path / "average.pth"))
    assert_same(model.state_dict(), {key: tensor + 1 for key, tensor in state.items()})


def test_two_networks_in_one_file_are_told_apart() -> None:
    transformer, autoencoder = VAR(CONFIGS[0]), Autoencoder(VQ_CONFIG)
    states = random_state(transformer), random_state(autoencoder)
    both = {f"model.var.{key}": tensor for key, tensor in states[0].items()}
    both |= {f"model.vae.module.{key}": tensor for key, tensor in states[1].items()}
    load_var(transformer, both)
    load_vq(autoencoder, both)
    assert_same(transformer.state_dict(), states[0])
    assert_same(autoencoder.state_dict(), states[1])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("head.weight", "module.head.weight"),
        ("blocks.1._orig_mod.ffn.fc1.bias", "blocks.1.ffn._fsdp_wrapped_module.fc1.bias"),
    ],
)
def test_names_that_become_one_are_both_said(first: str, second: str) -> None:
    state = random_state(VAR(CONFIGS[0]))
    twice = state | {first: torch.zeros(1), second: torch.zeros(1)}
    plain = ".".join(part for part in first.split(".") if part not in WRAPPERS)
    if plain != first:
        del twice[plain]
    with pytest.raises(CheckpointError, match=f"hold {plain} twice, as {first} and as {second}; keep one"):
        load_var(VAR(CONFIGS[0]), twice)


def test_two_containers_of_one_kind_are_refused() -> None:
    state = random_state(VAR(CONFIGS[0]))
    twice = {f"{nest}{key}": tensor for nest in ("model.", "net.") for key, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"twice, below `model` and `net`; save one of them alone"):
        load_var(VAR(CONFIGS[0]), twice)
    with pytest.raises(CheckpointError, match=r"twice, below `model` and the top"):
        load_var(VAR(CONFIGS[0]), {f"model.{key}": tensor for key, tensor in state.items()} | state)


def test_what_is_missing_below_a_container_is_named_without_it() -> None:
    state = {f"model.module.{key}": tensor for key, tensor in random_state(VAR(CONFIGS[0])).items()}
    del state["model.module.class_emb.weight"]
    state["optimizer.0"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"keys 1 missing: class_emb\.weight$"):
        load_var(VAR(CONFIGS[0]), state)


def test_an_unknown_kind_shows_three_keys(tmp_path: Path) -> None:
    path = tmp_path / "what.pth"
    torch.save({"net": {name: torch.zeros(1) for name in "dcba"}}, path)
    shown = r"what\.pth: .*known.*; the file holds net\.a, net\.b, net\.c, \.\.\. \(4\)$"
    with pytest.raises(CheckpointError, match=shown):
        find_spec(Origin(name_or_path=path))
    with pytest.raises(CheckpointError, match=shown):
        convert(path, tmp_path / "out.safetensors")
    assert [found.name for found in tmp_path.iterdir()] == ["what.pth"]
