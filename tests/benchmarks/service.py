"""The service that is measured, in our words: `service.py '{"url": URL, "colour": "inline", "all": false}'`."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps"))

from microservices import transports
from microservices.dispatcher import Dispatcher
from microservices.executor import Executor
from microservices.handlers import Handler, event_pattern, grpc_method, message_pattern
from microservices.telemetry.logging import CallLog


class Facts(msgspec.Struct):
    """What the command line says."""

    url: str
    colour: str = "inline"
    """How the handlers are written: inline, task or pool."""
    all: bool = False
    """Whether every feature is on."""
    loop: str = "uvloop"
    options: dict[str, Any] = {}
    """What the URL cannot say of the transport."""
    bus: str = ""
    """Where events come from, if not by the URL."""


class Name(msgspec.Struct):
    """A payload that is checked field by field."""

    id: Annotated[int, msgspec.Meta(ge=1)]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=80)]


class Greeting(msgspec.Struct):
    """What is answered to it."""

    id: int
    name: str
    greeting: str


class Noted(msgspec.Struct):
    """An event."""

    n: int


class Numbers(msgspec.Struct):
    """What is summed up over gRPC."""

    numbers: list[int] = []


class Total(msgspec.Struct):
    """Their sum."""

    total: int


def handlers(colour: str, topics: bool) -> list[Handler]:
    """Return the handlers, written in one colour; a topic of Kafka has a plain name."""
    heard = 0

    def add(data: list[int]) -> int:
        return sum(data)

    def greet(data: Name) -> Greeting:
        return Greeting(data.id, data.name, f"Hello, {data.name}!")

    def note(data: Noted) -> None:
        nonlocal heard
        heard += 1

    def count(data: Any) -> int:
        return heard

    def total(data: Numbers) -> Total:
        return Total(sum(data.numbers))

    def coloured(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if colour != "task":
            return function

        async def handle(data: Any) -> Any:
            return function(data)

        handle.__annotations__ = function.__annotations__
        return handle

    inline = colour == "inline"
    answering = {"user": greet, "count": count}
    return [
        Handler(message_pattern("sum" if topics else {"cmd": "sum"}, inline=inline)(coloured(add))),
        *(Handler(message_pattern(name, inline=inline)(coloured(each))) for name, each in answering.items()),
        Handler(event_pattern("noted", inline=inline)(coloured(note))),
        Handler(grpc_method("Bench", "Sum")(coloured(total))),
    ]


async def main(facts: Facts) -> None:
    address = transports.parse(facts.url)
    address = address._replace(options={**address.options, **facts.options})
    middlewares = [CallLog(sample=0.01)] if facts.all else []
    dispatcher = Dispatcher("bench", handlers(facts.colour, address.scheme == "kafka"), Executor(), middlewares)
    servers = [transports.load(address, "server")(address, dispatcher)]
    if facts.bus:
        bus = transports.parse(facts.bus)
        servers.append(transports.load(bus, "listener")(bus, dispatcher))
    for server in servers:
        await server.listen()
    gc.freeze()
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for server in servers:
        await server.close(1)


def loop_factory(name: str) -> Any:
    if name != "uvloop":
        return None
    import uvloop

    return uvloop.new_event_loop


if __name__ == "__main__":
    facts = msgspec.json.decode(sys.argv[1], type=Facts)
    with asyncio.Runner(loop_factory=loop_factory(facts.loop)) as runner:
        runner.run(main(facts))
