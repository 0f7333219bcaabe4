"""What is counted and what is bounded; the page /metrics tells it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as _Counter
from typing import NamedTuple


class Bound(NamedTuple):
    """How full something is that has a bound. Whatever has one lists it as `bounds`; nobody else keeps count."""

    place: str
    used: int
    limit: int


class Counter:
    """A number that only grows, one per combination of labels.

    Labels name places and kinds, never ids, users or anything that a peer chooses.
    """

    def __init__(self, name: str, help: str, labels: tuple[str, ...]) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self._values: _Counter[tuple[str, ...]] = _Counter()
        counters.append(self)

    def add(self, *labels: str, amount: int = 1) -> None:
        """Count `amount` more under these label values, given in the order of `labels`."""
        self._values[labels] += amount

    def value(self, *labels: str) -> int:
        """Return the count under these label values."""
        return self._values[labels]

    def samples(self) -> dict[tuple[str, ...], int]:
        """Return all counts by label values."""
        return dict(self._values)


class Histogram:
    """How often a value was at most so much, one row per combination of labels; `buckets` grow."""

    def __init__(self, name: str, help: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self.buckets = buckets
        self._rows: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        histograms.append(self)

    def observe(self, value: float, *labels: str) -> None:
        """Count a value under these label values, given in the order of `labels`."""
        counts, total = self._rows.setdefault(labels, ([0] * (len(self.buckets) + 1), [0.0]))
        counts[bisect_left(self.buckets, value)] += 1
        total[0] += value

    def samples(self) -> dict[tuple[str, ...], tuple[list[int], float]]:
        """Return by label values how many fell into each bucket, the last one without a bound; and their sum."""
        return {labels: (list(counts), total[0]) for labels, (counts, total) in self._rows.items()}


counters: list[Counter] = []
histograms: list[Histogram] = []
"""All there are."""

dropped = Counter("microservices_dropped_total", "Messages given up without an answer.", ("service", "place", "reason"))
