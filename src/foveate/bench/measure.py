"""What is measured in one call of the pipeline, and how the calls of a policy become its figures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from foveate.bench.report import Entry
from foveate.bench.rounds import Rounds
from foveate.bench.workload import Workload
from foveate.core.policy import Policy
from foveate.pipeline.pipeline import Pipeline

T = TypeVar("T")


class Measure(ABC, Generic[T]):
    """One way to measure."""

    @abstractmethod
    def once(self, pipe: Pipeline, workload: Workload, policy: Policy, round_index: int) -> T:
        """Generates one batch and measures it."""

    @abstractmethod
    def entry(self, policy: Policy, own: Sequence[T], baseline: Sequence[T] | None) -> Entry:
        """The figures of a policy.

        Args:
            policy: Which.
            own: Its measurements, at least one.
            baseline: Those of the baseline in the same rounds; None for the baseline itself.
        """

    def entries(self, policies: Sequence[Policy], rounds: Rounds[T]) -> tuple[Entry, ...]:
        """One entry per policy; the first policy is the baseline."""
        return tuple(
            self.entry(policy, rounds.of(side), rounds.of(0) if side else None) for side, policy in enumerate(policies)
        )
