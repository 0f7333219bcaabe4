"""A gateway that asks a service: the shop's own as production runs it, beside NestJS on express and on fastify.

All of them ask one service, small and never the limit, so that only the gateway is measured. It is not the shop's
users: NestJS's gateway asks by a number, as its guide has it, and the shop's users have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product

from .measure import WARM_UP, Case, Side
from .peers import NESTS, Run, load, nest, nest_name, ours, served
from .processes import LAST_CORE, Process, free_port
from .shop import Shop

SHAPES = ((64, 2_560, 8), (1, 1_200, 4))
"""Connections, each with one request in flight, our requests, and how many times those NestJS gets.

Its runs would be too short otherwise.
"""

NEST_ON = "routing, id parsed as a number, errors mapped"
OURS_ON = (
    "uvicorn on uvloop, Django with its 8 middlewares, DRF: reply shaped by a serializer; errors as problem documents, "
    "deadline, trace id, a JSON log line a call, heartbeats"
)


def users(stack: ExitStack) -> Iterator[Case]:
    """Yield the cases of `GET /api/users/7`."""
    url = f"tcp://127.0.0.1:{free_port()}"
    command, *rest = ours("gateway_service.py", {"url": url})
    stack.callback(Process("users", command, LAST_CORE, *rest).stop)
    gateways = []
    for adapter, version in product(("express", "fastify"), NESTS):
        name, port = f"{nest_name(version)}, {adapter}", free_port()
        program = nest(version, "gateway.js", {"port": port, "adapter": adapter, "users": url})
        gateways.append((name, NEST_ON, program.start(stack, name), port))
        load(port, 64, 1, request(port))(WARM_UP)  # ours is not compiled while it runs, and needs fewer
    shop = Shop(stack)
    own = shop.start(stack, "ours", "serve", SERVICES="gateway", USERS_URL=url)
    gateways.append(("ours", OURS_ON, own, shop.port))
    for connections, calls, times in SHAPES:
        sides = []
        for name, on, server, port in gateways:
            run = served(server, load(port, connections, 1, request(port)))
            sides.append(Side(name, on, run if name == "ours" else _repeated(run, times)))
        yield Case(
            f"GET /api/users/7, {connections} x 1 in flight (NestJS: {times} times the calls)",
            calls,
            sides,
            warm_up=300,
        )


def _repeated(run: Run, times: int) -> Run:
    return lambda calls: run(calls * times)


def request(port: int) -> str:
    """Return what is sent."""
    return f"GET /api/users/7 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: application/json\r\n\r\n"
