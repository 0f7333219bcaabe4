"""Small factories that many toolkit tests share."""

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from microservices.context import RpcContext
from microservices.dispatcher import Dispatcher
from microservices.executor import Executor
from microservices.handlers import Handler
from microservices.instruments import dropped
from microservices.middleware import Endpoint, Middleware
from microservices.packets import Packet, Response


def service(
    *functions: Callable[..., Any],
    name: str = "shop",
    middlewares: Sequence[Middleware] = (),
    threads: int = 4,
    executor: Executor | None = None,
) -> Dispatcher:
    """Build a service from decorated functions."""
    return Dispatcher(name, [Handler(function) for function in functions], executor or Executor(threads), middlewares)


def context(**facts: Any) -> RpcContext:
    """Make the context of a message to `shop`, with `facts` of its own."""
    return RpcContext(**({"service": "shop", "pattern": "ask", "transport": "test", "side": "server"} | facts))


def packet(pattern: Any, data: Any = None, *, id: str | None = "1", **fields: Any) -> Packet:
    """Make a request as a transport would hand it over; an event with `id=None`."""
    if id is not None:
        fields["id"] = Raw(msgspec.json.encode(id))
    return Packet(pattern=Raw(msgspec.json.encode(pattern)), data=Raw(msgspec.json.encode(data)), **fields)


def frame(body: bytes) -> bytes:
    """Return a packet as NestJS sends it over TCP, its length in UTF-16 units."""
    return b"%d#%b" % (len(body.decode().encode("utf-16-le")) // 2, body)


class Answers:
    """A replier that keeps each packet as the plain object that would travel."""

    def __init__(self) -> None:
        self.packets: list[dict[str, Any]] = []

    def __call__(self, response: Response) -> None:
        self.packets.append(msgspec.json.decode(msgspec.json.encode(response)))


class Recorder:
    """A middleware that notes what it sees of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[RpcContext, Any, Any]] = []

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def recorded(data: Any, context: RpcContext) -> Any:
            try:
                outcome = await endpoint(data, context)
            except Exception as error:
                self.calls.append((context, data, error))
                raise
            self.calls.append((context, data, outcome))
            return outcome

        return recorded


async def settled(task: Awaitable[Any] | None) -> None:
    """Wait for what `Dispatcher.dispatch` returned."""
    if task is not None:
        await task


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Something for `def` handlers to wait at; opened when the test ends, so that no thread stays behind."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def losses() -> Callable[[str, str], int]:
    """Count what a place has dropped for a reason since the test began."""
    before = dropped.samples()

    def losses(place: str, reason: str) -> int:
        return dropped.value("shop", place, reason) - before.get(("shop", place, reason), 0)

    return losses
