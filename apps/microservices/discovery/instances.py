"""One instance of a service, as a client of it sees it."""

from __future__ import annotations

from math import exp

DECAY = 10.0
"""Seconds after which what was seen of an instance counts for a third."""
FAILED = 1.0
"""What a failed call counts as, if it took less: whoever fails fast must not look quick."""
WINDOW = 10
"""Seconds of which calls are counted."""
SLOW_START = 10.0
"""Seconds in which a new instance comes to its share."""
_LEAST_WEIGHT = 0.1


class Instance:
    """Where an instance is, how quick it has been, and how much it has to do. It is told the time, in seconds."""

    __slots__ = (
        "_calls",
        "_failures",
        "_latency",
        "_second",
        "_seen",
        "ejections",
        "failures_in_a_row",
        "fresh_at",
        "out",
        "out_since",
        "out_until",
        "pending",
        "trying",
        "url",
    )

    def __init__(self, url: str, now: float, latency: float = 0.0, *, fresh: bool = False) -> None:
        self.url = url
        self.pending = 0
        """Calls that are under way."""
        self.failures_in_a_row = 0
        self.ejections = 0
        """How often in succession it was left out."""
        self.out = False
        """Whether it is left out: from `out_since` until `out_until`, and then until a call that tries it succeeds."""
        self.out_since = self.out_until = now
        self.trying = False
        """Whether that call is under way."""
        self.fresh_at = now if fresh else now - SLOW_START
        """Since when it gets calls."""
        self._latency = latency
        self._seen = now
        self._second = int(now)
        self._calls = [0] * WINDOW
        self._failures = [0] * WINDOW

    def __repr__(self) -> str:
        return f"<Instance {self.url}>"

    def latency(self, now: float) -> float:
        """Return how long a call takes: peaks count at once, and are forgotten as time goes by."""
        idle = now - self._seen
        return self._latency * exp(-idle / DECAY) if idle > 1 and not self.pending else self._latency

    def load(self, now: float) -> float:
        """Return what one more call would cost: its latency, times the calls that are there."""
        # Of whom nothing has been heard yet, he who keeps a first call waiting is not the quickest.
        load = (self.latency(now) or (FAILED if self.pending else 0.0)) * (self.pending + 1)
        age = now - self.fresh_at
        return load if age >= SLOW_START else load / max(age / SLOW_START, _LEAST_WEIGHT)

    def observe(self, now: float, seconds: float) -> None:
        """Note how long a call took."""
        kept = exp((self._seen - now) / DECAY)
        self._latency = seconds if seconds >= self._latency else self._latency * kept + seconds * (1 - kept)
        self._seen = now

    def count(self, now: float, *, failed: bool) -> None:
        """Note how a call ended."""
        second = int(now)
        if second != self._second:
            self._advance(second)
        self._calls[second % WINDOW] += 1
        if failed:
            self._failures[second % WINDOW] += 1
            self.failures_in_a_row += 1
        else:
            self.failures_in_a_row = 0

    def counted(self, now: float) -> tuple[int, int]:
        """Return the calls of the window, and how many of them failed."""
        self._advance(int(now))
        return sum(self._calls), sum(self._failures)

    def admit(self, now: float) -> None:
        """Give it calls again, few at first, and forget how the ones before ended."""
        self.out = False
        self.failures_in_a_row = 0
        self._calls = [0] * WINDOW
        self._failures = [0] * WINDOW
        self.fresh_at = now
        self.trying = False

    def _advance(self, second: int) -> None:
        for passed in range(max(self._second + 1, second - WINDOW + 1), second + 1):
            self._calls[passed % WINDOW] = self._failures[passed % WINDOW] = 0
        self._second = max(second, self._second)
