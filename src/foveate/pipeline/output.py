"""The output of a pipeline: images, seeds, the configuration that makes them again, and what it cost.

Axes: B images, Y pixel rows, X columns.
"""

import functools
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from typing_extensions import TypeVar

from foveate.core.policy import Policy
from foveate.core.trace import ScaleTrace, Trace
from foveate.core.version import __version__
from foveate.core.warnings import CallWarning
from foveate.engine.report import WITHOUT_EFFECT, Report, without_effect
from foveate.families.loading import LoadedModel, Precision
from foveate.kernels import native
from foveate.pipeline.call import Job

Images = list[Image.Image] | np.ndarray | Tensor
"""As `output_type` asked."""

ImagesT_co = TypeVar("ImagesT_co", covariant=True, default=Images)
"""The one of them that a call with a known `output_type` returns."""

ImageT_co = TypeVar("ImageT_co", covariant=True)


class _Several(Protocol[ImageT_co]):
    """Images of any form: one of them is one entry."""

    def __getitem__(self, index: int, /) -> ImageT_co: ...


_OF_CALLS = ("format", "prompts", "negative_prompts", "num_images_per_prompt", "seeds")
"""What a call's configuration holds of all its images, and that of one image does not."""

_LONGEST_QUOTE = 40
"""Characters of a prompt that a message repeats."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PipelineOutput(Generic[ImagesT_co]):
    """The images of a call; `prompts` and `seeds` have one entry per image."""

    images: ImagesT_co
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    config: dict[str, Any]
    report: Report
    trace: Trace

    def row_config(self, row: int, *, store_batch: bool = False) -> dict[str, Any]:
        """The configuration that belongs into the file of one image, format 2: its own row, and no other one.

        Where its bits depend on its batch, also the batch's size and its place; with `store_batch` all rows of it.
        """
        index, call = range(len(self.prompts))[row], self.config
        negatives, per_prompt = call["negative_prompts"], call["num_images_per_prompt"]
        own = {
            "prompt": self.prompts[index],
            "negative_prompt": None if negatives is None else negatives[index // per_prompt],
            "seed": self.seeds[index] if self.seeds else None,
        }
        found: dict[str, Any] = {"format": 2}
        for name, value in call.items():
            if name == "prompts":
                found |= own
            elif name not in _OF_CALLS:
                found[name] = value
        batch: dict[str, Any] = {"size": len(self.prompts), "index": index}
        if store_batch:
            repeated = None if negatives is None else [text for text in negatives for _ in range(per_prompt)]
            batch |= {"prompts": list(self.prompts), "negative_prompts": repeated, "seeds": list(self.seeds)}
        if store_batch or not call["batch_invariant"]:
            found["batch"] = batch
        warnings = self._warnings_of(index)
        if warnings:
            found["warnings"] = [warning.to_json() for warning in warnings]
        return found

    def _warnings_of(self, image: int) -> list[CallWarning]:
        """What was warned of an image; what had no effect on it is known for itself where it ran as its own request."""
        found = [warning for warning in self.report.warnings if _may_say(warning, self.prompts[image])]
        if not self.trace.unfired_by_image:
            return found
        own = without_effect(self.config["policy"]["spec"], self.trace.unfired_by_image[image])
        return [*(warning for warning in found if warning.code != WITHOUT_EFFECT), *own]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScaleEvent(Generic[ImagesT_co]):
    """One finished scale of a stream.

    `tokens_run` and `tokens_full` count tokens of this scale over all images. `images` are decoded previews, None
    where no preview was asked for; `output` comes with the last scale.
    """

    scale: int
    grid: tuple[int, int]
    tokens_run: int
    tokens_full: int
    ms: float
    images: ImagesT_co | None = None
    output: PipelineOutput[ImagesT_co] | None = field(default=None, repr=False)

    @property
    def image(self: "ScaleEvent[_Several[ImageT_co]]") -> ImageT_co | None:
        """The first preview, or None."""
        return None if self.images is None else self.images[0]


def to_uint8(pixels_B3YX: Float[Tensor, "B 3 Y X"]) -> UInt8[np.ndarray, "B Y X 3"]:
    """Pixels in [-1, 1] to bytes; truncated, as the published code does."""
    scaled_B3YX = ((pixels_B3YX.float().clamp(-1, 1) + 1) / 2).mul(255).to(torch.uint8)
    return scaled_B3YX.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_images(pixels_B3YX: Float[Tensor, "B 3 Y X"], output_type: str) -> Images:
    """Pixels in [-1, 1] in the form that was asked for."""
    if output_type == "pt":
        return (pixels_B3YX.float().clamp(-1, 1) + 1) / 2
    array = to_uint8(pixels_B3YX)
    return array if output_type == "np" else [Image.fromarray(picture) for picture in array]


def tokens_run(scale: ScaleTrace) -> int:
    """Tokens of the conditional branch that reached the head, over all images."""
    return sum(row.head_tokens for (_, is_cond), row in scale.work.rows.items() if is_cond)


def merge_traces(traces: Sequence[Trace]) -> Trace:
    """One trace of requests that ran one image each, as if it had been a batch; the parts are left as they were."""
    if len(traces) == 1:
        return traces[0]
    merged = Trace(
        shape=traces[0].shape,
        text_tokens={(i, c): n for i, t in enumerate(traces) for (_, c), n in t.text_tokens.items()},
        bytes_per_element=traces[0].bytes_per_element,
        peak_kv_bytes=sum(t.peak_kv_bytes for t in traces),
        peak_cache_bytes=sum(t.peak_cache_bytes for t in traces),
        unfired=tuple(name for name in traces[0].unfired if all(name in t.unfired for t in traces)),
        unfired_by_image=tuple(t.unfired for t in traces),
        stopped=frozenset(i for i, trace in enumerate(traces) if trace.stopped),
    )
    merged.scales = [_merge_scale([t.scales[s] for t in traces]) for s in range(len(traces[0].scales))]
    return merged


def _merge_scale(parts: Sequence[ScaleTrace]) -> ScaleTrace:
    rows = {(i, c): work for i, part in enumerate(parts) for (_, c), work in part.work.rows.items()}
    grid_tokens = max(part.work.grid_tokens for part in parts)
    keeps = [part.keep_Bl for part in parts if part.keep_Bl is not None]
    depths = [part.depth_Bl for part in parts if part.depth_Bl is not None]
    return replace(
        parts[0],
        ran=any(part.ran for part in parts),
        work=replace(parts[0].work, grid_tokens=grid_tokens, rows=rows),
        ms=sum(part.ms for part in parts),
        refiner_ms=sum(part.refiner_ms for part in parts),
        lost_copies=sum(part.lost_copies for part in parts),
        keep_Bl=torch.cat(keeps) if keeps else None,
        depth_Bl=torch.cat(depths) if depths else None,
    )


def processor_name(device: torch.device) -> str:
    """The machine as bits depend on it: the processor's name, and the accelerator's where one computes."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    name = name or platform.machine()
    return f"{name} + {torch.cuda.get_device_name(device)}" if device.type == "cuda" else name


