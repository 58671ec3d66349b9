"""What loading takes at its peak, measured in a process of its own: at most a tenth more than the loaded weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate.models.var import GRIDS_256, VAR, VARConfig
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.weights.files import save_sharded

# 51 million parameters: 205 MB in the file, 103 MB in bfloat16; the largest tensor is 3 % of the loaded weights.
SHAPE = VARConfig(depth=12, width=480, heads=8, codebook_size=64, latent_channels=8, grids=GRIDS_256, ff_width=1920)
TOY = VARConfig(depth=1, width=64, heads=4, codebook_size=64, latent_channels=8, grids=GRIDS_256)
VQ = AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), num_res_blocks=1,
                       codebook_size=64)  # fmt: skip

# Loads toys first, so that code and libraries are resident before anything is measured.
MEASURE = """
import ctypes, gc, json, sys, threading, time
from pathlib import Path
import torch
from foveate.families.loading import Origin, Precision, load_model

def status(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))

def load(path, dtype):
    origin = Origin(name_or_path=Path(path))
    precision = Precision(dtype=getattr(torch, dtype))
    return load_model(origin, weights="pretrained", precision=precision, device=torch.device("cpu"))

def measure(path, dtype):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    anonymous, total, seen, stop = status("RssAnon"), status("VmHWM"), [0], threading.Event()
    def watch():
        while not stop.is_set():
            seen[0] = max(seen[0], status("RssAnon"))
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    model = load(path, dtype)
    stop.set()
    thread.join()
    modules = (model.transformer, model.tokenizer.autoencoder)
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    return {"weights": weights, "anonymous": seen[0] - anonymous, "total": status("VmHWM") - total}

toys, cases = json.loads(sys.argv[1])
for toy in toys:
    load(toy, "bfloat16")
print(json.dumps([measure(*case) for case in cases]))
"""


def drawn(module: torch.nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(value.shape, generator=generator) for key, value in module.state_dict().items()}


def as_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    (path,) = save_sharded(state, folder, "var", max_bytes=2**40)
    return path


def as_shards(state: dict[str, Tensor], folder: Path) -> Path:
    return save_sharded(state, folder / "shards", "var", max_bytes=60 * 2**20)[-1]


def as_pickle(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"epoch": 1, "trainer": {"var_wo_ddp": state, "optimiser": {"step": 1}}}, folder / "tuned.pth")
    return folder / "tuned.pth"


def as_pickled_shards(state: dict[str, Tensor], folder: Path) -> Path:
    folder = folder / "pickled"
    folder.mkdir()
    names = {key: f"{i * 3 // len(state)}.bin" for i, key in enumerate(state)}
    for name in set(names.values()):
        torch.save({key: value for key, value in state.items() if names[key] == name}, folder / name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return index


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's account of a process's memory")
def test_loading_takes_a_tenth_more_than_the_weights(tmp_path: Path) -> None:
    for name in ("toy", "large"):
        (tmp_path / name).mkdir()
        torch.save(drawn(Autoencoder(VQ)), tmp_path / name / "vae.pth")
    toys = [write(drawn(VAR(TOY)), tmp_path / "toy") for write in (as_safetensors, as_pickle)]
    state = drawn(VAR(SHAPE))
    writers = (as_safetensors, as_shards, as_pickle, as_pickled_shards)
    cases = [(str(write(state, tmp_path / "large")), "bfloat16") for write in writers]
    cases.append((cases[0][0], "float32"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([[str(toy) for toy in toys], cases])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for case, found in zip(cases, json.loads(done.stdout), strict=True):
        assert found["weights"] > 100e6
        assert found["anonymous"] <= found["total"] + 2**20
        assert 0.9 < found["total"] / found["weights"] <= 1.1, (case, found)
        assert found["anonymous"] / found["weights"] <= 1.1, (case, found)
