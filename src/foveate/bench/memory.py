"""Memory of a call, beside the weights: what is kept is counted, the peak is measured, activations are the rest.

Counted means added up from tensors; measured means asked of the device's allocator or of the operating system.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from foveate.bench.measure import Measure
from foveate.bench.report import Entry
from foveate.bench.spread import Spread
from foveate.bench.workload import Workload
from foveate.core.policy import Policy
from foveate.families.loading import LoadedModel
from foveate.families.offload import modules_of
from foveate.pipeline.pipeline import Pipeline
from foveate.weights.quantization import stored_bytes

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"
"""Written to `clear_refs`, it sets the peak back to what is resident now; see proc(5)."""


class Meter(ABC):
    """Peak memory since `start`, above what was held then."""

    method: str
    """How it measures, for people."""

    @abstractmethod
    def start(self) -> None:
        """Takes the memory held now as zero."""

    @abstractmethod
    def added_bytes(self) -> int:
        """The most that was held since `start`, less what was held then."""


class CudaMeter(Meter):
    """Asks torch's allocator of one device; what the driver and the libraries hold is not seen."""

    method = (
        "measured: bytes of live tensors on the device (torch.cuda.max_memory_allocated), above those before a call"
    )

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, 0

    def start(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)

    def added_bytes(self) -> int:
        """Live tensors."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self._before


class ResidentMeter(Meter):
    """Asks Linux for the peak of resident memory, which is set back before every call."""

    method = (
        "measured: peak of resident memory (VmHWM, set back before a call, free heap returned to the system first) "
        "above what was resident before; pages that are allocated and never written do not count"
    )

    def __init__(self) -> None:
        self._before = 0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def start(self) -> None:
        """Gives free heap back, as a call could otherwise use it unseen."""
        if self._trim is not None:
            self._trim(0)
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
        self._before = self._peak()

    def added_bytes(self) -> int:
        """Resident pages."""
        return self._peak() - self._before

    def _peak(self) -> int:
        line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])


def meter_for(device: torch.device) -> Meter | None:
    """The way to measure on a device; None where there is none, and only counted bytes can be said."""
    if device.type == "cuda":
        return CudaMeter(device)
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return None
    return ResidentMeter()


def weights_bytes(model: LoadedModel) -> dict[str, int]:
    """Bytes of parameters and buffers by part, counted; a text encoder without weights has 0."""
    parts = {"transformer": model.transformer, "tokenizer": model.tokenizer, "text_encoder": model.text}
    return {name: _bytes_of(modules_of(part)) for name, part in parts.items()}


def _bytes_of(modules: Iterable[nn.Module]) -> int:
    """Each tensor once, even if several modules share it."""
    tensors: dict[int, Tensor] = {
        id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(stored_bytes(tensor) for tensor in tensors.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRun:
    """Bytes of one call; the measured ones are None where they cannot be measured."""

    kv: int
    caches: int
    transformer: int | None
    call: int | None

    @property
    def activations(self) -> int | None:
        """What the transformer held beside what it keeps; never below 0, though unwritten pages can make it so."""
        return None if self.transformer is None else max(self.transformer - self.kv - self.caches, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory(Measure[MemoryRun]):
    """Measures memory; without a meter only keys and values are counted."""

    meter: Meter | None
    weights: int

    def once(self, pipe: Pipeline, workload: Workload, policy: Policy, round_index: int) -> MemoryRun:
        """Generates one batch; the peak is read before the decoder begins, and at the end."""
        transformer: list[int] = []

        def read(_pipe: object, _scale: int, scales_left: int, _latents: object) -> None:
            if scales_left == 0 and self.meter is not None:
                transformer.append(self.meter.added_bytes())

        options = workload.options(round_index, policy)
        options["callback_on_step_end"] = read
        if self.meter is not None:
            self.meter.start()
        report = pipe(workload.texts(round_index), **options).report
        return MemoryRun(
            kv=report.kv_bytes_peak,
            caches=report.cache_bytes_peak,
            transformer=transformer[0] if transformer else None,
            call=None if self.meter is None else self.meter.added_bytes(),
        )

    def entry(self, policy: Policy, own: Sequence[MemoryRun], baseline: Sequence[MemoryRun] | None) -> Entry:
        """Bytes by part, and with a baseline own / baseline of what is largest."""
        values = {f"bytes.{part}": _known(own, part) for part in ("kv", "caches", "activations", "transformer", "call")}
        values["bytes.peak"] = [self.weights + call for call in values["bytes.call"]]
        if baseline is not None:
            for part in ("kv", "call"):
                pairs = zip(values[f"bytes.{part}"], _known(baseline, part), strict=True)
                values[f"ratio.{part}"] = [mine / other for mine, other in pairs if other]
        return Entry(
            policy=policy.spec,
            fingerprint=policy.fingerprint,
            figures={name: Spread.of(numbers) for name, numbers in values.items() if numbers},
            numbers={},
        )


def _known(runs: Sequence[MemoryRun], part: str) -> list[float]:
    """The values of a part, none of them if it could not be measured."""
    found = [getattr(run, part) for run in runs]
    return [float(value) for value in found if value is not None]
