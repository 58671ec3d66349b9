"""A guard over a policy: generates some requests again in full, keeps how far they drifted, and gives up on the policy.

Which images are checked follows from their seed and prompt alone, so the same traffic is checked wherever it runs. The
drift of an image is the PSNR to its full run with the same random numbers. Where the mean of the latest ones falls
below a bound, requests run in full from then on.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.core.warnings import CallWarning, log_warnings
from foveate.pipeline.call import Prompts
from foveate.pipeline.options import CallOptions, Options
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.policies.full import Full
from foveate.policies.registry import load_policy

EQUAL_DB = 100.0
"""PSNR of equal images, and the most that any has."""

_PER_CALL = ("seed", "negative_prompt", "num_images_per_prompt", "policy", "budget", "latency_budget_ms")
"""Options of a call that its check has in a form of its own, or not at all."""


def psnr(image: UInt8[np.ndarray, "Y X 3"], other: UInt8[np.ndarray, "Y X 3"]) -> float:
    """Decibels between two images of bytes, all pixels, at most 100."""
    error = float(np.square(image.astype(np.float64) - other).mean())
    return EQUAL_DB if error == 0 else min(EQUAL_DB, 10 * float(np.log10(255**2 / error)))


def is_chosen(prompt: str, seed: int, share: float) -> bool:
    """Whether an image is one of the share that is checked: a hash of its prompt and seed decides."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How near an image came to its full run; `key` stands for prompt and seed, which are not kept."""

    key: str
    policy: str
    psnr: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Check:
    """An image that was answered and waits for its full run."""

    prompt: str
    call: Options
    policy: str
    image: UInt8[np.ndarray, "Y X 3"]


class Guard:
    """Runs a policy for as long as it keeps a bound; safe to call from several threads.

    Calls answer first; `settle` then generates the chosen images in full, when the caller has time for it. Leaving a
    `with` block settles.

    Attributes:
        pipe: Generates.
        policy: What is guarded.
    """

    def __init__(
        self, pipe: Pipeline, policy: str | Policy, *, share: float = 0.01, bound: float = 28.0, window: int = 16
    ) -> None:
        """Guards a policy.

        Args:
            pipe: Generates.
            policy: As a call takes it.
            share: Of the images that are checked, in [0, 1].
            bound: PSNR in dB that the mean of the latest checks must not fall below.
            window: How many checks that mean is taken over, 1 or more; over fewer at first.

        Raises:
            FoveateError: A value out of range, or no such policy.
        """
        for is_ok, message in (
            (0 <= share <= 1, f"share must be in [0, 1], got {share}"),
            (0 <= bound < EQUAL_DB, f"bound must be a PSNR in [0, {EQUAL_DB:g}) dB, got {bound}"),
            (window >= 1, f"window must be 1 or more, got {window}"),
        ):
            if not is_ok:
                raise FoveateError(message)
        self.pipe, self.policy, self._given = pipe, load_policy(policy), policy
        self._share, self._bound = share, bound
        self._lock = threading.Lock()
        self._waiting: deque[_Check] = deque()
        self._latest: deque[Drift] = deque(maxlen=window)
        self._answered = self._checked = 0
        self._least = EQUAL_DB
        self._switch: CallWarning | None = None
        self._is_said = False

    def __enter__(self) -> "Guard":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Settles what is waiting."""
        self.settle()

    @property
    def is_broken(self) -> bool:
        """Whether the bound broke, so that requests run in full."""
        return self._switch is not None

    def __call__(self, prompts: Prompts, **options: Unpack[CallOptions]) -> PipelineOutput[list[Image.Image]]:
        """Generates under the policy, or in full once the bound has broken; the next answer says so once.

        Raises:
            FoveateError: As the pipeline; or a policy, a budget or an output type, which are the guard's to decide.
        """
        for name in ("policy", "budget", "latency_budget_ms"):
            if name in options:
                raise FoveateError(f"the guard decides about the policy; leave {name} out")
        if "output_type" in options:
            raise FoveateError("the guard answers with PIL images; leave output_type out")
        call: CallOptions = {**options, "policy": Full() if self.is_broken else self._given}
        output = self.pipe(prompts, **call)
        with self._lock:
            self._answered += len(output.prompts)
            says = self._switch is not None and not self._is_said
            self._is_said |= says
        if says and self._switch is not None:
            report = replace(output.report, warnings=(*output.report.warnings, self._switch))
            return replace(output, report=report)
        if not self.is_broken:
            self._queue(output, options)
        return output

    def _queue(self, output: PipelineOutput[list[Image.Image]], options: CallOptions) -> None:
        """Keeps the chosen images of an answer; none of those whose random numbers belong to a whole batch."""
        if options.get("rng", "keyed") != "keyed":
            return
        rest = {name: value for name, value in options.items() if name not in _PER_CALL}
        for row, (prompt, seed) in enumerate(zip(output.prompts, output.seeds, strict=True)):
            if not is_chosen(prompt, seed, self._share):
                continue
            negative = output.row_config(row)["negative_prompt"]
            call = cast(Options, {**rest, "seed": seed, "negative_prompt": negative, "callback_on_step_end": None})
            image = stack_uint8([output.images[row]])[0]
            self._waiting.append(_Check(prompt=prompt, call=call, policy=output.config["policy"]["spec"], image=image))

    @property
    def num_waiting(self) -> int:
        """Images that wait for their full run."""
        return len(self._waiting)

    def settle(self, most: int | None = None) -> list[Drift]:
        """Generates waiting images in full and compares them.

        Args:
            most: How many; None for all.

        Returns:
            Their drift, in the order in which they were answered.
        """
        found: list[Drift] = []
        while (most is None or len(found) < most) and (check := self._next()) is not None:
            call: Options = {**check.call, "policy": Full(), "output_type": "np", "trace": False}
            full = self.pipe(check.prompt, **call)
            key = hashlib.sha256(f"{check.call['seed']}\0{check.prompt}".encode()).hexdigest()[:12]
            drift = Drift(key=key, policy=check.policy, psnr=psnr(check.image, stack_uint8(full.images)[0]))
            self._note(drift)
            found.append(drift)
        return found

    def _next(self) -> _Check | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _note(self, drift: Drift) -> None:
        with self._lock:
            self._latest.append(drift)
            self._checked += 1
            self._least = min(self._least, drift.psnr)
            mean = _mean(self._latest)
            if mean >= self._bound or self._switch is not None:
                return
            count = len(self._latest)
            message = (
                f"{self.policy.spec} came {mean:.1f} dB near its full run, a mean over {count} "
                f"image{'s' if count > 1 else ''}, below the bound of {self._bound:g} dB: requests run in full "
                "from now on; take a milder setting"
            )
            self._switch = CallWarning(code="guard_switched", message=message)
        log_warnings([self._switch])

    def to_json(self) -> dict[str, Any]:
        """What is guarded and what was found, as plain data without any prompt."""
        with self._lock:
            return {
                "policy": self.policy.spec,
                "fingerprint": self.policy.fingerprint,
                "share": self._share,
                "bound_db": self._bound,
                "answered": self._answered,
                "checked": self._checked,
                "waiting": len(self._waiting),
                "is_broken": self._switch is not None,
                "psnr": {"mean": _mean(self._latest), "min": self._least} if self._checked else None,
                "latest": [{"key": d.key, "policy": d.policy, "psnr": d.psnr} for d in self._latest],
                "warnings": [] if self._switch is None else [self._switch.to_json()],
            }


def _mean(drifts: Sequence[Drift]) -> float:
    return sum(drift.psnr for drift in drifts) / len(drifts)
