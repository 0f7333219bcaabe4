"""One instance of a service, as a client of it sees it."""

from __future__ import annotations

from math import exp
from typing import NamedTuple

DECAY = 10.0
"""Seconds after which what was seen of an instance counts for a third."""
FAILED = 1.0
"""What a failed call counts as, if it took less: whoever fails fast must not look quick."""
WINDOW = 10
"""Seconds of which calls are counted."""
SLOW_START = 10.0
"""Seconds in which a new instance comes to its share."""
WEIGHTS = range(1, 101)
_LEAST_SHARE = 0.1


class Location(NamedTuple):
    """Where an instance is, and what it is meant for."""

    url: str
    weight: int = 1
    """How many calls it gets for one that an instance of weight 1 gets; 1 to 100."""
    zone: str = ""


class Instance:
    """Where an instance is, how quick it has been, and how much it has to do. It is told the time, in seconds."""

    __slots__ = (
        "_calls",
        "_failures",
        "_heard",
        "_latency",
        "_second",
        "_seen",
        "ejections",
        "failures_in_a_row",
        "out",
        "out_since",
        "out_until",
        "pending",
        "size",
        "trying",
        "url",
        "warm_at",
        "weight",
        "zone",
    )

    def __init__(self, location: Location, now: float, latency: float = 0.0, *, fresh: bool = False) -> None:
        self.url, self.weight, self.zone = location
        self.size = 1.0
        """Its weight, where that of the lightest is 1."""
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
        self.warm_at = now + SLOW_START if fresh else now
        """When it gets as many calls as the others."""
        self._latency = latency
        self._seen = self._heard = now
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
        """Return what one more call would cost: its latency, times the calls that are there for its size."""
        pending = self.pending
        if not pending:
            return self._latency if now - self._seen <= 1 else self.latency(now)
        # Who owes answers and is silent is at least so slow, before a call of his has ended. Of whom nothing has
        # been heard yet, he who keeps a first call waiting is not the quickest.
        silent = now - self._heard
        latency = self._latency or FAILED
        return (silent if silent > latency else latency) * (pending / self.size + 1)

    def crowd(self, now: float) -> float:
        """Return how many calls it would have with one more, for its size."""
        return self.pending / self.size + 1

    def share(self, now: float) -> float:
        """Return the part of the calls meant for it that it gets, from 0 to 1: few at first."""
        return max(1 - (self.warm_at - now) / SLOW_START, _LEAST_SHARE)

    def begin(self, now: float) -> None:
        """Note that a call begins."""
        if not self.pending:
            self._heard = now
        self.pending += 1

    def end(self, now: float, seconds: float, *, failed: bool) -> None:
        """Note that a call has ended, after how long and how."""
        self.pending -= 1
        if failed:
            self.failures_in_a_row += 1
            if seconds < FAILED:
                seconds = FAILED
        else:
            self.failures_in_a_row = 0
        if seconds >= self._latency:
            self._latency = seconds
        else:
            self._latency = seconds + (self._latency - seconds) * exp((self._seen - now) / DECAY)
        self._seen = self._heard = now
        second = int(now)
        if second != self._second:
            self._advance(second)
        self._calls[second % WINDOW] += 1
        if failed:
            self._failures[second % WINDOW] += 1

    def leave(self) -> None:
        """Note that a call has ended which says nothing of the instance."""
        self.pending -= 1

    def counted(self, now: float) -> tuple[int, int]:
        """Return the calls of the window, and how many of them failed."""
        self._advance(int(now))
        return sum(self._calls), sum(self._failures)

    def admit(self, now: float) -> None:
        """Give it calls again, few at first, and forget how the ones before ended."""
        self.out = self.trying = False
        self.out_until = now
        self.failures_in_a_row = 0
        self._calls = [0] * WINDOW
        self._failures = [0] * WINDOW
        self.warm_at = now + SLOW_START

    def _advance(self, second: int) -> None:
        for passed in range(max(self._second + 1, second - WINDOW + 1), second + 1):
            self._calls[passed % WINDOW] = self._failures[passed % WINDOW] = 0
        self._second = max(second, self._second)
