"""Warnings of a call, for its report, JSON and image metadata."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

WarningCode = Literal[
    "untrained_size",
    "prompt_cut",
    "policy_without_effect",
    "guidance_ignores_prompt",
    "negative_prompt_ignored",
    "weights_unpinned",
    "kernels_plain",
    "graphs_plain",
    "deadline_missed",
    "policy_measured_elsewhere",
    "guard_switched",
    "deadline_cut",
]
"""Codes are stable; messages are for people and may change."""

WARNING_CODES: tuple[str, ...] = get_args(WarningCode)

_logger = logging.getLogger("foveate")


@dataclass(frozen=True, kw_only=True, slots=True)
class CallWarning:
    """A stable code and one line for people, which says what to do about it."""

    code: WarningCode
    message: str

    def to_json(self) -> dict[str, str]:
        """As reports and metadata hold it."""
        return {"code": self.code, "message": self.message}


def log_warnings(warnings: Iterable[CallWarning]) -> None:
    """One line each on the logger `foveate`, which writes to stderr unless a program says otherwise."""
    for warning in warnings:
        _logger.warning("%s", warning.message, extra={"code": warning.code})
