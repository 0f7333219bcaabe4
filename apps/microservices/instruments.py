"""Counters that anyone may bump; telemetry reads them."""

from __future__ import annotations

from collections import Counter as _Counter


class Counter:
    """A number that only grows, one per combination of labels.

    Labels name places and kinds, never ids, users or anything that a peer chooses.
    """

    def __init__(self, name: str, help: str, labels: tuple[str, ...]) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self._values: _Counter[tuple[str, ...]] = _Counter()

    def add(self, *labels: str, amount: int = 1) -> None:
        """Count `amount` more under these label values, given in the order of `labels`."""
        self._values[labels] += amount

    def value(self, *labels: str) -> int:
        """Return the count under these label values."""
        return self._values[labels]

    def samples(self) -> dict[tuple[str, ...], int]:
        """Return all counts by label values."""
        return dict(self._values)


dropped = Counter("microservices_dropped_total", "Messages given up without an answer.", ("service", "place", "reason"))
