"""Calls inside one process, and the bus of one process."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from microservices.client import Client
from microservices.context import RpcContext
from microservices.dispatcher import Dispatcher
from microservices.exceptions import DeadlineExceeded, RpcException, Unavailable
from microservices.handlers import event_pattern, message_pattern
from microservices.transports import parse
from microservices.transports.base import ClientProxy
from microservices.transports.local import LocalClient, MemoryBus
from tests.toolkit.conftest import service
from tests.toolkit.transports.contract import PATIENCE, TransportContract, echo


class TestLocal(TransportContract):
    has_server = False
    bounded = False  # a caller of its own process is the bound

    async def serve(self, dispatcher: Dispatcher) -> None:
        return None

    def proxy(self, dispatcher: Dispatcher, server: None) -> ClientProxy:
        return LocalClient(dispatcher)


def bus_of(*dispatchers: Dispatcher) -> Client:
    """Make a bus that these services listen to."""
    bus = MemoryBus(parse("memory://"), dispatchers)
    return Client("events", lambda: bus)


def hearing(pattern: Any, heard: asyncio.Queue[Any], name: str = "") -> Callable[..., Any]:
    """Make a handler that notes an event."""

    @event_pattern(pattern)
    async def hear(data: Any, ctx: RpcContext) -> None:
        heard.put_nowait((name or ctx.service, data))

    return hear


@pytest.mark.asyncio
async def test_no_object_is_shared_between_caller_and_handler() -> None:
    @message_pattern("append")
    async def append(data: list[int]) -> list[int]:
        data.append(2)
        return data

    mine = [1]
    client = Client("shop", lambda: LocalClient(service(append)))

    assert await client.send("append", mine) == [1, 2]
    assert mine == [1]


@pytest.mark.asyncio
async def test_a_caller_who_gives_up_cancels_the_handler() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    @message_pattern("never")
    async def never() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    client = Client("shop", lambda: LocalClient(service(never)))
    call = asyncio.create_task(client.send("never", timeout=PATIENCE * 2))
    async with asyncio.timeout(PATIENCE):
        await started.wait()
        call.cancel()
        await cancelled.wait()

    assert call.cancelled()


@pytest.mark.asyncio
async def test_each_service_that_hears_an_event_gets_it_once() -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    bus = bus_of(
        service(hearing("made", heard), name="payments"),
        service(hearing({"event": "made"}, heard), name="deaf"),
        service(hearing("made", heard, "first"), hearing("made", heard, "second"), name="notifications"),
    )

    async with asyncio.timeout(PATIENCE):
        await bus.emit("made", 1)
        calls = [await heard.get() for _ in range(3)]
        await bus.close()

    assert calls == [("payments", 1), ("first", 1), ("second", 1)]
    assert heard.empty()


@pytest.mark.asyncio
async def test_a_request_handler_hears_no_event_of_the_bus() -> None:
    ran: list[Any] = []

    @message_pattern("made")
    async def made(data: Any) -> None:
        ran.append(data)

    bus = bus_of(service(made))
    await bus.emit("made", 1)
    await bus.close()

    assert ran == []


@pytest.mark.asyncio
async def test_a_bus_answers_no_requests() -> None:
    bus = bus_of(service(echo))

    with pytest.raises(RpcException, match="answers no requests"):
        await bus.send("echo", 1)


@pytest.mark.asyncio
async def test_emitting_returns_before_the_handlers_have_run() -> None:
    go_on = asyncio.Event()
    heard: list[Any] = []

    @event_pattern("made")
    async def made(data: Any) -> None:
        await go_on.wait()
        heard.append(data)

    bus = bus_of(service(made))
    await bus.emit("made", 1)
    before = list(heard)
    go_on.set()
    await bus.close()  # which waits for them

    assert (before, heard) == ([], [1])


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["bus", "client"])
async def test_an_emitter_waits_for_room_and_no_longer_than_it_may(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microservices.transports.local._Deliveries.limit", 2)
    go_on = asyncio.Event()
    running, most = 0, 0

    @event_pattern("made")
    async def made() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go_on.wait()
        running -= 1

    dispatcher = service(made)
    local = LocalClient(dispatcher)
    client = bus_of(dispatcher) if kind == "bus" else Client("shop", lambda: local)
    async with asyncio.timeout(PATIENCE):
        await client.emit("made")
        await client.emit("made")
        with pytest.raises(DeadlineExceeded):
            await client.emit("made", timeout=0.05)
        waiting = [asyncio.create_task(client.emit("made")) for _ in range(5)]
        go_on.set()
        await asyncio.gather(*waiting)
        await client.close()

    assert (most, running) == (2, 0)


@pytest.mark.asyncio
async def test_a_closed_bus_takes_no_event() -> None:
    bus = bus_of(service(echo))
    proxy = bus._bound().proxy
    await proxy.close()

    with pytest.raises(Unavailable, match="closed"):
        await bus.emit("made")
