"""What the policies around a call cost where all is well, without the call: nobody is asked, nothing is sent."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from microservices.balanced import Balanced
from microservices.context import RpcContext
from microservices.discovery.balancer import Balancer
from microservices.middleware import Endpoint, chain
from microservices.resilience.policies import Guard, Plan

from .measure import Case, Sample, Side

CALLS = 100_000
BARE: Mapping[str, Any] = {"capacity": 0, "retries": 0, "breaker": False}
CHAINS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "nothing": ("the endpoint alone", BARE),
    "bulkhead": ("100 at a time", {**BARE, "capacity": 100}),
    "retry": ("with its budget", {**BARE, "retries": 2}),
    "breaker": ("closed", {**BARE, "breaker": True}),
    "attempt timeout": ("1 s", {**BARE, "attempt_timeout": 1}),
    "coalescing": ("nobody else asks", {**BARE, "coalesce": True}),
    "cache": ("a hit", {**BARE, "cache": 60}),
    "hedging": ("answered at once", {**BARE, "hedge": True}),
    "the default chain": ("bulkhead, retry, breaker", {}),
}
INSTANCES = ("tcp://a:1", "tcp://b:1", "tcp://c:1")


def closed_path(stack: ExitStack) -> Iterator[Case]:
    """Yield the case: each policy by itself, and the chain that a call has by default."""
    sides = [Side(name, on, _Calls(policies)) for name, (on, policies) in CHAINS.items()]
    balanced = Balanced(Balancer("users", INSTANCES), lambda url: _Answering())  # type: ignore[arg-type,return-value]
    sides.append(Side("a choice", f"of {len(INSTANCES)} instances", _Calls(BARE, balanced.send)))
    yield Case("one call at a time in one process; what `nothing` costs is in all", CALLS, sides)


class _Calls:
    def __init__(self, policies: Mapping[str, Any], endpoint: Endpoint | None = None) -> None:
        self._endpoint = endpoint or _answer
        self._plan = Plan("users", {"retry": "safe", **policies}, {})

    def __call__(self, calls: int) -> Sample:
        return asyncio.run(self._run(calls))

    async def _run(self, calls: int) -> Sample:
        guard = Guard(self._plan, load=lambda path: None)
        send = chain(self._endpoint, guard.chain("get_user"))
        context = RpcContext(service="users", pattern="get_user", transport="local", side="client")
        context.cap_deadline(3600)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            context.tried = ()
            answer = await send(None, context)
        cpu, took = time.process_time() - cpu, time.perf_counter() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return Sample(calls / took, cpu / calls * 1e6, 0, memory, answer=answer)


class _Answering:
    """A proxy that answers at once."""

    scheme = "tcp"
    read_record = None

    async def send(self, data: Any, context: RpcContext) -> Any:
        return b"1"


async def _answer(data: Any, context: RpcContext) -> Any:
    return b"1"
