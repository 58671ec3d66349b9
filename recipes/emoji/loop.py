"""What both trainers share: a clock that survives a restart, the learning-rate curve, averaging and checkpoints.

The schedule runs on seconds of training done, not on steps or on the wall: a run that was stopped, paused or moved to
another machine goes on where it was. No step counts for more than `MAX_STEP_S`, so a pause loses nothing.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.atomic import replace_file
from foveate.core.errors import FoveateError


class PauseError(FoveateError):
    """Says that a trainer stopped behind a checkpoint, as it was asked to, and has more to do."""


MAX_STEP_S = 4.0
"""Longest time that one step adds to the clock, in seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimisation:
    """How one of the two networks is trained.

    The rate is constant for `constant_share` of the `minutes`, then falls along a cosine to `final_rate` of its peak.
    A checkpoint is written every `checkpoint_s` seconds of training.
    """

    minutes: float
    batch: int
    rate: float
    constant_share: float = 0.45
    final_rate: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    checkpoint_s: float = 120.0

    def rate_at(self, progress: float, step: int) -> float:
        """Learning rate at a share of the minutes, `progress` in [0, 1]."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        if progress <= self.constant_share:
            return self.rate * warm
        along = (min(progress, 1.0) - self.constant_share) / (1.0 - self.constant_share)
        return self.rate * warm * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * along)))


@dataclass(kw_only=True, slots=True)
class Run:
    """The state of a training run: everything a checkpoint holds."""

    model: nn.Module
    average: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    clock_s: float = 0.0
    step: int = 0
    samples: int = 0
    flops: float = 0.0
    recent: dict[str, float | Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, model: nn.Module, optimisation: Optimisation) -> "Run":
        """Begins a run: AdamW on everything, decay on matrices only."""
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optimisation.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=optimisation.rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        average = {name: value.detach().float().clone() for name, value in model.state_dict().items()}
        return cls(model=model, average=average, optimiser=optimiser)

    def save(self, path: Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "clock_s": self.clock_s,
            "step": self.step,
            "samples": self.samples,
            "flops": self.flops,
            "recent": {name: float(value) for name, value in self.recent.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that was killed while it wrote has left a whole checkpoint's bytes.
        for left in path.parent.glob(f".{path.stem}.*.part"):
            left.unlink()
        with replace_file(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint; the clock and the optimiser go on where they stopped."""
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        device = next(self.model.parameters()).device
        self.average = {name: value.to(device) for name, value in state["average"].items()}
        self.clock_s, self.step, self.samples = state["clock_s"], state["step"], state["samples"]
        self.flops, self.recent = state["flops"], state["recent"]

    def update(self, loss: Tensor, optimisation: Optimisation) -> None:
        """Takes one optimiser step and moves the average towards the weights."""
        progress = self.clock_s / (60 * optimisation.minutes)
        for group in self.optimiser.param_groups:
            group["lr"] = optimisation.rate_at(progress, self.step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), optimisation.clip)
        self.optimiser.step()
        decay = min(optimisation.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value.float(), 1 - decay)

    def note(self, **figures: float | Tensor) -> None:
        """Keeps running means of what the log prints; a figure stays on its device until then."""
        for name, value in figures.items():
            self.recent[name] = 0.98 * self.recent.get(name, value) + 0.02 * value


def averages_of(checkpoint: Path) -> tuple[dict[str, Tensor], float]:
    """The averaged weights of a checkpoint, on the CPU, and the minutes of training behind them."""
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return state["average"], state["clock_s"] / 60


def flops_of(forward: Callable[[], object]) -> int:
    """FLOPs of the matmuls and convolutions of a call, counted once."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When one call of a trainer ends, though its minutes are not used up, and what its log compares itself with.

    Attributes:
        deadline: Time by `time.perf_counter` after which a call stops behind a checkpoint; the next one goes on.
        peak: FLOPs per second of the device's best matrix product; the log says which share of it the model used.
    """

    deadline: float = math.inf
    peak: float | None = None


def steps(
    run: Run,
    optimisation: Optimisation,
    checkpoint: Path,
    log: Callable[[str], None],
    limits: Limits,
) -> Iterator[int]:
    """Yields step numbers until the minutes are used up; checkpoints and logs between them.

    Args:
        run: Continued from `checkpoint` if that file exists.
        optimisation: Says how many minutes there are.
        checkpoint: Written every `checkpoint_s` seconds of training and at the end.
        log: Receives one line per checkpoint.
        limits: See there.

    Raises:
        PauseError: The call's own time is up before the recipe's minutes are; the checkpoint is written.
    """
    if checkpoint.exists():
        run.load(checkpoint)
        log(f"continued at step {run.step}, {run.clock_s / 60:.1f} of {optimisation.minutes} minutes")
    saved_s, saved_flops = run.clock_s, run.flops
    while run.clock_s < 60 * optimisation.minutes:
        began = time.perf_counter()
        if began > limits.deadline:
            run.save(checkpoint)
            raise PauseError(
                f"paused at {run.clock_s / 60:.1f} of {optimisation.minutes} minutes; run it again to go on"
            )
        yield run.step
        run.step += 1
        run.clock_s += min(time.perf_counter() - began, MAX_STEP_S)
        if run.clock_s - saved_s >= optimisation.checkpoint_s:
            run.save(checkpoint)
            figures = [f"{name} {float(value):.4f}" for name, value in run.recent.items()]
            speed = (run.flops - saved_flops) / (run.clock_s - saved_s)
            if limits.peak is not None and speed:
                figures.append(f"utilisation {speed / limits.peak:.0%} of {limits.peak / 1e12:.2f} TFLOP/s")
            rate = run.samples / run.clock_s
            log(f"{run.clock_s / 60:6.1f} min  step {run.step}  {rate:.1f} samples/s  {' '.join(figures)}")
            saved_s, saved_flops = run.clock_s, run.flops
    run.save(checkpoint)
