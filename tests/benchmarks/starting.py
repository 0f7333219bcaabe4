"""How long a start takes until the process is ready, and what it has then: one call is one start.

The rate is starts a second, p50 the milliseconds until it is ready, the time on a core that of the start.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from .measure import Case, Sample, Side
from .peers import NESTS, Program, Run, nest, nest_name, ours
from .processes import FIRST_CORE, LAST_CORE, Tree, free_port
from .shop import ALL_READY, Shop

STARTS = 4

Start = Callable[[ExitStack], Tree]
"""Starts something that ends with the stack; returns when it is ready."""


def starts(stack: ExitStack) -> Iterator[Case]:
    """Yield the cases: one service, and the fleet."""
    shop = Shop(stack)

    def users(one: ExitStack) -> Tree:
        return shop.start(one, "users", "runmicroservice", "users")

    def fleet(one: ExitStack) -> Tree:
        return shop.start(one, "fleet", "runfleet", ready=ALL_READY, cores=(FIRST_CORE, LAST_CORE))

    sides = [
        Side(name, "TCP server", _starting(_program(name, partial(nest, each, "server.js"))))
        for each in NESTS
        if (name := nest_name(each))
    ]
    sides.append(
        Side("ours, no Django", "TCP server, uvloop", _starting(_program("ours", partial(ours, "service.py"))))
    )
    on = "Django, ORM, TCP and gRPC servers, event bus, health pages"
    sides.append(Side("ours, users of the shop", on, _starting(users)))
    yield Case("one service until it is ready (p50), its resident memory; a call is a start", STARTS, sides, warm_up=1)

    on = "five services, Valkey, the process that forks them and the one that watches"
    yield Case(
        "the fleet on two cores until all are ready (p50), its memory as PSS",
        STARTS,
        [Side("runfleet", on, _starting(fleet, lambda tree: tree.share))],
        warm_up=1,
    )


def _program(name: str, program: Callable[[dict[str, Any]], Program]) -> Start:
    return lambda one: program({"url": f"tcp://127.0.0.1:{free_port()}"}).start(one, name)


def _starting(start: Start, memory: Callable[[Tree], float] = lambda tree: tree.memory) -> Run:
    def run(calls: int) -> Sample:
        seconds, cpu, resident = [], [], []
        for _ in range(calls):
            with ExitStack() as one:
                began = time.perf_counter()
                tree = start(one)
                seconds.append(time.perf_counter() - began)
                cpu.append(tree.cpu)
                resident.append(memory(tree))
        took = statistics.median(seconds)
        return Sample(1 / took, statistics.median(cpu) * 1e6, 0, statistics.median(resident), took * 1e3)

    return run
