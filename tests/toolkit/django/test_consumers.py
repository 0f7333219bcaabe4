"""Channels consumers whose methods are event handlers."""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any, ClassVar

import pytest
from channels.consumer import AsyncConsumer
from msgspec import Struct
from pytest_django import Settings

from microservices.consumers import EventConsumer, EventRouter, consumer_handlers
from microservices.context import RpcContext, current
from microservices.dispatcher import Dispatcher
from microservices.exceptions import InvalidPayload, Unavailable
from microservices.executor import Executor
from microservices.handlers import event_pattern
from microservices.mailbox import Mailbox
from tests.toolkit.conftest import packet


class Made(Struct):
    """A payload."""

    id: int


@pytest.fixture(autouse=True)
def without_database(settings: Settings) -> None:
    """These methods use no database."""
    settings.MICROSERVICES = {**settings.MICROSERVICES, "UNITS_OF_WORK": []}


@asynccontextmanager
async def hearing(*consumers: type[EventConsumer]) -> AsyncIterator[Dispatcher]:
    """Give the dispatcher of a service with these consumers."""
    module = ModuleType("shop_consumers")
    for consumer in consumers:
        consumer.__module__, consumer.__qualname__ = module.__name__, consumer.__name__
        setattr(module, consumer.__name__, consumer)
    sys.modules[module.__name__] = module
    executor = Executor(4)
    dispatcher = Dispatcher("shop", list(consumer_handlers("shop", module)), executor)
    try:
        async with asyncio.timeout(5):
            yield dispatcher
    finally:
        for mailbox in mailboxes(dispatcher):
            await mailbox.close()
        executor.close()
        del sys.modules[module.__name__]


def mailboxes(dispatcher: Dispatcher) -> list[Mailbox]:
    """Return each mailbox of a service."""
    return list({id(h.mailbox): h.mailbox for h in dispatcher.handlers if h.mailbox is not None}.values())


def emit(dispatcher: Dispatcher, pattern: str, data: Any = None, **fields: Any) -> asyncio.Task[Any]:
    """Hand an event over; the task gives what its handlers raised."""
    task = dispatcher.dispatch(packet(pattern, data, id=None, **fields), print, transport="test", peer="")
    assert task is not None
    return task


@pytest.mark.asyncio
async def test_methods_of_both_colours_are_given_payload_and_context() -> None:
    seen: list[Any] = []

    class Shop(EventConsumer):
        @event_pattern("plain")
        def plain(self, data: Made, ctx: RpcContext) -> None:
            seen.append(("plain", data, ctx.metadata, current.get() is ctx, threading.get_ident()))

        @event_pattern("async")
        async def coroutine(self, data: Made, ctx: RpcContext) -> None:
            seen.append(("async", data, ctx.metadata, current.get() is ctx, threading.get_ident()))

    async with hearing(Shop) as shop:
        failures = [await emit(shop, pattern, {"id": 1}, metadata={"k": "v"}) for pattern in ("plain", "async")]

    assert failures == [[], []]
    assert [call[:-1] for call in seen] == [
        ("plain", Made(1), {"k": "v"}, True),
        ("async", Made(1), {"k": "v"}, True),
    ]
    assert [call[-1] == threading.get_ident() for call in seen] == [False, True]


@pytest.mark.asyncio
async def test_a_method_may_take_less() -> None:
    seen: list[Any] = []

    class Shop(EventConsumer):
        @event_pattern("data")
        def data(self, data: Made) -> None:
            seen.append(data)

        @event_pattern("nothing")
        async def nothing(self) -> None:
            seen.append(None)

    async with hearing(Shop) as shop:
        failures = [*await emit(shop, "data", {"id": 1}), *await emit(shop, "nothing", 5)]

    assert failures == []
    assert seen == [Made(1), None]


@pytest.mark.asyncio
async def test_it_is_a_real_channels_consumer_with_the_scope_of_an_event() -> None:
    scopes: list[Any] = []

    class Shop(EventConsumer):
        @event_pattern("made")
        async def made(self) -> None:
            scopes.append((self.scope, self.channel_layer))

    async with hearing(Shop) as shop:
        await emit(shop, "made")

    ((scope, layer),) = scopes
    assert issubclass(Shop, AsyncConsumer)
    assert scope == {"type": "event", "service": "shop", "consumer": "shop_consumers.Shop"}
    assert layer is not None


@pytest.mark.asyncio
async def test_one_instance_of_a_class_hears_all_its_events_and_each_class_has_its_own() -> None:
    instances: list[Any] = []

    class One(EventConsumer):
        @event_pattern(["made", "paid"])
        async def made(self) -> None:
            instances.append(("One", id(self)))

    class Other(EventConsumer):
        @event_pattern("made")
        async def made(self) -> None:
            instances.append(("Other", id(self)))

    async with hearing(One, Other) as shop:
        for pattern in ("made", "paid", "made"):
            await emit(shop, pattern)

    assert sorted(name for name, _ in instances) == ["One", "One", "One", "Other", "Other"]
    assert len(set(instances)) == 2