def describe_precision(precision: Precision) -> dict[str, str | int | None]:
    """Dtypes by name; None where a part has none of its own."""
    decoder = precision.decoder_dtype
    return {
        "dtype": str(precision.dtype).removeprefix("torch."),
        "decoder_dtype": None if decoder is None else str(decoder).removeprefix("torch."),
        "quantization": precision.quantization,
    }


def describe_kernels(device: torch.device) -> str:
    """Kernels that run by default: `native`, or `torch` alone."""
    return native.describe() if device.type == "cpu" else "torch"


@functools.cache
def installed_version(package: str) -> str | None:
    """The version of an installed package, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def quoted(prompt: str) -> str:
    """A prompt as messages repeat it: its beginning alone, if it is long."""
    return repr(prompt if len(prompt) <= _LONGEST_QUOTE else f"{prompt[:_LONGEST_QUOTE]}...")


def _may_say(warning: CallWarning, prompt: str) -> bool:
    """Whether a warning belongs to an image: what is said of a prompt repeats it, and is for its own images alone."""
    return warning.code != "prompt_cut" or quoted(prompt) in warning.message


def place_names(places: Sequence[str]) -> list[str]:
    """Repositories as they are, folders by name only: no private paths."""
    return [Path(place).name if Path(place).is_dir() else place for place in places]


def _plain(value: object) -> object:
    """The value of an option as JSON has it."""
    if isinstance(value, Policy):
        parts = [part.stored() for part in value.parts_of()]
        return {"spec": value.spec, "fingerprint": value.fingerprint, "parts": parts}
    return list(value) if isinstance(value, tuple) else value


def describe(job: Job, model: LoadedModel, *, uses_triton: bool = False) -> dict[str, Any]:
    """Everything that decides the bits of a batch, defaults included, as plain JSON data: format 1, of a whole call."""
    kernels = "triton" if uses_triton else describe_kernels(model.device)
    return {
        "format": 1,
        "model": model.spec.name,
        "weights": {
            "kind": model.weights,
            "sha256": model.sha256,
            **({"text_encoders": place_names(model.text_encoders)} if model.text_encoders else {}),
        },
        "prompts": list(job.prompts),
        "negative_prompts": None if job.negatives is None else list(job.negatives),
        "num_images_per_prompt": job.images_per_prompt,
        "seeds": list(job.seeds),
        **{name: _plain(value) for name, value in job.kept.items()},
        **({"asked": job.asked} if job.asked else {}),
        **({"tiled_layers": list(model.tiled_layers)} if model.tiled_layers else {}),
        "batch_invariant": job.is_batch_invariant(model.has_independent_rows),
        **describe_precision(model.precision),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "foveate": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            "tokenizers": installed_version("tokenizers"),
            **({"transformers": installed_version("transformers")} if model.text_encoders else {}),
            **({} if model.precision.quantization is None else {"torchao": installed_version("torchao")}),
            **({"triton": installed_version("triton")} if kernels == "triton" else {}),
        },
        "machine": processor_name(model.device),
        "kernels": kernels,
    }
