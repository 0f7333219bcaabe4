"""A service that fails is left alone for a while (operations.md section 1, reliability.md section 7)."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from copy import copy
from enum import StrEnum
from typing import Any

import msgspec

from ..context import RpcContext
from ..exceptions import RpcException, Unavailable
from ..instruments import Counter
from ..middleware import Endpoint
from ..packets import pattern_name

logger = logging.getLogger("microservices.breaker")

transitions = Counter(
    "microservices_breaker_transitions_total",
    "How often calls to a target were stopped, tried and taken up again.",
    ("service", "target", "pattern", "from", "to"),
)

_BUCKETS = 10
_MOST_CIRCUITS = 1024
# Refusals of a limit, here or there, and of an open breaker say nothing about the health of a service.
REFUSALS = ("overloaded", "closed", "circuit-open")


class State(StrEnum):
    """Where a circuit stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"
    FORCED_OPEN = "forced-open"
    DISABLED = "disabled"
    OBSERVE = "observe"
    """It counts, and lets everything through."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """When a circuit opens, and how it closes again; times in seconds, rates from 0 to 1."""

    window: float = 10.0
    least_calls: int = 10
    """How many calls a window must have for its rates to mean anything."""
    failure_rate: float = 0.5
    slow_rate: float = 0.8
    """The part of calls that may take more than half of their deadline."""
    open_for: float = 2.0
    open_at_most: float = 30.0
    """How long it stays open at first, and at most after trials that failed."""
    trials: int = 3
    """How many calls must succeed for it to close."""
    trial_timeout: float = 10.0
    """How long a trial may take: one that hangs must not keep it from both ends."""
    warm_up: bool = False
    """Whether it stays closed in its first window, whatever happens there."""


class Circuit:
    """The state of one target: closed, or open after too many failures, or tried with a few calls.

    No clock and no loop of its own: each step is told the time, and `jitter(low, high)` spreads the ends of
    open periods. `changed(old, new)` is called after each transition.
    """

    def __init__(
        self,
        options: Options = Options(),  # noqa: B008 - frozen
        changed: Callable[[State, State], None] = lambda old, new: None,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.options = options
        self.state = State.CLOSED
        self.opened_at: float | None = None
        """When it was opened last, and not when it was made."""
        self._changed = changed
        self._jitter = jitter
        self._width = options.window / _BUCKETS
        self._epoch = 0
        """Grows with each transition: calls begun in another epoch change nothing."""
        self._until = 0.0
        self._openings = 0
        self._begun = self._passed = self._under_way = 0
        self._warm_until: float = math.nan if options.warm_up else -math.inf
        self._forget()

    # A call

    def enter(self, now: float) -> int | None:
        """Let a call begin: returns what its end is told with; None where it is refused."""
        state = self.state
        if state is State.CLOSED or state is State.DISABLED or state is State.OBSERVE:
            return self._epoch
        if state is State.FORCED_OPEN:
            return None
        if state is State.OPEN:
            if now < self._until:
                return None
            self._begun = self._passed = self._under_way = 0
            self._turn(State.HALF_OPEN)
        elif self._under_way and now >= self._until:
            self.open(now)  # what hangs for so long has failed
            return None
        if self._begun >= self.options.trials:
            return None
        if not self._under_way:
            self._until = now + self.options.trial_timeout
        self._begun += 1
        self._under_way += 1
        return self._epoch

    def succeeded(self, epoch: int, now: float, *, slow: bool = False) -> None:
        """Note that a call was answered; `slow` if late."""
        if epoch != self._epoch or self.state is State.DISABLED:
            return
        if self.state is State.HALF_OPEN:
            if slow:
                self.open(now)
                return
            self._under_way -= 1
            self._passed += 1
            if self._passed >= self.options.trials:
                self.close()
            return
        self._count(now, failed=False, slow=slow)
        if slow:
            self._judge(now)

    def failed(self, epoch: int, now: float) -> None:
        """Note that a call failed."""
        if epoch != self._epoch or self.state is State.DISABLED:
            return
        if self.state is State.HALF_OPEN:
            self.open(now)
            return
        self._count(now, failed=True, slow=False)
        self._judge(now)

    def forgotten(self, epoch: int) -> None:
        """Note that a call ended without saying anything about its target: it was given up, or refused on its way."""
        if epoch == self._epoch and self.state is State.HALF_OPEN:
            self._begun -= 1
            self._under_way -= 1

    def retry_after(self, now: float) -> float:
        """Return after how many seconds a call may be tried."""
        return max(0.0, self._until - now) if self.state in (State.OPEN, State.HALF_OPEN) else self.options.open_for

    def rates(self, now: float) -> tuple[int, float, float]:
        """Return the calls of the window, and which parts of them failed and were slow."""
        self._advance(now)
        calls = sum(self._calls)
        return calls, sum(self._failures) / (calls or 1), sum(self._slow) / (calls or 1)

    # An operator

    def close(self) -> None:
        """Let calls through again, and count anew."""
        self._openings = 0
        self._forget()
        self._turn(State.CLOSED)

    def open(self, now: float) -> None:
        """Refuse calls for a while, for longer each time in succession."""
        period = min(self.options.open_at_most, self.options.open_for * 2**self._openings)
        self._openings = min(self._openings + 1, 16)
        self.opened_at = now
        self._until = now + period * self._jitter(0.8, 1.2)
        self._turn(State.OPEN)

    def restore(self, state: State, opened_at: float | None) -> None:
        """Take the state of another circuit, as if it had been this one's own."""
        self.opened_at = opened_at
        if opened_at is not None:
            self._until = opened_at + self.options.open_for
        self._turn(State.OPEN if state is State.HALF_OPEN else state)  # its trials are not under way here

    def force_open(self) -> None:
        """Refuse all calls until somebody closes it."""
        self._turn(State.FORCED_OPEN)

    def disable(self) -> None:
        """Let all calls through and count none."""
        self._turn(State.DISABLED)

    def observe(self) -> None:
        """Let all calls through, and count."""
        self._turn(State.OBSERVE)

    def _turn(self, state: State) -> None:
        if state is self.state:
            return
        old, self.state = self.state, state
        self._epoch += 1
        self._changed(old, state)

    def _judge(self, now: float) -> None:
        if self.state is not State.CLOSED or now < self._warm_until:
            return
        calls, failed, slow = self.rates(now)
        options = self.options
        if calls >= options.least_calls and (failed >= options.failure_rate or slow >= options.slow_rate):
            self.open(now)

    # The window

    def _forget(self) -> None:
        self._calls = [0] * _BUCKETS
        self._failures = [0] * _BUCKETS
        self._slow = [0] * _BUCKETS
        self._bucket = -1

    def _count(self, now: float, *, failed: bool, slow: bool) -> None:
        bucket = int(now / self._width)
        if bucket != self._bucket:
            if math.isnan(self._warm_until):  # its first call
                self._warm_until = now + self.options.window
            self._advance(now)
        place = bucket % _BUCKETS
        self._calls[place] += 1
        if failed:
            self._failures[place] += 1
        if slow:
            self._slow[place] += 1

    def _advance(self, now: float) -> None:
        bucket = int(now / self._width)
        for passed in range(max(self._bucket + 1, bucket - _BUCKETS + 1), bucket + 1):
            place = passed % _BUCKETS
            self._calls[place] = self._failures[place] = self._slow[place] = 0
        self._bucket = max(bucket, self._bucket)