@pytest.mark.asyncio
async def test_a_failing_method_hurts_no_other_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ran: list[str] = []

    class Shop(EventConsumer):
        @event_pattern("made")
        def failing(self) -> None:
            raise ValueError("unlucky")

        @event_pattern("made")
        async def failing_too(self) -> None:
            raise KeyError("out of luck")

        @event_pattern("made")
        def working(self) -> None:
            ran.append("working")

    async with hearing(Shop) as shop:
        failures = [await emit(shop, "made") for _ in range(3)]

    assert [sorted(repr(failure) for failure in each) for each in failures] == [
        ["KeyError('out of luck')", "ValueError('unlucky')"]
    ] * 3
    assert ran == ["working"] * 3
    assert "unlucky" in caplog.text


@pytest.mark.asyncio
async def test_what_a_method_awaits_may_be_cancelled_without_silence() -> None:
    class Shop(EventConsumer):
        @event_pattern("made")
        async def made(self) -> None:
            waiting = asyncio.get_running_loop().create_future()
            waiting.cancel()
            await waiting

    async with hearing(Shop) as shop:
        failures = [await emit(shop, "made") for _ in range(2)]

    assert [len(each) for each in failures] == [1, 1]


@pytest.mark.asyncio
async def test_a_payload_that_does_not_fit_never_reaches_the_consumer() -> None:
    class Shop(EventConsumer):
        ran: ClassVar[list[Any]] = []

        @event_pattern("made")
        def made(self, data: Made) -> None:
            self.ran.append(data)

    async with hearing(Shop) as shop:
        (failure,) = await emit(shop, "made", {"id": "one"})

    assert isinstance(failure, InvalidPayload)
    assert Shop.ran == []


@pytest.mark.asyncio
async def test_no_more_events_are_handled_at_a_time_than_concurrency_says() -> None:
    running, most, heard = 0, 0, 0
    go_on, full = asyncio.Event(), asyncio.Event()

    class Shop(EventConsumer):
        concurrency = 3

        @event_pattern("made")
        async def made(self) -> None:
            nonlocal running, most, heard
            running, heard = running + 1, heard + 1
            most = max(most, running)
            if running == 3:
                full.set()
            await go_on.wait()
            running -= 1

    async with hearing(Shop) as shop:
        tasks = [emit(shop, "made") for _ in range(100)]
        await full.wait()
        for _ in range(20):  # time enough to start a fourth, if it were allowed to
            await asyncio.sleep(0)
        meanwhile = heard
        go_on.set()
        failures = await asyncio.gather(*tasks)

    assert failures == [[]] * 100
    assert (meanwhile, most, heard) == (3, 3, 100)


@pytest.mark.asyncio
async def test_each_event_has_a_context_of_its_own() -> None:
    seen: list[Any] = []
    both = asyncio.Barrier(2)

    class Shop(EventConsumer):
        @event_pattern("made")
        async def made(self) -> None:
            await both.wait()
            context = current.get()
            assert context is not None
            seen.append(context.metadata["number"])

    async with hearing(Shop) as shop:
        await asyncio.gather(*(emit(shop, "made", metadata={"number": number}) for number in ("1", "2")))

    assert sorted(seen) == ["1", "2"]
    assert current.get() is None


@pytest.mark.asyncio
async def test_a_cancelled_consumer_fails_what_it_has_not_reported_and_leaves_nothing_running() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    class Shop(EventConsumer):
        @event_pattern("made")
        async def made(self) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.set()

    async with hearing(Shop) as shop:
        task = emit(shop, "made")
        await started.wait()
        await mailboxes(shop)[0].close()
        (failure,) = await task

        assert ended.is_set()
    assert isinstance(failure, Unavailable)


@pytest.mark.asyncio
async def test_the_router_runs_the_consumer_that_the_scope_names() -> None:
    class Shop(EventConsumer):
        @event_pattern("made")
        async def made(self) -> None:
            pass

    received: asyncio.Queue[Any] = asyncio.Queue()
    sent: asyncio.Queue[Any] = asyncio.Queue()
    async with hearing(Shop):
        running = asyncio.create_task(
            EventRouter()(
                {"type": "event", "service": "shop", "consumer": "shop_consumers.Shop"}, received.get, sent.put
            )
        )
        received.put_nowait({"type": "event", "id": 7, "method": "made", "arguments": (), "context": None})
        report = await sent.get()
        running.cancel()
        await asyncio.wait([running])

    assert report == {"type": "event.done", "id": 7}
    assert running.cancelled()
