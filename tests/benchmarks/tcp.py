"""TCP: the server, the client, events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from .measure import Case, Side
from .peers import BUILD, NESTS, Program, Run, load, made_by, nest, nest_name, ours, served
from .processes import FIRST_CORE, LAST_CORE, Process, free_port

SHAPES = ((1, 128, 60_000), (16, 4, 60_000), (1, 1, 10_000))
"""Connections, calls in flight on each, calls."""

NEST_ON = "routing, exception filter"
OURS_ON = "routing, errors mapped, payload validated, limits, back-pressure"
ALL_ON = f"{OURS_ON}, trace id, deadline, drop counters, call log (1 in 100)"
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "deadline": "5000"}

Served = tuple[str, str, Process, int]
"""A server's name, what is on, the process and its port."""


def packet(pattern: Any, data: Any, **more: Any) -> str:
    """Return a packet as NestJS writes it."""
    return json.dumps({"pattern": pattern, "data": data, **more}, separators=(",", ":"))


SUM = packet({"cmd": "sum"}, [1, 2, 3], id="0123456789abcdef01234")
USER = packet("user", {"id": 7, "name": "Ada"}, metadata=TRACE, id="0123456789abcdef01234")
NOTED = packet("noted", {"n": 1})
COUNT = packet("count", None, id="0123456789abcdef01234")


def server(stack: ExitStack) -> Iterator[Case]:
    """Yield the cases of the server: like for like, and with all features on."""
    nests, plain = _nests(stack), _ours(stack, OURS_ON)
    plain.append(_own(stack, "ours, inline, no uvloop", OURS_ON, loop="asyncio"))
    for connections, in_flight, calls in SHAPES:
        yield _case(
            f"server, {connections} x {in_flight} in flight", [*nests, *plain], SUM, connections, in_flight, calls
        )
    yield _case(
        "server, all features on, 1 x 128 in flight", [*nests, *_ours(stack, ALL_ON, all=True)], USER, 1, 128, 60_000
    )


def client(stack: ExitStack) -> Iterator[Case]:
    """Yield the case of the client, against a compiled server that is never the limit."""
    port = free_port()
    answers = Process("answers", [str(BUILD / "answers"), str(port)], LAST_CORE)
    stack.callback(answers.stop)

    facts = {"url": f"tcp://127.0.0.1:{port}", "inFlight": 128, "warmUp": 6_000, "kind": "send"}

    def run(program: Callable[[dict[str, Any]], Program]) -> Run:
        return made_by(lambda calls: program({**facts, "calls": calls}).call(FIRST_CORE), answers)

    sides = [Side(nest_name(each), "ids", run(partial(nest, each, "client.js"))) for each in NESTS]
    sides.append(Side("ours", "ids, deadline, trace id, limits", run(partial(ours, "client.py"))))
    yield Case("client, 128 in flight", 60_000, sides)


def events(stack: ExitStack) -> Iterator[Case]:
    """Yield the case of events that a handler counts; a request behind them tells when all were heard."""
    sides = [*_nests(stack), *_ours(stack, OURS_ON)]
    yield Case(
        "events, 1 connection",
        100_000,
        [Side(name, on, _hearing(server, port)) for name, on, server, port in sides],
    )


def _hearing(server: Process, port: int) -> Run:
    emit, ask = load(port, 1, 64, NOTED, COUNT), load(port, 1, 1, COUNT)
    heard = 0

    def until_heard(calls: int) -> dict[str, Any]:
        nonlocal heard
        heard += calls
        made = emit(calls)
        for _ in range(100):
            if made["answer"]["response"] >= heard:
                return made
            made = {**made, "answer": ask(1)["answer"]}  # some are still at work
        raise RuntimeError(f"{made['answer']['response']} of {heard} events were heard")

    return served(server, until_heard)


def _nests(stack: ExitStack) -> list[Served]:
    return [
        (nest_name(each), NEST_ON, *_start(stack, nest_name(each), partial(nest, each, "server.js"))) for each in NESTS
    ]


def _ours(stack: ExitStack, on: str, **facts: Any) -> list[Served]:
    colours = {"ours, inline": "inline", "ours, async": "task"}
    return [_own(stack, name, on, colour=colour, **facts) for name, colour in colours.items()]


def _own(stack: ExitStack, name: str, on: str, **facts: Any) -> Served:
    return name, on, *_start(stack, name, lambda told: ours("service.py", {**told, **facts}))


def _start(stack: ExitStack, name: str, program: Callable[[dict[str, Any]], Program]) -> tuple[Process, int]:
    port = free_port()
    return program({"url": f"tcp://127.0.0.1:{port}"}).start(stack, name), port


def _case(name: str, sides: list[Served], request: str, connections: int, in_flight: int, calls: int) -> Case:
    return Case(
        name,
        calls,
        [
            Side(name, on, served(server, load(port, connections, in_flight, request)))
            for name, on, server, port in sides
        ],
    )
