"""A profile: how long this machine takes for a model, measured by `foveate bench calibrate` and read by calls.

The time of a scale is a sum of what it has: a constant, the blocks that run, tokens times blocks, FLOPs, and what only
the first scale does. Each factor is zero or more and fitted by least squares over scales of several policies, relative
to their time. Prediction of a machine for a model: other weights, dtype, threads or processor need their own profile.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.core.atomic import write_text
from foveate.core.cost import ModelShape, Row, ScaleWork, scale_flops
from foveate.core.errors import FoveateError
from foveate.families.loading import LoadedModel
from foveate.pipeline.output import describe_kernels, describe_precision, processor_name

FEATURES = ("scales", "blocks", "thousand_token_blocks", "gflops", "first_scale")
"""What a scale's time is made of, in this order."""


def features_of(scale: int, *, blocks: float, token_blocks: float, flops: float) -> list[float]:
    """The features of one scale; zeros where no block runs."""
    if not blocks:
        return [0.0] * len(FEATURES)
    return [1.0, blocks, token_blocks / 1e3, flops / 1e9, float(scale == 0)]


def features(work: Sequence[ScaleWork], shape: ModelShape, text_tokens: Mapping[Row, int]) -> list[list[float]]:
    """The features of every scale, all rows together."""
    return [
        features_of(
            scale.scale,
            blocks=float(scale.blocks_run),
            token_blocks=float(scale.token_blocks),
            flops=float(flops),
        )
        for scale, flops in zip(work, scale_flops(work, shape, text_tokens), strict=True)
    ]


def fit(points: Sequence[Sequence[float]], ms: Sequence[float]) -> tuple[float, ...]:
    """Milliseconds per feature, zero or more: of all choices of features the one with the least squared relative error.

    Args:
        points: Features of scales that ran.
        ms: What they took.
    """
    taken = np.asarray(ms, dtype=np.float64)
    rows = np.asarray(points, dtype=np.float64) / taken[:, None]
    best, least = np.zeros(len(FEATURES)), np.inf
    for size in range(1, len(FEATURES) + 1):
        for some in combinations(range(len(FEATURES)), size):
            factors = np.zeros(len(FEATURES))
            factors[list(some)] = np.linalg.lstsq(rows[:, some], np.ones(len(taken)), rcond=None)[0]
            error = float(np.square(rows @ factors - 1).sum())
            if (factors >= 0).all() and error < least:
                best, least = factors, error
    return tuple(best.tolist())


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What a machine takes for a model.

    `ms` belongs to `FEATURES`. `decoder_ms` holds what images of some pixels took to decode, `rest_ms` what a call
    takes beside its parts, and `headroom` how much longer than predicted nine of ten runs of a policy take at most, as
    a factor.
    """

    ms: tuple[float, ...]
    decoder_ms: tuple[tuple[int, float], ...]
    rest_ms: float
    headroom: float

    def scale_ms(self, work: Sequence[ScaleWork], shape: ModelShape, text_tokens: Mapping[Row, int]) -> list[float]:
        """Milliseconds of every scale, with headroom."""
        rows = features(work, shape, text_tokens)
        return [self.headroom * sum(a * b for a, b in zip(self.ms, row, strict=True)) for row in rows]

    def after_ms(self, pixels: int, num_images: int) -> float:
        """Milliseconds behind the last scale: decoding, as the nearest measured size did, and the rest of a call."""
        measured, ms = min(self.decoder_ms, key=lambda entry: abs(entry[0] - pixels))
        return self.headroom * (num_images * ms * pixels / measured + self.rest_ms)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {
            "ms": dict(zip(FEATURES, self.ms, strict=True)),
            "decoder_ms": [list(entry) for entry in self.decoder_ms],
            "rest_ms": self.rest_ms,
            "headroom": self.headroom,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Profile":
        """Reads what `to_json` wrote."""
        return cls(
            ms=tuple(float(data["ms"][name]) for name in FEATURES),
            decoder_ms=tuple((int(pixels), float(ms)) for pixels, ms in data["decoder_ms"]),
            rest_ms=float(data["rest_ms"]),
            headroom=float(data["headroom"]),
        )


def identity(model: LoadedModel) -> dict[str, Any]:
    """What a profile belongs to: the model by name and hash, what it computes in, and the machine."""
    return {
        "model": model.spec.name,
        "sha256": model.sha256,
        **describe_precision(model.precision),
        "device": model.device.type,
        "machine": processor_name(model.device),
        "threads": torch.get_num_threads(),
        "kernels": describe_kernels(model.device).partition(" ")[0],
    }


def _command(model: LoadedModel) -> str:
    """What measures the profile that is missing."""
    known = identity(model)
    flags = {"model": model.spec.name, "threads": known["threads"]}
    flags |= {"weights": model.weights} if model.weights != "pretrained" else {}
    flags |= {"device": known["device"]} if known["device"] != "cpu" else {}
    flags |= {"dtype": known["dtype"]} if known["dtype"] != "float32" else {}
    flags |= {name: known[name] for name in ("decoder_dtype", "quantization") if known[name] is not None}
    return "foveate bench calibrate " + " ".join(f"--{name.replace('_', '-')} {flags[name]}" for name in flags)


def profile_path(model: LoadedModel) -> Path:
    """Where the profile of a model on this machine lies: in $FOVEATE_PROFILES, or in the user's cache."""
    given = os.environ.get("FOVEATE_PROFILES")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(given) if given else cache / "foveate" / "profiles"
    digest = hashlib.sha256(json.dumps(identity(model), sort_keys=True).encode()).hexdigest()
    return folder / f"{model.spec.name}-{digest[:12]}.json"


def store_profile(data: Mapping[str, Any], model: LoadedModel) -> Path:
    """Writes the data of a calibration where calls look for it; returns the path."""
    path = profile_path(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**data, "identity": identity(model)}, indent=1) + "\n")
    return path


def load_profile(model: LoadedModel) -> Profile:
    """The profile of a model on this machine.

    Raises:
        FoveateError: There is none, or it is damaged.
    """
    path, remedy = profile_path(model), _command(model)
    try:
        return Profile.from_json(json.loads(path.read_text(encoding="utf-8"))["fit"])
    except FileNotFoundError:
        raise FoveateError(
            f"latency_budget_ms needs a profile of {model.spec.name} on this machine, in this dtype and with as many "
            f"threads, and there is none; run {remedy}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FoveateError(f"cannot read the profile {path} ({error!r}); measure it again: {remedy}") from None
