"""gRPC: unary calls, each with a trace of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from .measure import Case, Side
from .peers import HERE, NESTS, Program, nest, nest_name, ours, served
from .processes import LAST_CORE, Process, free_port

CALLS, IN_FLIGHT = 8_000, 64
WARM_UP = 3_000  # of each run, since each has a client of its own
PROTOS = {"proto_path": [str(HERE / "proto")]}


def unary(stack: ExitStack) -> Iterator[Case]:
    """Yield the cases: every server under our client, and under NestJS 12's."""
    servers: list[tuple[str, str, int, Process]] = []
    for version in NESTS:
        port = free_port()
        program = nest(version, "server-grpc.js", {"url": f"grpc://127.0.0.1:{port}"})
        servers.append(
            (nest_name(version), "routing, exception filter", port, program.start(stack, nest_name(version)))
        )
    for colour, name in (("task", "ours, async"), ("pool", "ours, def")):
        port = free_port()
        program = ours("service.py", {"url": f"grpc://127.0.0.1:{port}", "options": PROTOS, "colour": colour})
        on = "routing, errors mapped, payload validated, limits, deadline, trace id"
        servers.append((name, on, port, program.start(stack, name)))

    def by(program: Callable[[dict[str, Any]], Program], **more: Any) -> Callable[[int, int], dict[str, Any]]:
        facts = {"inFlight": IN_FLIGHT, "warmUp": WARM_UP, **more}
        return lambda port, calls: program({**facts, "url": f"grpc://127.0.0.1:{port}", "calls": calls}).call(LAST_CORE)

    by_us = by(partial(ours, "client.py"), options=PROTOS)
    by_nest = by(partial(nest, NESTS[-1], "client.js"))
    for client, load in (("our client", by_us), (f"the client of {nest_name(NESTS[-1])}", by_nest)):
        sides = [
            Side(name, on, served(server, lambda calls, port=port, load=load: load(port, calls)))
            for name, on, port, server in servers
        ]
        yield Case(f"server under {client}, {IN_FLIGHT} in flight", CALLS, sides, WARM_UP)
