"""Callers: so many a second, whatever comes of them, or so many at a time; and what became of their calls."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from microservices import transports
from microservices.balanced import Balanced
from microservices.client import Client
from microservices.discovery.balancer import Balancer
from microservices.exceptions import RpcException
from microservices.resilience.policies import Plan
from microservices.transports.base import Caller, ClientProxy

_AFTER_FAILURE = 0.01
_TICK = 0.01

Call = Callable[[int], Awaitable[Any]]
"""Makes the call of a number."""


class Failed(Exception):
    """What a call raises that failed otherwise than with an RpcException; it says how."""


class Done(NamedTuple):
    """A call that has ended: when it began, how many seconds it took, and "ok" or what became of it."""

    number: int
    began: float
    seconds: float
    outcome: str

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"


class Results(list[Done]):
    """Calls that have ended.

    How long they took is told less the time in which their callers' own loop stood still: a busy machine must not
    pass for a slow service.
    """

    def __init__(self, done: Iterable[Done] = (), still: list[tuple[float, float]] | None = None) -> None:
        super().__init__(done)
        self.still = [] if still is None else still
        """From when to when the callers' own loop stood still, on its clock."""

    @property
    def failures(self) -> Counter[str]:
        """What became of those that failed."""
        return Counter(done.outcome for done in self if not done.ok)

    @property
    def succeeded(self) -> Results:
        return Results((done for done in self if done.ok), self.still)

    def ended_by(self, time: float) -> Results:
        """Return those that ended by then, on the loop's clock."""
        return Results((done for done in self if done.began + done.seconds <= time), self.still)

    @property
    def slowest(self) -> float:
        """How many seconds the slowest took."""
        return self.percentile(100)

    def percentile(self, percent: float) -> float:
        """Return within how many seconds so many of a hundred ended; 0 where there are none."""
        if not self:
            return 0.0
        ordered = sorted(map(self._took, self))
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    def _took(self, done: Done) -> float:
        began, ended = done.began, done.began + done.seconds
        still = sum(
            min(ended, until) - max(began, since) for since, until in self.still if since < ended and until > began
        )
        return done.seconds - still


async def steadily(call: Call, rate: float, seconds: float) -> Results:
    """Begin `rate` calls a second, whether the ones before have ended or not, as the outside world does."""
    loop = asyncio.get_running_loop()
    results = Results()
    began = loop.time()
    async with _watched(results), asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(began + number / rate - loop.time())
            group.create_task(make(call, number, results))
    return results


async def crowd(call: Call, callers: int, seconds: float) -> Results:
    """Let so many callers make one call after the other."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    results = Results()
    numbers = iter(range(10**9))

    async def caller() -> None:
        while loop.time() < end:
            await make(call, next(numbers), results)
            if not results[-1].ok:
                await asyncio.sleep(_AFTER_FAILURE)  # a refusal takes no time, and would leave none to others

    async with _watched(results), asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return results


@asynccontextmanager
async def _watched(results: Results) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()

    async def watch() -> None:
        while True:
            due = loop.time() + _TICK
            await asyncio.sleep(_TICK)
            if (now := loop.time()) > due + _TICK:
                results.still.append((due, now))

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def make(call: Call, number: int, results: Results) -> None:
    """Make one call, and note what became of it."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        await call(number)
        outcome = "ok"
    except Failed as error:
        outcome = str(error)
    except RpcException as error:
        outcome = error.code or str(error.status_code)
    results.append(Done(number, began, loop.time() - began, outcome))


def client_of(
    url: str, policies: dict[str, Any] | None = None, patterns: dict[str, dict[str, Any]] | None = None
) -> Client:
    """Return a client of the service at `url`, with the policies that settings may say; without any for None.

    `url` may be several, with commas between them.
    """
    urls = transports.split(url)
    plan = None if policies is None else Plan("work", policies, patterns or {})

    def proxy(url: str) -> ClientProxy:
        address = transports.parse(url)
        return transports.load(address, "client")(address, "work")  # type: ignore[no-any-return]

    def connect() -> Caller:
        return proxy(url) if len(urls) == 1 else Balanced(Balancer("work", urls, source="tests"), proxy)

    return Client("work", connect, source="tests", plan=plan)
