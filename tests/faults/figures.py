"""What the tests of faults have measured, and what it had to be."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """One line of the table."""

    fault: str
    what: str
    value: float
    bound: str
    unit: str

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.fault} | {self.what} | {_text(self.value)}{unit} | {self.bound}{unit}"


class Figures(list[Figure]):
    """All of one run."""

    def at_most(self, fault: str, what: str, value: float, bound: float, unit: str = "") -> None:
        """Note a figure, and fail where it is greater than its bound."""
        self._note(Figure(fault, what, value, f"≤ {_text(bound)}", unit), value <= bound)

    def at_least(self, fault: str, what: str, value: float, bound: float, unit: str = "") -> None:
        """Note a figure, and fail where it is smaller than its bound."""
        self._note(Figure(fault, what, value, f"≥ {_text(bound)}", unit), value >= bound)

    def table(self) -> str:
        """Return all of them in Markdown."""
        head = ["| Fault | Figure | Measured | Bound |", "|---|---|---|---|"]
        return "\n".join([*head, *(f"| {figure} |" for figure in self)])

    def _note(self, figure: Figure, holds: bool) -> None:
        self.append(figure)
        print(figure)
        assert holds, str(figure)


def _text(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"
