"""One measured figure of a model, its ceiling and its target, as a line of a table."""

from dataclasses import dataclass

MIN_PROMPTS = 8
"""Images that a figure takes at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One line of a report.

    Attributes:
        name: What was measured.
        value: What the model reached; None where the question does not arise, and `note` says why.
        ceiling: What real art reaches under the same check, if that is known.
        target: What a good model reaches, if there is a target.
        is_share: Whether values are shares, printed as percentages.
        lower_is_better: Which side of the target is good.
        note: Anything that the reader must know.
    """

    name: str
    value: float | None
    ceiling: float | None = None
    target: float | None = None
    is_share: bool = True
    lower_is_better: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty without one."""
        if self.target is None or self.value is None:
            return ""
        is_met = self.value <= self.target if self.lower_is_better else self.value >= self.target
        return "met" if is_met else "missed"

    def printed(self, value: float | None) -> str:
        """A value in its unit."""
        if value is None:
            return "-"
        return f"{value:.0%}" if self.is_share else f"{value:.4g}"

    def cells(self) -> tuple[str, ...]:
        """The line of a table."""
        sign = "<=" if self.lower_is_better else ">="
        target = "-" if self.target is None else f"{sign} {self.printed(self.target)}"
        return (self.name, self.printed(self.value), self.printed(self.ceiling), target, self.verdict, self.note)


COLUMNS = ("figure", "model", "real art", "target", "", "note")
