"""Requests and events through brokers: the server under one load for all, and both ends together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tests.brokers import Broker, Kafka, Mosquitto, Nats, RabbitMQ, Valkey

from .measure import Case, Side
from .peers import NESTS, Program, nest, nest_name, ours, served
from .processes import LAST_CORE, Process, free_port

CALLS, KAFKA_CALLS = 30_000, 6_000
IN_FLIGHT = 128
WARM_UP = 2_000  # of each run, since each has a client of its own

NEST_ON = "routing, exception filter"
OURS_ON = "routing, errors mapped, payload validated, limits, back-pressure, deadline"


class Place(NamedTuple):
    """Where one side's server is: for NestJS, and for ours."""

    name: str
    url: str
    options: dict[str, Any]
    ours: str


def messages(kind: type[Broker]) -> Callable[[ExitStack], Iterator[Case]]:
    """Return the workload of one broker."""

    def cases(stack: ExitStack) -> Iterator[Case]:
        calls = KAFKA_CALLS if kind is Kafka else CALLS
        places = _places(stack, kind)
        nests = [
            (place, nest(version, "server.js", {"url": place.url, "options": place.options}).start(stack, place.name))
            for place, version in zip(places, NESTS, strict=False)
        ]
        own = [
            (place, ours("service.py", {"url": place.ours, "colour": colour}).start(stack, place.name))
            for place, colour in zip(places[len(NESTS) :], ("inline", "task"), strict=True)
        ]
        for kind_of, name in (("send", "server under our client"), ("emit", "events from our client")):
            sides = [_side(place, server, _our_client(place, kind_of)) for place, server in (*nests, *own)]
            yield Case(f"{name}, {IN_FLIGHT} in flight", calls, sides, WARM_UP)
        if kind is Mosquitto:
            return  # NestJS's client of MQTT stalls with more than one call in flight
        sides = [_side(p, s, _nest_client(v, p)) for v, (p, s) in zip(NESTS, nests, strict=True)]
        sides += [_side(place, server, _our_client(place, "send")) for place, server in own]
        yield Case(f"both ends, {IN_FLIGHT} in flight", calls, sides, WARM_UP)

    return cases


def streams(stack: ExitStack) -> Iterator[Case]:
    """Yield the case of Redis Streams: events that are acknowledged, and come again where a handler fails."""
    sides = []
    for colour, name in (("inline", "ours, inline"), ("task", "ours, async")):
        bus = _broker(stack, Valkey).url.replace("redis", "redis-streams", 1)
        place = Place(name, "", {}, f"tcp://127.0.0.1:{free_port()}")
        server = ours("service.py", {"url": place.ours, "bus": bus, "colour": colour}).start(stack, name)
        sides.append(_side(place, server, _our_client(place, "emit", bus=bus)))
    yield Case(f"events over Redis Streams, {IN_FLIGHT} in flight", CALLS, sides, WARM_UP)


def _places(stack: ExitStack, kind: type[Broker]) -> list[Place]:
    names = [*map(nest_name, NESTS), "ours, inline", "ours, async"]
    if kind is RabbitMQ:  # which is too large for one each
        url = _broker(stack, kind).url
        queues = [f"bench-{number}" for number in range(len(names))]
        return [
            Place(name, url, {"queue": queue}, f"{url}?queue={queue}")
            for name, queue in zip(names, queues, strict=True)
        ]
    urls = [_broker(stack, kind).url for _ in names]
    return [Place(name, url, {}, url) for name, url in zip(names, urls, strict=True)]


def _broker(stack: ExitStack, kind: type[Broker]) -> Broker:
    folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    return stack.enter_context(kind(Path(folder)))


def _side(place: Place, server: Process, client: Callable[[int], Program]) -> Side:
    on = NEST_ON if place.name.startswith("NestJS") else OURS_ON
    return Side(place.name, on, served(server, lambda calls: client(calls).call(LAST_CORE)))


def _our_client(place: Place, kind: str, **more: Any) -> Callable[[int], Program]:
    facts = {"url": place.ours, "inFlight": IN_FLIGHT, "warmUp": WARM_UP, "kind": kind, **more}
    return lambda calls: ours("client.py", {**facts, "calls": calls})


def _nest_client(version: str, place: Place) -> Callable[[int], Program]:
    facts = {"url": place.url, "options": place.options, "inFlight": IN_FLIGHT, "warmUp": WARM_UP, "kind": "send"}
    return lambda calls: nest(version, "client.js", {**facts, "calls": calls})


WORKLOADS = {
    "redis": messages(Valkey),
    "redis-streams": streams,
    "nats": messages(Nats),
    "mqtt": messages(Mosquitto),
    "rmq": messages(RabbitMQ),
    "kafka": messages(Kafka),
}
