"""From a packet to its handler and back."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from msgspec import UNSET, Raw

from microservices.context import RpcContext, current
from microservices.dispatcher import MAX_SPELLINGS, Dispatcher
from microservices.exceptions import RpcException
from microservices.executor import Executor
from microservices.handlers import Handler, event_pattern, message_pattern
from microservices.middleware import Call, Endpoint
from microservices.packets import Packet
from tests.toolkit.conftest import Answers, Recorder, packet, service, settled


async def ask(dispatcher: Dispatcher, request: Packet, **facts: Any) -> list[dict[str, Any]]:
    """Dispatch a packet and return the packets of its answer."""
    answers = Answers()
    async with asyncio.timeout(5):
        await settled(dispatcher.dispatch(request, answers, **({"transport": "test", "peer": "peer:1"} | facts)))
    return answers.packets


def raw_packet(pattern: str) -> Packet:
    """Make a request with a pattern as it stands on the wire."""
    return Packet(pattern=Raw(pattern.encode()), data=Raw(b"1"), id=Raw(b'"1"'))


def answering(pattern: Any, answer: Any = None) -> Callable[..., Any]:
    """Make a handler that answers its own pattern, or this."""

    @message_pattern(pattern)
    async def handler(data: Any, ctx: RpcContext) -> Any:
        return ctx.pattern if answer is None else answer

    return handler


# Which handler


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("registered", "on_wire"),
    [
        ({"cmd": "sum"}, '{ "cmd" :"sum"}'),
        ({"cmd": "sum"}, r'"{ \"cmd\" : \"sum\" }"'),
        ({"a": 1, "B": 2}, '{"B":2.0,"a":1}'),
        (5, "5"),
        (5, "5.0"),
        (5, '"5.0"'),
        (1000, "1e3"),
        ([[1, 2]], "[1,2]"),
        ("null", '"null"'),
        ("true", '"true"'),
        ("1e3", '"1e3"'),
        ("quoted", r'"\"quoted\""'),
        ("é", r'"\u00e9"'),
        ("", '""'),
    ],
)
async def test_a_pattern_finds_its_handler_however_it_is_spelled(registered: Any, on_wire: str) -> None:
    dispatcher = service(answering(registered))

    for _ in range(2):  # the second time it is known
        (answer,) = await ask(dispatcher, raw_packet(on_wire))

        assert answer["response"] == dispatcher.handlers[0].doors[0].route


@pytest.mark.asyncio
@pytest.mark.parametrize("on_wire", ["null", "true", '"null"', '"false"', "{", '"other"', "[" * 100_000, '"\\ud83d"'])
async def test_a_pattern_that_matches_nothing_has_no_handler(on_wire: str) -> None:
    dispatcher = service(answering("", "the handler of the empty pattern"), answering("ask"))

    (answer,) = await ask(dispatcher, raw_packet(on_wire))

    assert answer == {
        "id": "1",
        "status": "error",
        "err": "There is no matching message handler defined in the remote service.",
    }


@pytest.mark.asyncio
async def test_a_request_without_a_pattern_has_no_handler() -> None:
    (answer,) = await ask(service(answering("")), Packet(data=Raw(b"1"), id=Raw(b"1")))

    assert answer["status"] == "error"


@pytest.mark.asyncio
async def test_the_last_request_handler_of_a_pattern_wins() -> None:
    dispatcher = service(answering("ask", "first"), answering("ask", "last"))

    (answer,) = await ask(dispatcher, packet("ask"))

    assert answer["response"] == "last"


@pytest.mark.asyncio
async def test_a_transport_may_know_the_route_better_than_the_packet() -> None:
    dispatcher = service(answering("ask"), answering("channel"))

    (answer,) = await ask(dispatcher, packet("ask"), channel="channel")
    (unknown,) = await ask(dispatcher, packet("ask"), channel="unknown")

    assert answer["response"] == "channel"
    assert unknown["status"] == "error"


@pytest.mark.asyncio
async def test_an_event_that_nobody_hears_is_counted(losses: Callable[[str, str], int]) -> None:
    answers = await ask(service(answering("ask")), packet("unknown", id=None))

    assert answers == []
    assert losses("test", "unknown-event") == 1


def test_a_service_knows_what_it_hears() -> None:
    @event_pattern("made")
    async def made() -> None: ...

    dispatcher = service(made, answering("ask"))

    assert [dispatcher.hears(route) for route in ("made", "ask", "unknown")] == [True, False, False]


@pytest.mark.asyncio
async def test_spellings_are_remembered_within_bounds() -> None:
    dispatcher = service(answering({"cmd": "ask"}))

    for number in range(MAX_SPELLINGS + 10):
        (answer,) = await ask(dispatcher, raw_packet('{"cmd":' + " " * number + '"ask"}'))
        assert answer["response"] == '{"cmd":"ask"}'

    # A peer chooses the spelling: neither many nor long ones may fill the memory.
    assert len(dispatcher._spellings) <= MAX_SPELLINGS
    assert sum(map(len, dispatcher._spellings)) < 2_000_000


# What the handler sees


@pytest.mark.asyncio
async def test_a_handler_is_told_about_its_message() -> None:
    seen: list[RpcContext] = []

    @message_pattern({"cmd": "ask"})
    async def handler(data: Any, ctx: RpcContext) -> None:
        assert current.get() is ctx
        seen.append(ctx)

    await ask(service(handler), packet({"cmd": "ask"}, id="42", metadata={"traceparent": "00", "deadline": "5000"}))

    (ctx,) = seen
    assert (ctx.service, ctx.pattern, ctx.transport, ctx.side) == ("shop", '{"cmd":"ask"}', "test", "server")
    assert (ctx.peer, ctx.id, ctx.metadata["traceparent"]) == ("peer:1", "42", "00")
    assert 4 < (ctx.remaining() or 0) <= 5


@pytest.mark.asyncio
@pytest.mark.parametrize("metadata", [None, 5, "text", ["deadline"], {"deadline": {}}, UNSET])
async def test_foreign_metadata_of_any_kind_does_no_harm(metadata: Any) -> None:
    (answer,) = await ask(service(answering("ask", "fine")), packet("ask", metadata=metadata))

    assert answer["response"] == "fine"


@pytest.mark.asyncio
async def test_a_handler_may_cap_the_deadline() -> None:
    cancelled = []

    @message_pattern("slow", deadline=0.05)
    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append("slow")
            raise

    (answer,) = await ask(service(slow), packet("slow", metadata={"deadline": "60000"}))

    assert answer["err"]["statusCode"] == 504
    assert answer["isDisposed"] is True
    assert cancelled == ["slow"]


@pytest.mark.asyncio
@pytest.mark.parametrize("inline", [True, False])
async def test_a_request_that_comes_too_late_does_not_run(inline: bool) -> None:
    ran: list[int] = []

    @message_pattern("ask", inline=inline)
    def handler() -> None:
        ran.append(1)

    (answer,) = await ask(service(handler), packet("ask", metadata={"deadline": "0"}))

    assert (answer["err"]["statusCode"], ran) == (504, [])


@pytest.mark.asyncio
async def test_an_inline_handler_is_answered_before_dispatch_returns() -> None:
    @message_pattern("ask", inline=True)
    def handler(data: int) -> int:
        return data + 1

    answers = Answers()
    task = service(handler).dispatch(packet("ask", 1), answers, transport="test", peer="")

    assert task is None
    assert answers.packets == [{"response": 2, "isDisposed": True, "id": "1"}]


@pytest.mark.asyncio
async def test_middlewares_stand_around_an_inline_handler_too() -> None:
    @message_pattern("ask", inline=True)
    def handler(data: int) -> int:
        return data + 1

    recorder = Recorder()
    (answer,) = await ask(service(handler, middlewares=[recorder]), packet("ask", 1))

    assert answer["response"] == 2
    assert [(bytes(data), outcome) for _, data, outcome in recorder.calls] == [(b"1", 2)]


# Failures


@pytest.mark.asyncio
@pytest.mark.parametrize("inline", [True, False])
async def test_a_bug_is_logged_and_hidden(inline: bool, caplog: pytest.LogCaptureFixture) -> None:
    @message_pattern("ask", inline=inline)
    def handler() -> None:
        raise ZeroDivisionError("secret")

    (answer,) = await ask(service(handler), packet("ask"))

    assert answer == {"err": {"status": "error", "message": "Internal server error"}, "isDisposed": True, "id": "1"}
    assert "secret" in caplog.text
    assert "shop ask failed" in caplog.text


@pytest.mark.asyncio
async def test_an_expected_error_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    @message_pattern("ask")
    async def handler() -> None:
        raise RpcException({"statusCode": 404, "message": "nf"})

    (answer,) = await ask(service(handler), packet("ask"))

    assert answer["err"] == {"statusCode": 404, "message": "nf"}
    assert caplog.records == []


@pytest.mark.asyncio
@pytest.mark.parametrize("colour", ["inline", "task", "pool", "stream"])
async def test_an_answer_without_a_json_form_is_an_internal_error(colour: str) -> None:
    @message_pattern("inline", inline=True)
    def inline() -> Any:
        return object()

    @message_pattern("pool")
    def pool() -> Any:
        return object()

    @message_pattern("task")
    async def task() -> Any:
        return object()

    @message_pattern("stream")
    async def stream() -> AsyncIterator[Any]:
        yield object()

    (answer,) = await ask(service(inline, pool, task, stream), packet(colour))

    assert answer == {"err": {"status": "error", "message": "Internal server error"}, "isDisposed": True, "id": "1"}


@pytest.mark.asyncio
async def test_a_handler_that_is_cancelled_from_inside_is_answered() -> None:
    @message_pattern("ask")
    async def handler() -> None:
        helper = asyncio.create_task(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(helper.cancel)
        await helper

    (answer,) = await ask(service(handler), packet("ask"))

    assert answer["err"] == {"status": "error", "message": "Internal server error"}


@pytest.mark.asyncio
async def test_a_task_that_is_cancelled_answers_nothing() -> None:
    started = asyncio.Event()

    @message_pattern("ask")
    async def handler() -> None:
        started.set()
        await asyncio.Event().wait()

    answers = Answers()
    task = service(handler).dispatch(packet("ask"), answers, transport="test", peer="")
    assert task is not None
    await started.wait()
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    assert answers.packets == []


# Streams


@pytest.mark.asyncio
async def test_a_stream_is_a_packet_a_value_and_a_last_one() -> None:
    @message_pattern("count")
    async def count() -> AsyncIterator[int]:
        yield 1
        yield 2

    answer = await ask(service(count), packet("count"))

    assert answer == [{"response": 1, "id": "1"}, {"response": 2, "id": "1"}, {"isDisposed": True, "id": "1"}]


@pytest.mark.asyncio
async def test_a_stream_that_never_waits_does_not_hold_the_loop() -> None:
    stop = asyncio.Event()

    @message_pattern("flood")
    async def flood() -> AsyncIterator[int]:
        while not stop.is_set():
            yield 1

    task = asyncio.create_task(ask(service(flood), packet("flood")))
    asyncio.get_running_loop().call_later(0.01, stop.set)

    assert (await task)[-1] == {"isDisposed": True, "id": "1"}


# Events


@pytest.mark.asyncio
async def test_every_colour_hears_events_and_nothing_is_answered() -> None:
    heard: list[str] = []

    @event_pattern("made")
    def pool(data: int) -> None:
        heard.append("pool")

    @event_pattern("made")
    async def task(data: int) -> str:
        heard.append("task")
        return "for nobody"

    @event_pattern("made", inline=True)
    def inline(data: int) -> None:
        heard.append("inline")

    @event_pattern("made")
    async def stream(data: int) -> AsyncIterator[int]:
        yield 1
        heard.append("stream, to its end")

    answers = await ask(service(pool, task, inline, stream), packet("made", 1, id=None))

    assert answers == []
    assert sorted(heard) == ["inline", "pool", "stream, to its end", "task"]


@pytest.mark.asyncio
async def test_each_failing_event_handler_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    @event_pattern("made")
    async def wrong_payload(data: dict[str, int]) -> None: ...

    @event_pattern("made")
    def broken(data: int) -> None:
        raise ZeroDivisionError

    @event_pattern("made")
    async def broken_stream(data: int) -> AsyncIterator[int]:
        yield 1
        raise LookupError

    await ask(service(wrong_payload, broken, broken_stream), packet("made", 1, id=None))

    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "wrong_payload refused made: Expected 'object', got 'int'" in messages[0]
    assert "broken failed to handle made" in messages[1]
    assert "broken_stream failed to handle made" in messages[2]
    assert [record.exc_info is not None for record in caplog.records] == [False, True, True]


def test_the_routes_of_a_service_can_be_listed() -> None:
    @event_pattern("made")
    async def made() -> None: ...

    routes = service(made, answering({"cmd": "ask"})).routes

    assert json.dumps(sorted(routes)) == json.dumps(["made", '{"cmd":"ask"}'])
    assert routes["made"].request is None
    assert routes['{"cmd":"ask"}'].events == ()


# What runs in place


@pytest.mark.asyncio
async def test_inline_listeners_have_heard_before_dispatch_returns() -> None:
    heard = []

    @event_pattern("made", inline=True)
    def one(data: int) -> None:
        heard.append(("one", data))

    @event_pattern("made", inline=True)
    def other(data: int, ctx: RpcContext) -> None:
        heard.append((ctx.pattern, data))

    task = service(one, other).dispatch(packet("made", 1, id=None), Answers(), transport="test", peer="")

    assert task is None
    assert heard == [("one", 1), ("made", 1)]


@pytest.mark.asyncio
async def test_an_inline_listener_that_fails_holds_up_no_other_and_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard = []

    @event_pattern("made", inline=True)
    def broken(data: int) -> None:
        raise ZeroDivisionError

    @event_pattern("made", inline=True)
    def sound(data: int) -> None:
        heard.append(data)

    task = service(broken, sound).dispatch(packet("made", 1, id=None), Answers(), transport="test", peer="")

    assert heard == [1]
    assert task is not None
    assert [type(failure) for failure in await task] == [ZeroDivisionError]
    assert "broken failed to handle made" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("metadata", [{}, {"traceparent": "00-1"}])
async def test_an_inline_handler_that_wants_the_context_gets_that_of_its_message(metadata: dict[str, str]) -> None:
    @message_pattern("ask", inline=True)
    def handler(data: int, ctx: RpcContext) -> list[Any]:
        return [ctx.service, ctx.pattern, ctx.channel, ctx.transport, ctx.peer, ctx.id, ctx.metadata]

    fields: dict[str, Any] = {"metadata": metadata} if metadata else {}

    (answer,) = await ask(service(handler), packet("ask", 1, **fields))

    assert answer["response"] == ["shop", "ask", "ask", "test", "peer:1", "1", metadata]


class Noting:
    """A middleware that can stand before an inline handler as well."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def noted(data: Any, context: RpcContext) -> Any:
            self.notes.append(f"{self.name} {context.pattern} in a task")
            return await endpoint(data, context)

        return noted

    def in_place(self, call: Call) -> Call:
        def noted(data: Any, context: RpcContext) -> Any:
            self.notes.append(f"{self.name} {context.pattern} in place")
            return call(data, context)

        return noted


