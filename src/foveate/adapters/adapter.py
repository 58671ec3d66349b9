"""The interface to an official class, and one call of its method run by our engine.

Axes: B images, (Y, X) pixels.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.adapters.sharing import attribute
from foveate.core.errors import FoveateError, UnsupportedError
from foveate.core.policy import Policy
from foveate.core.trace import Trace
from foveate.core.warnings import log_warnings
from foveate.engine.executor import Engine
from foveate.engine.finite import check_pixels
from foveate.engine.report import Milliseconds, Report, build_report, without_effect
from foveate.engine.state import Request

METHOD = "autoregressive_infer_cfg"
"""The generating method, in both official classes."""


class Adapter(ABC):
    """One object of an official class: how its arguments become a request, and pixels become its answer.

    Attributes:
        reads: Arguments that a call may set.
        ignores: Arguments that the official code accepts and never reads; neither do we.
    """

    reads: tuple[str, ...]
    ignores: tuple[str, ...] = ()
    model: nn.Module

    @abstractmethod
    def engine(self, arguments: Mapping[str, Any]) -> Engine:
        """Our networks over the weights that the object and the arguments hold now."""

    @abstractmethod
    def request(self, arguments: Mapping[str, Any], engine: Engine) -> Request:
        """What a call asks for; seeds and advances the object's own generator as the official code does.

        Raises:
            UnsupportedError: Names the argument whose value is not supported.
        """

    @abstractmethod
    def answer(self, pixels_B3YX: Float[Tensor, "B 3 Y X"]) -> object:
        """What the official method returns: new tensors, which whoever called may change (pixels may not be)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drawn:
    """A finished call: pixels in [-1, 1], and what it cost."""

    pixels_B3YX: Float[Tensor, "B 3 Y X"]
    report: Report
    trace: Trace


def draw(engine: Engine, request: Request, policy: Policy) -> Drawn:
    """Runs a request under a policy and decodes it.

    Raises:
        PlanConflictError: The policy asks for what cannot be done.
        BrokenNumbersError: Numbers of an image are NaN or infinite.
    """
    began = time.perf_counter()
    shape = engine.model.shape
    bound = policy.bind(request.schedule, shape)
    for step in engine.run(bound, request):  # noqa: B007 - the last one is what counts
        pass
    decoding = time.perf_counter()
    with engine.guard():
        pixels_B3YX = engine.tokenizer.decode(step.f_hat_BZHW)
    check_pixels(pixels_B3YX)
    if pixels_B3YX.is_cuda:
        torch.cuda.synchronize(pixels_B3YX.device)
    now, trace = time.perf_counter(), step.trace
    trace.decoder_ms = 1e3 * (now - decoding)
    warnings = without_effect(policy.spec, trace.unfired)
    log_warnings(warnings)
    ms = Milliseconds(
        text=0.0,
        transformer=trace.transformer_ms,
        refiner=trace.refiner_ms,
        decoder=trace.decoder_ms,
        total=1e3 * (now - began),
    )
    report = build_report(trace, bound, [request], ms, warnings)
    return Drawn(pixels_B3YX=pixels_B3YX, report=report, trace=trace)


def generator_of(model: nn.Module) -> torch.Generator:
    """The object's own generator.

    Raises:
        FoveateError: It has none.
    """
    generator = attribute(model, "rng")
    if not isinstance(generator, torch.Generator):
        raise FoveateError(f"{type(model).__name__}.rng must be a torch.Generator, got {type(generator).__name__}")
    return generator


def seeded(model: nn.Module, seed: int | None, device: torch.device) -> torch.Generator:
    """The generator that the official code draws from: the object's own, seeded, or without a seed torch's global one.

    Raises:
        UnsupportedError: No seed, on a device whose global generator is out of reach.
    """
    if seed is not None:
        return generator_of(model).manual_seed(int(seed))
    if device.type == "cpu":
        return torch.default_generator
    if device.type != "cuda":
        raise UnsupportedError(f"g_seed=None is not supported on {device.type}; give a number")
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
