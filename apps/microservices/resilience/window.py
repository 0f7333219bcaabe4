"""What has happened lately: counts and latencies of a window that rolls on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

PERCENTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 1.0)
_MOST_LATENCIES = 1000
"""How many latencies a bucket keeps; of more, the latest."""


class Window:
    """Counts by name, in `buckets` that together hold `seconds`; the oldest is given up for each new one.

    `clock` gives the time; with `by_itself` False only `rotate` goes on to the next bucket. `percentiles` says
    whether latencies are kept.
    """

    def __init__(
        self,
        seconds: float,
        buckets: int,
        clock: Callable[[], float],
        *,
        percentiles: bool = True,
        by_itself: bool = True,
    ) -> None:
        buckets = max(1, buckets)
        self._width = seconds / buckets
        self._clock = clock
        self._percentiles = percentiles
        self._by_itself = by_itself and self._width > 0
        self._buckets: deque[Counter[str]] = deque([Counter()], maxlen=buckets)
        self._latencies: deque[deque[float]] = deque([deque(maxlen=_MOST_LATENCIES)], maxlen=buckets)
        self._number = self._now()

    def add(self, name: str, latency: float | None = None) -> None:
        """Count an event, and how many seconds it took."""
        self._roll()
        self._buckets[-1][name] += 1
        if latency is not None and self._percentiles:
            self._latencies[-1].append(latency)

    def rotate(self) -> None:
        """Go on to the next bucket."""
        self._buckets.append(Counter())
        self._latencies.append(deque(maxlen=_MOST_LATENCIES))

    @property
    def counts(self) -> Counter[str]:
        """All counts of the window."""
        self._roll()
        return sum(self._buckets, Counter())

    @property
    def buckets(self) -> list[dict[str, int]]:
        """The counts of each bucket, the latest first."""
        self._roll()
        return [dict(bucket) for bucket in reversed(self._buckets)]

    def latencies(self) -> tuple[float, dict[str, float]]:
        """Return the mean latency, and the percentiles by name: 0.95 is what 95 of 100 do not exceed."""
        self._roll()
        ordered = sorted(latency for bucket in self._latencies for latency in bucket)
        if not ordered:
            return 0.0, {f"{each:g}": 0.0 for each in PERCENTILES}
        last = len(ordered) - 1
        return sum(ordered) / len(ordered), {f"{each:g}": ordered[round(last * each)] for each in PERCENTILES}

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Add the counts of another window. Raises TypeError for what are none."""
        for name, count in counts.items():
            if not isinstance(name, str) or type(count) is not int:
                raise TypeError(f"{name!r}: {count!r} is no count.")
        self._roll()
        self._buckets[-1].update(counts)

    def _now(self) -> int:
        return int(self._clock() / self._width) if self._by_itself else 0

    def _roll(self) -> None:
        if not self._by_itself:
            return
        now = self._now()
        for _ in range(min(now - self._number, self._buckets.maxlen or 1)):
            self.rotate()
        self._number = max(now, self._number)
