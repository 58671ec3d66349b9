"""The trials of a tuning in a file: chosen by optuna, one after the other, and continued where a run stopped."""

import itertools
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.eval.over import Over

if TYPE_CHECKING:
    import optuna

_NAME = "foveate"
_TRIAL, _REFERENCE = "trial", "reference_ms"
"""Keys of what we keep in a study."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One setting on the tuning prompts.

    Attributes:
        values: Of the fields, as specs write them.
        policy: Spec with them.
        value: Of the figure that is sought; None where the setting was refused.
        violations: By how much each bound is broken; 0 or less where it holds.
        refusal: Why the setting could not run.
        figures: Everything that was measured.
    """

    values: Mapping[str, str]
    policy: str
    value: float | None
    violations: Mapping[str, float]
    refusal: str | None
    figures: Mapping[str, float]

    @property
    def is_feasible(self) -> bool:
        """Whether it ran and holds every bound."""
        return self.refusal is None and all(violation <= 0 for violation in self.violations.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is not finite is left out."""
        finite = {name: value for name, value in self.figures.items() if math.isfinite(value)}
        return {
            "values": dict(self.values), "policy": self.policy, "value": self.value,
            "violations": dict(self.violations), "is_feasible": self.is_feasible, "refusal": self.refusal,
            "figures": finite,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Trial":
        """Reads what `to_json` wrote."""
        return cls(**{name: value for name, value in data.items() if name != "is_feasible"})


class Study:
    """Trials that were made and those to come; made by `open_study`."""

    def __init__(self, study: "optuna.Study", overs: Sequence[Over], wanted: int) -> None:
        self.wanted = wanted
        self._study, self._overs = study, tuple(overs)

    @property
    def done(self) -> int:
        """Trials that were finished."""
        return len(self.trials())

    def trials(self) -> list[Trial]:
        """In the order in which they were made."""
        found = [trial.user_attrs.get(_TRIAL) for trial in self._study.get_trials(deepcopy=False)]
        return [Trial.from_json(json.loads(text)) for text in found if text is not None]

    def reference_ms(self, measured: float) -> float:
        """The reference's milliseconds in the first trial, which all others are related to."""
        kept = self._study.user_attrs.get(_REFERENCE)
        if kept is None:
            self._study.set_user_attr(_REFERENCE, measured)
            return measured
        return float(kept)

    def step(self, run: Callable[[Mapping[str, str]], Trial]) -> Trial:
        """Makes one trial; if it is interrupted the next one takes the same values."""
        from optuna.trial import TrialState  # noqa: PLC0415 - of the extra `eval`

        asked = self._study.ask()
        try:
            made = run(self._values(asked))
        except KeyboardInterrupt:
            self._study.tell(asked, state=TrialState.FAIL)
            self._study.enqueue_trial(asked.params)
            raise
        for text, violation in made.violations.items():
            asked.set_constraint(text, violation)
        asked.set_user_attr(_TRIAL, json.dumps(made.to_json()))
        if made.value is None or not math.isfinite(made.value):
            self._study.tell(asked, state=TrialState.FAIL)
        else:
            self._study.tell(asked, made.value)
        return made

    def state(self) -> str:
        """How far the search is, for a progress bar."""
        feasible = sum(trial.is_feasible for trial in self.trials())
        return f"{feasible} hold the bounds"

    def _values(self, trial: "optuna.Trial") -> dict[str, str]:
        return {over.field: _suggested(trial, over) for over in self._overs}


def open_study(path: Path, overs: Sequence[Over], trials: int, *, is_maximised: bool) -> Study:
    """A study in a journal file; one that is there goes on. The caller keeps other processes away.

    Args:
        path: The file.
        overs: Fields and their ranges.
        trials: Settings to try at most; fewer where there are no more.
        is_maximised: Whether the value shall be large.
    """
    import optuna  # noqa: PLC0415 - of the extra `eval`
    from optuna.storages import JournalStorage  # noqa: PLC0415
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock  # noqa: PLC0415

    size = math.prod(len(over.values) or trials + 1 for over in overs)
    with _quiet():
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
        found = optuna.create_study(
            storage=storage, study_name=_NAME, load_if_exists=True, direction="maximize" if is_maximised else "minimize"
        )
        # The same measurements make the same search; a study that goes on must not draw the same numbers again.
        found.sampler = optuna.samplers.TPESampler(seed=len(found.get_trials(deepcopy=False)))
        for trial in found.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            found.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            found.enqueue_trial(trial.params)
        if size <= trials:
            for values in itertools.product(*(_choices(over) for over in overs)):
                params = dict(zip((over.field for over in overs), values, strict=True))
                found.enqueue_trial(params, skip_if_exists=True)
    return Study(found, overs, min(trials, size))


def _choices(over: Over) -> Sequence[str | int]:
    """What `_suggested` asks for, one by one."""
    return over.values if over.low is None else range(len(over.values))


def _suggested(trial: "optuna.Trial", over: Over) -> str:
    """A value of a field as specs write it."""
    if over.low is None or over.high is None:
        return str(trial.suggest_categorical(over.field, over.values))
    if not over.values:
        return f"{trial.suggest_float(over.field, float(over.low), float(over.high)):.6g}"
    # The order of the values matters to the sampler, the values themselves are exact only as texts.
    return over.values[trial.suggest_int(over.field, 0, len(over.values) - 1)]


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keeps optuna from reporting on stderr inside."""
    import optuna  # noqa: PLC0415

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