class Breaker:
    """A Middleware that refuses calls to a pattern whose service fails, with Unavailable ("circuit-open").

    A failure is a connection that fails, a deadline that passes, or an answer of 500 and above; an answer of
    4xx is a success, and refusals of limits, 429 among them, and calls that were given up are neither. `source` is
    what this process calls itself.
    """

    def __init__(
        self,
        options: Options = Options(),  # noqa: B008 - frozen
        *,
        source: str = "",
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._options = options
        self._source = source
        self._clock = clock
        self._jitter = jitter
        self.circuits: dict[tuple[str, str], Circuit] = {}
        """By service and pattern. Bounded: a caller may make patterns from data, and the rest share one."""

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        clock, circuits = self._clock, self.circuits

        async def guarded(data: Any, context: RpcContext) -> Any:
            circuit = circuits.get((context.service, context.pattern)) or self._circuit(context)
            began = clock()
            epoch = circuit.enter(began)
            if epoch is None:
                raise self._refusal(circuit, context, began)
            try:
                if circuit.state is State.HALF_OPEN:
                    result = await self._try(endpoint, data, context)
                else:
                    result = await endpoint(data, context)
            except RpcException as error:
                if error.code in REFUSALS or error.status_code == 429:
                    circuit.forgotten(epoch)
                elif error.status_code >= 500:
                    circuit.failed(epoch, clock())
                else:
                    circuit.succeeded(epoch, clock())
                raise
            except BaseException:
                circuit.forgotten(epoch)
                raise
            now, deadline = clock(), context.deadline
            circuit.succeeded(epoch, now, slow=deadline is not None and now - began > (deadline - began) / 2)
            return result

        return guarded

    def _circuit(self, context: RpcContext) -> Circuit:
        key = context.service, context.pattern
        if len(self.circuits) >= _MOST_CIRCUITS:
            key = context.service, "*"
        circuit = self.circuits.get(key)
        if circuit is None:
            pattern = pattern_name(key[1])

            def changed(old: State, new: State) -> None:
                transitions.add(self._source, context_service, pattern, old, new)
                logger.warning("%s: calls of %s %s: %s, was %s", self._source, context_service, pattern, new, old)

            context_service = context.service
            circuit = self.circuits[key] = Circuit(self._options, changed, self._jitter)
        return circuit

    async def _try(self, endpoint: Endpoint, data: Any, context: RpcContext) -> Any:
        trial = copy(context)
        trial.cap_deadline(self._options.trial_timeout)
        try:
            return await endpoint(data, trial)
        finally:
            context.id, context.peer, context.tried = trial.id, trial.peer, trial.tried

    def _refusal(self, circuit: Circuit, context: RpcContext, now: float) -> Unavailable:
        text = f"{context.service} {pattern_name(context.pattern)} has failed too often, and is left alone for a while."
        refusal = Unavailable(text, code="circuit-open")
        refusal.error["retryAfter"] = round(circuit.retry_after(now), 3)
        return refusal
