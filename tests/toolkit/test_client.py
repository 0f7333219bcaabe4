"""The way to a service: from a loop, from a thread, on behalf of a message."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Raw
from pytest_django import Settings

from microservices.client import _MAX_KNOWN, Client, Clients
from microservices.conf import get_settings
from microservices.context import RpcContext, current
from microservices.exceptions import ConfigurationError, DeadlineExceeded, NoHandler, PacketError, RpcException
from microservices.handlers import event_pattern, message_pattern
from microservices.packets import Event, Request
from microservices.transports import Address
from microservices.transports.base import ClientProxy
from microservices.transports.local import LocalClient
from tests.toolkit.conftest import Recorder, context, service

PATIENCE = 10


class User(msgspec.Struct):
    """What a service answers."""

    id: int
    name: str


@message_pattern("user")
async def user(data: int) -> User:
    """Answer a user."""
    return User(data, "Ada")


@message_pattern("count")
async def count(data: int) -> AsyncIterator[int]:
    """Stream numbers."""
    for number in range(data):
        yield number


@message_pattern("fail")
async def fail() -> None:
    """Fail."""
    raise RpcException({"statusCode": 409, "message": "taken"})


@message_pattern("context")
async def tell(data: Any, ctx: RpcContext) -> dict[str, Any]:
    """Tell what the handler knows."""
    return {"metadata": ctx.metadata, "remaining": ctx.remaining()}


def client_of(*functions: Callable[..., Any], **options: Any) -> Client:
    """Make a client of a local service with these handlers."""
    dispatcher = service(*functions)
    return Client("shop", lambda: LocalClient(dispatcher), **options)


class Canned(ClientProxy):
    """A proxy whose every answer is the same JSON."""

    scheme = "canned"

    def __init__(self, answer: bytes) -> None:
        super().__init__(Address("canned", "", 0, {}), "shop")
        self.answer = answer

    async def send(self, data: Any, context: RpcContext) -> Raw:
        return Raw(self.answer)

    async def connect(self) -> None: ...

    async def publish(self, request: Request, context: RpcContext) -> None: ...

    async def dispatch_event(self, event: Event, context: RpcContext) -> None: ...

    async def close(self) -> None: ...

    def unwrap(self) -> None: ...


# Answers and their types


@pytest.mark.asyncio
async def test_an_answer_is_plain_objects_unless_a_type_is_asked_for() -> None:
    client = client_of(user)

    assert await client.send("user", 5) == {"id": 5, "name": "Ada"}
    assert await client.send("user", 5, returns=User) == User(5, "Ada")
    assert await client.send("user", 5, returns=dict[str, int | str]) == {"id": 5, "name": "Ada"}


@pytest.mark.asyncio
async def test_the_values_of_a_stream_have_the_type_asked_for() -> None:
    client = client_of(count)

    assert [value async for value in client.stream("count", 3, returns=float)] == [0.0, 1.0, 2.0]


@pytest.mark.asyncio
async def test_an_answer_of_another_shape_is_a_bad_answer() -> None:
    client = client_of(user, count)

    with pytest.raises(RpcException) as caught:
        await client.send("user", 5, returns=list[User])
    with pytest.raises(RpcException) as in_a_stream:
        await anext(client.stream("count", 3, returns=str))

    for error in (caught.value, in_a_stream.value):
        assert (error.status_code, error.code) == (502, "bad-answer")
        assert "shop answered in another shape" in error.message


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", [b'"\xff"', b"{", b"[" * 100_000])
@pytest.mark.parametrize("returns", [None, User])
async def test_an_answer_that_cannot_be_read_is_a_bad_answer(answer: bytes, returns: Any) -> None:
    client = Client("shop", lambda: Canned(answer))

    with pytest.raises(RpcException) as caught:
        await client.send("user", returns=returns)

    assert (caught.value.status_code, caught.value.code) == (502, "bad-answer")


@pytest.mark.asyncio
async def test_an_empty_answer_is_none_whatever_type_was_asked_for() -> None:
    assert await client_of(count).send("count", 0, returns=int) is None


@pytest.mark.asyncio
@pytest.mark.parametrize("pattern", [None, True])
async def test_a_pattern_that_can_never_match_is_refused_at_the_caller(pattern: Any) -> None:
    with pytest.raises(ConfigurationError, match="can never match"):
        await client_of(user).send(pattern)


@pytest.mark.asyncio
async def test_what_is_no_pattern_is_refused_at_the_caller() -> None:
    with pytest.raises(PacketError):
        await client_of(user).send({1, 2})


@pytest.mark.asyncio
async def test_known_routes_are_bounded() -> None:
    client = client_of()

    for number in range(_MAX_KNOWN + 50):
        with pytest.raises(NoHandler):
            await client.send({"user": number})

    assert len(client._routes) == _MAX_KNOWN


@pytest.mark.asyncio
async def test_one_connection_is_kept_for_each_loop() -> None:
    made: list[LocalClient] = []

    def connect() -> LocalClient:
        made.append(LocalClient(service(user)))
        return made[-1]

    client = Client("shop", connect)
    await asyncio.gather(*(client.send("user", number) for number in range(5)))
    await asyncio.to_thread(asyncio.run, client.send("user", 5))
    await client.close()
    await client.send("user", 6)

    assert len(made) == 3


# What a call carries


@pytest.mark.asyncio
async def test_a_call_made_for_a_message_inherits_its_deadline_and_trace() -> None:
    client = client_of(tell, source="gateway")
    caller = context(metadata={"traceparent": "00-1-2-01", "identity": "ada", "deadline": "1", "other": "x"})
    caller.cap_deadline(2)
    token = current.set(caller)

    try:
        told = await client.send("context", timeout=60)
        hurried = await client.send("context", timeout=0.5, metadata={"traceparent": "own", "more": "1"})
    finally:
        current.reset(token)

    assert {**told["metadata"], "deadline": ""} == {
        "traceparent": "00-1-2-01",
        "identity": "ada",
        "source": "gateway",
        "deadline": "",
    }
    assert 1 < told["remaining"] <= 2
    assert hurried["remaining"] <= 0.5
    assert (hurried["metadata"]["traceparent"], hurried["metadata"]["more"]) == ("own", "1")


@pytest.mark.asyncio
async def test_a_call_for_a_message_that_is_over_is_not_made() -> None:
    recorder = Recorder()
    dispatcher = service(tell, middlewares=[recorder])
    late = context()
    late.cap_deadline(-1)
    token = current.set(late)

    try:
        client = Client("shop", lambda: LocalClient(dispatcher))
        for call in (client.send("context"), client.emit("context"), anext(client.stream("context"))):
            with pytest.raises(DeadlineExceeded):
                await call
    finally:
        current.reset(token)

    assert recorder.calls == []


@pytest.mark.asyncio
async def test_a_handler_passes_its_trace_on_by_calling() -> None:
    inner = client_of(tell)

    @message_pattern("outer")
    async def outer() -> Any:
        return await inner.send("context")

    told = await client_of(outer).send("outer", metadata={"traceparent": "00-1-2-01", "private": "x"}, timeout=3)

    assert told["metadata"]["traceparent"] == "00-1-2-01"
    assert "private" not in told["metadata"]
    assert told["remaining"] <= 3


@pytest.mark.asyncio
async def test_a_call_without_a_time_of_its_own_has_the_default() -> None:
    assert 6 < (await client_of(tell, timeout=7.0).send("context"))["remaining"] <= 7


@pytest.mark.asyncio
async def test_middlewares_see_every_verb() -> None:
    heard = asyncio.Event()

    @event_pattern("made")
    async def made() -> None:
        heard.set()

    recorder = Recorder()
    client = client_of(user, count, made, middlewares=[recorder])
    await client.send("user", 1)
    _ = [value async for value in client.stream("count", 1)]
    await client.emit("made", 2)
    await heard.wait()

    assert [(ctx.pattern, data) for ctx, data, _ in recorder.calls] == [("user", 1), ("count", 1), ("made", 2)]
    assert {ctx.side for ctx, _, _ in recorder.calls} == {"client"}


# The face for threads


@pytest.fixture
def background() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE)
    loop.close()


def threaded(loop: asyncio.AbstractEventLoop, *functions: Callable[..., Any]) -> Client:
    """Make a client whose sync face submits to this loop."""
    return client_of(*functions, run=lambda work: asyncio.run_coroutine_threadsafe(work, loop))


def test_a_thread_sends_and_waits(background: asyncio.AbstractEventLoop) -> None:
    client = threaded(background, user, fail)

    assert client.sync.send("user", 5, returns=User) == User(5, "Ada")
    with pytest.raises(RpcException, match="taken") as caught:
        client.sync.send("fail")
    assert caught.value.status_code == 409


def test_a_thread_streams(background: asyncio.AbstractEventLoop) -> None:
    assert list(threaded(background, count).sync.stream("count", 5)) == [0, 1, 2, 3, 4]


def test_a_thread_that_stops_a_stream_early_closes_the_generator(background: asyncio.AbstractEventLoop) -> None:
    closed = threading.Event()

    @message_pattern("tick")
    async def tick() -> AsyncIterator[int]:
        try:
            for number in range(10**9):
                yield number
        finally:
            closed.set()

    values = threaded(background, tick).sync.stream("tick")
    first = next(values)
    values.close()

    assert first == 0
    assert closed.wait(PATIENCE)


def test_a_thread_emits(background: asyncio.AbstractEventLoop) -> None:
    heard = threading.Event()

    @event_pattern("made")
    async def made() -> None:
        heard.set()

    threaded(background, made).sync.emit("made")

    assert heard.wait(PATIENCE)


def test_a_thread_waits_no_longer_than_it_may(background: asyncio.AbstractEventLoop) -> None:
    @message_pattern("never")
    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded):
        threaded(background, never).sync.send("never", timeout=0.05)


def test_many_threads_share_a_client(background: asyncio.AbstractEventLoop) -> None:
    client = threaded(background, user)
    answers: list[User] = []
    threads = [
        threading.Thread(target=lambda id=id: answers.append(client.sync.send("user", id, returns=User)))
        for id in range(20)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert sorted(answer.id for answer in answers) == list(range(20))


@pytest.mark.asyncio
async def test_the_sync_face_is_refused_on_the_loop_itself() -> None:
    clients = Clients()
    clients.settle(asyncio.get_running_loop())
    client = client_of(user, count, run=clients.run)

    for call in (client.sync.send, client.sync.emit, lambda pattern: next(client.sync.stream(pattern))):
        with pytest.raises(RuntimeError, match=r"await client\.send"):
            call("user")


@pytest.mark.asyncio
async def test_a_thread_beside_a_settled_loop_calls_on_that_loop() -> None:
    clients = Clients()
    clients.settle(asyncio.get_running_loop())

    @message_pattern("where")
    async def where() -> int:
        return threading.get_ident()

    client = client_of(where, run=clients.run)

    assert await asyncio.to_thread(client.sync.send, "where") == threading.get_ident()


def test_without_a_settled_loop_calls_run_in_the_background() -> None:
    client = client_of(user, run=Clients().run)

    assert client.sync.send("user", 5, returns=User) == User(5, "Ada")


# All clients


@pytest.fixture
def clients(settings: Settings) -> Iterator[Clients]:
    """Clients of two services that live elsewhere."""
    settings.MICROSERVICES = {
        "CLIENTS": {"users": {"url": "tcp://127.0.0.1:3001"}, "orders": {"url": "tcp://127.0.0.1:3002"}},
        "CALL_TIMEOUT": 2.5,
    }
    get_settings.cache_clear()
    yield Clients()
    del settings.MICROSERVICES
    get_settings.cache_clear()


def test_a_service_has_one_client(clients: Clients) -> None:
    assert clients["users"] is clients["users"]
    assert (clients["users"].service, clients["users"].timeout) == ("users", 2.5)
    assert list(clients) == ["users", "orders"]


@pytest.mark.parametrize(("name", "hint"), [("user", "did you mean 'users'"), ("zzz", "known are users, orders")])
def test_an_unknown_service_names_the_nearest(clients: Clients, name: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=hint):
        clients[name]


def test_clients_are_forgotten_when_the_settings_change(clients: Clients) -> None:
    before = clients["users"]

    clients.reset()

    assert clients["users"] is not before


def test_an_event_has_no_metadata_unless_it_is_given_some() -> None:
    assert Event("made", 1).metadata is UNSET