@pytest.mark.asyncio
async def test_an_inline_handler_stays_in_place_behind_middlewares_that_can_stand_there() -> None:
    notes: list[str] = []

    @message_pattern("ask", inline=True)
    def handler(data: int) -> int:
        return data

    @event_pattern("made", inline=True)
    def made(data: int) -> None: ...

    dispatcher = service(handler, made, middlewares=[Noting("first", notes), Noting("second", notes)])
    answers = Answers()

    assert dispatcher.dispatch(packet("ask", 1), answers, transport="test", peer="") is None
    assert dispatcher.dispatch(packet("made", 1, id=None), answers, transport="test", peer="") is None

    assert answers.packets == [{"response": 1, "isDisposed": True, "id": "1"}]
    assert notes == [f"{name} {what} in place" for what in ("ask", "made") for name in ("first", "second")]


@pytest.mark.asyncio
async def test_one_middleware_that_may_wait_makes_it_a_task() -> None:
    notes: list[str] = []
    recorder = Recorder()

    @message_pattern("ask", inline=True)
    def handler(data: int) -> int:
        return data

    (answer,) = await ask(service(handler, middlewares=[Noting("first", notes), recorder]), packet("ask", 1))

    assert answer["response"] == 1
    assert notes == ["first ask in a task"]
    assert len(recorder.calls) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("pattern", ["inline", "task", "unknown"])
async def test_an_answer_that_cannot_be_given_at_all_hurts_nobody_else(
    pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    @message_pattern("inline", inline=True)
    def inline(data: int) -> int:
        return data

    @message_pattern("task")
    async def task(data: int) -> int:
        return data

    def reply(_: Any) -> None:
        raise RpcException("The packet is too large.")

    await settled(service(inline, task).dispatch(packet(pattern, 1), reply, transport="test", peer=""))

    assert "could not be answered" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("tracebacks", [False, True])
async def test_where_a_handler_failed_is_told_in_development_alone(tracebacks: bool) -> None:
    @message_pattern("ask", inline=True)
    def ask() -> None:
        raise ValueError("a bug")

    replies: list[Any] = []
    dispatcher = Dispatcher("shop", [Handler(ask)], Executor(1), tracebacks=tracebacks)
    dispatcher.dispatch(packet("ask"), replies.append, transport="test", peer="")

    assert ("traceback" in replies[0].err) is tracebacks
    assert "a bug" not in replies[0].err["message"]
    assert not tracebacks or "ValueError: a bug" in replies[0].err["traceback"]
