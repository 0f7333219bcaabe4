"""What every transport must do, written once; the tests of each transport subclass it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import msgspec
import pytest

from microservices.client import Client
from microservices.context import RpcContext
from microservices.dispatcher import Dispatcher
from microservices.exceptions import (
    ConfigurationError,
    DeadlineExceeded,
    InvalidPayload,
    NoHandler,
    RpcException,
    Unavailable,
)
from microservices.handlers import event_pattern, message_pattern
from microservices.middleware import Middleware
from microservices.transports import Address, Role, load, parse
from microservices.transports.base import ClientProxy, Server, Status
from tests.toolkit.conftest import Recorder, service

# Seconds. No test needs more than a part of it; one that waits for ever ends here.
PATIENCE = 10


class Line(msgspec.Struct):
    """Part of a payload."""

    quantity: int


class Order(msgspec.Struct):
    """A payload with something inside."""

    lines: list[Line]


@message_pattern("echo")
async def echo(data: Any) -> Any:
    """Give back what came."""
    return data


@message_pattern("count")
async def count(data: int) -> AsyncIterator[int]:
    """Stream the numbers below `data`."""
    for number in range(data):
        yield number


def hearing(pattern: Any, heard: asyncio.Queue[Any]) -> Callable[..., Any]:
    """Make a handler that notes an event: its route, data and metadata."""

    @event_pattern(pattern)
    async def hear(data: Any, ctx: RpcContext) -> None:
        heard.put_nowait((ctx.pattern, data, ctx.metadata))

    return hear


SHAPES = pytest.mark.parametrize(
    ("registered", "called"),
    [
        ({"b": 1, "a": "x"}, {"a": "x", "b": 1}),
        ({"cmd": {"name": "é", "version": 2.0}}, {"cmd": {"version": 2, "name": "é"}}),
        (7, 7),
        (1.5, 1.5),
        ([[1, 2]], [1, 2]),
        (["one", "other"], "other"),
        ("null", "null"),
        ("1e3", "1e3"),
    ],
)


@pytest.mark.asyncio
class Contract:
    """How a service is talked to: what each transport's tests say of it."""

    has_server: ClassVar[bool] = True
    """Whether there is a Server to close, apart from the client."""
    carries_metadata: ClassVar[bool] = True
    """Whether what travels beside the payload arrives."""
    carries_headers: ClassVar[bool] = False
    """Whether its messages have headers."""
    names_with_spaces: ClassVar[bool] = True
    """Whether a pattern may hold a space."""
    wildcard: ClassVar[tuple[str, str] | None] = None
    """A pattern that is a wildcard, and a name that it matches."""
    bounded: ClassVar[bool] = True
    """Whether its server works on `max_in_flight` messages at a time, and lets the others wait."""
    patience: ClassVar[float] = PATIENCE

    server_options: Mapping[str, Any] = MappingProxyType({})
    """What a test tells its server."""
    url: str
    """Where the two sides meet."""
    roles: ClassVar[tuple[Role, Role]] = ("server", "client")
    """What of its transport is talked to, and what talks."""

    def serving(self, url: str) -> Address:
        """Return the address of a server, with the options that a test has set."""
        address = parse(url)
        return address._replace(options={**address.options, **self.server_options})

    async def serve(self, dispatcher: Dispatcher) -> Server | None:
        """Return a server that listens, or None where a client needs none."""
        address = self.serving(self.url)
        server: Server = load(address, self.roles[0])(address, dispatcher)
        await server.listen()
        return server

    def proxy(self, dispatcher: Dispatcher, server: Server | None) -> ClientProxy:
        """Return a client of what `serve` returned."""
        address, role = parse(self.url), self.roles[1]
        client: ClientProxy = load(address, role)(address, "shop" if role == "client" else "events")
        return client

    @asynccontextmanager
    async def talk(
        self,
        *functions: Callable[..., Any],
        server_side: Sequence[Middleware] = (),
        client_side: Sequence[Middleware] = (),
        threads: int = 4,
    ) -> AsyncIterator[Client]:
        """Give a client of a service with these handlers."""
        dispatcher = service(*functions, middlewares=server_side, threads=threads)
        self.server = await self.serve(dispatcher)
        client = Client("shop", lambda: self.proxy(dispatcher, self.server), middlewares=client_side)
        try:
            async with asyncio.timeout(self.patience):
                yield client
        finally:
            await client.close()
            if self.server is not None:
                await self.server.close(0)


class EventContract(Contract):
    """What every transport does with events, seen from its client."""

    async def test_an_event_runs_every_handler_that_hears_it(self) -> None:
        heard: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        @event_pattern("made")
        async def first(data: Any) -> None:
            heard.put_nowait(("first", data))

        @event_pattern("made")
        async def second(data: Any) -> None:
            heard.put_nowait(("second", data))

        async with self.talk(first, second) as client:
            await client.emit("made", {"id": 1})
            calls = [await heard.get(), await heard.get()]

        assert calls == [("first", {"id": 1}), ("second", {"id": 1})]
        assert heard.empty()

    async def test_a_failing_event_handler_hurts_no_other(self, caplog: pytest.LogCaptureFixture) -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()

        @event_pattern("made")
        async def failing(data: Any) -> None:
            raise ValueError("unlucky")

        @event_pattern("made")
        async def hearing(data: Any) -> None:
            heard.put_nowait(data)

        async with self.talk(failing, hearing) as client:
            await client.emit("made", 1)
            await client.emit("made", 2)
            numbers = {await heard.get(), await heard.get()}

        assert numbers == {1, 2}
        assert "unlucky" in caplog.text

    async def test_an_event_that_nobody_hears_goes_by(self) -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()

        async with self.talk(hearing("made", heard)) as client:
            await client.emit("unheard", 1)
            await client.emit("made", 2)
            call = await heard.get()

        assert call == ("made", 2, {})

    @pytest.mark.parametrize(
        ("registered", "emitted", "route"),
        [
            ({"b": 1, "a": "x"}, {"a": "x", "b": 1}, '{"a":"x","b":1}'),
            (7, 7, "7"),
            (["one", "other"], "other", "other"),
            ("é 😀", "é 😀", "é 😀"),
        ],
    )
    async def test_an_event_of_any_pattern_finds_its_handler(self, registered: Any, emitted: Any, route: str) -> None:
        if " " in route and not self.names_with_spaces:
            pytest.skip("its names hold no spaces")
        heard: asyncio.Queue[Any] = asyncio.Queue()

        async with self.talk(hearing(registered, heard)) as client:
            await client.emit(emitted, None)
            call = await heard.get()

        assert call == (route, None, {})

    async def test_an_event_arrives_whole_with_its_metadata(self) -> None:
        if not self.carries_metadata:
            pytest.skip("it carries none")
        heard: asyncio.Queue[Any] = asyncio.Queue()
        text = "a é 漢 😀 e\u0301 \u2028\x00" * 20_000

        async with self.talk(hearing("made", heard)) as client:
            await client.emit("made", {"text": text}, metadata={"trace-id": "é1"})
            call = await heard.get()

        assert call == ("made", {"text": text}, {"trace-id": "é1"})

    async def test_a_wildcard_hears_each_event_that_it_matches_by_its_own_name(self) -> None:
        if self.wildcard is None:
            pytest.skip("it has none")
        pattern, name = self.wildcard
        heard: asyncio.Queue[Any] = asyncio.Queue()

        @event_pattern(pattern)
        async def hear(data: Any, ctx: RpcContext) -> None:
            heard.put_nowait((ctx.pattern, ctx.channel, data))

        async with self.talk(hear) as client:
            await client.emit(f"un{name}", 1)
            await client.emit(name, 2)
            call = await heard.get()

        assert call == (pattern, name, 2)
        assert heard.empty()

    async def test_the_headers_of_one_event_arrive_with_it_alone(self) -> None:
        if not self.carries_headers:
            pytest.skip("it has none")
        heard: asyncio.Queue[Any] = asyncio.Queue()

        @event_pattern("made")
        async def hear(data: Any, ctx: RpcContext) -> None:
            heard.put_nowait((data, ctx.headers.get("x-version")))

        async with self.talk(hear) as client:
            await client.emit("made", 1, options={"headers": {"x-version": "1.0"}})
            await client.emit("made", 2)
            calls = [await heard.get(), await heard.get()]

        assert sorted(calls) == [(1, "1.0"), (2, None)]

    async def test_an_event_without_a_json_form_fails_its_emitter_alone(self) -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()

        async with self.talk(hearing("made", heard)) as client:
            with pytest.raises(RpcException) as caught:
                await client.emit("made", object())
            await client.emit("made", 1)
            call = await heard.get()

        assert (caught.value.status_code, caught.value.code) == (400, "not-json")
        assert call == ("made", 1, {})

    async def test_closing_the_server_lets_an_event_finish(self) -> None:
        if not self.has_server:
            pytest.skip("it has no server")
        started, go_on, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

        @event_pattern("made")
        async def made() -> None:
            started.set()
            await go_on.wait()
            finished.set()

        async with self.talk(made) as client:
            await client.emit("made")
            await started.wait()
            closing = asyncio.create_task(self.server.close(PATIENCE))
            await asyncio.sleep(0)
            go_on.set()
            await closing

            assert finished.is_set()

    async def test_a_closed_connection_takes_no_more_events(self) -> None:
        async with self.talk(hearing("made", asyncio.Queue())) as client:
            proxy = client._bound().proxy  # the client itself would make another one
            await client.emit("made")
            await proxy.close()

            with pytest.raises(Unavailable, match="closed"):
                await client.emit("made")


class RequestContract(Contract):
    """What every transport does with requests."""

    def served_as(self, pattern: str) -> str:
        """Return what the server calls a pattern of the client's."""
        return pattern

    nobody: ClassVar[type[RpcException]] = NoHandler
    """What a caller is told when nobody handles a pattern; DeadlineExceeded where nobody tells."""
    notices_who_leaves: ClassVar[bool] = True
    """Whether a server learns that nobody waits for the rest of a stream."""
    holds_back: ClassVar[bool] = True
    """Whether a sender can be made to wait for one who takes its values slowly."""
    most_ahead: ClassVar[int] = 600
    """How many 2 kB values of a stream a sender may be ahead of the one who takes them."""

    # Answers

    async def test_a_request_is_answered(self) -> None:
        @message_pattern({"cmd": "sum"})
        async def add(data: list[int]) -> int:
            return sum(data)

        async with self.talk(add) as client:
            answer = await client.send({"cmd": "sum"}, [1, 2, 3])

        assert answer == 6

    async def test_200_concurrent_calls_each_get_their_own_answer(self) -> None:
        all_here = asyncio.Event()
        slow: list[int] = []

        @message_pattern("ask")
        async def ask(data: int) -> int:
            if data % 2 == 0:  # half of them answer only when all of them have come
                slow.append(data)
                if len(slow) == 100:
                    all_here.set()
                await all_here.wait()
            return data * 10

        async with self.talk(ask) as client:
            answers = await asyncio.gather(*(client.send("ask", number) for number in range(200)))

        assert answers == [number * 10 for number in range(200)]

    async def test_a_quick_answer_overtakes_a_slow_one(self) -> None:
        quick_one_is_back = asyncio.Event()

        @message_pattern("slow")
        async def slow() -> str:
            await quick_one_is_back.wait()
            return "slow"

        async with self.talk(slow, echo) as client:
            waiting = asyncio.create_task(client.send("slow"))
            quick = await client.send("echo", "quick")
            quick_one_is_back.set()
            late = await waiting

        assert (quick, late) == ("quick", "slow")

    async def test_null_is_a_value(self) -> None:
        @message_pattern("null")
        async def null() -> None:
            return None

        async with self.talk(null, echo) as client:
            answer = await client.send("null", {})
            streamed = [value async for value in client.stream("null", {})]
            echoed = await client.send("echo", None)

        assert answer is None
        assert streamed == [None]
        assert echoed is None

    async def test_a_call_to_an_empty_stream_gives_none(self) -> None:
        async with self.talk(count) as client:
            first = await client.send("count", 0)
            values = [value async for value in client.stream("count", 0)]

        assert first is None
        assert values == []

    @pytest.mark.parametrize(
        "value",
        [
            "",
            0,
            False,
            -0.5,
            2**53 - 1,
            [],
            {},
            "é",
            "e\u0301",
            "😀",
            "a\u2028b",
            '\x00\n"\\/',
            "\ufeff",
            {"é😀": ["\0"]},
        ],
    )
    async def test_a_value_comes_back_as_it_went(self, value: Any) -> None:
        async with self.talk(echo) as client:
            answer = await client.send("echo", value)

        assert answer == value
        assert type(answer) is type(value)

    async def test_a_large_text_of_all_widths_arrives_whole(self) -> None:
        text = "a é 漢 😀 e\u0301 \u2028" * 25_000  # about 500 kB

        async with self.talk(echo) as client:
            answers = await asyncio.gather(client.send("echo", text), client.send("echo", "small"))

        assert answers == [text, "small"]

    # Streams

    async def test_a_stream_yields_each_value_in_order(self) -> None:
        async with self.talk(count) as client:
            values = [value async for value in client.stream("count", 300)]

        assert values == list(range(300))

    async def test_a_plain_answer_is_a_stream_of_one(self) -> None:
        async with self.talk(echo) as client:
            values = [value async for value in client.stream("echo", "once")]

        assert values == ["once"]

    async def test_a_send_takes_the_first_value_of_a_stream(self) -> None:
        async with self.talk(count) as client:
            answer = await client.send("count", 3)

        assert answer == 0

    async def test_an_error_ends_a_stream_after_the_values_before_it(self) -> None:
        @message_pattern("break")
        async def breaks() -> AsyncIterator[int]:
            yield 1
            raise RpcException("broken")

        values = []
        async with self.talk(breaks) as client:
            stream = client.stream("break")
            values.append(await anext(stream))
            with pytest.raises(RpcException, match="broken"):
                await anext(stream)

        assert values == [1]

    async def test_a_consumer_who_stops_early_closes_the_generator(self) -> None:
        if not self.notices_who_leaves:
            pytest.skip("its protocol has no word for it")
        closed = asyncio.Event()

        @message_pattern("tick")
        async def tick() -> AsyncIterator[int]:
            try:
                yield 1
                yield 2
                await asyncio.Event().wait()
            finally:
                closed.set()

        async with self.talk(tick, echo) as client:
            async with aclosing(client.stream("tick")) as values:
                first = await anext(values)
            await closed.wait()
            after = await client.send("echo", "still here")

        assert (first, after) == (1, "still here")

    async def test_a_consumer_who_is_cancelled_closes_the_generator(self) -> None:
        if not self.notices_who_leaves:
            pytest.skip("its protocol has no word for it")
        waiting, closed = asyncio.Event(), asyncio.Event()

        @message_pattern("tick")
        async def tick() -> AsyncIterator[int]:
            try:
                waiting.set()
                await asyncio.Event().wait()
                yield 1
            finally:
                closed.set()

        async with self.talk(tick) as client:
            consumer = asyncio.create_task(anext(client.stream("tick")))
            await waiting.wait()
            consumer.cancel()
            await closed.wait()

        assert consumer.cancelled()

    async def test_a_slow_consumer_holds_the_sender_back_and_loses_nothing(self) -> None:
        if not self.holds_back:
            pytest.skip("its protocol has no word for it")
        sent = 0

        @message_pattern("flood")
        async def flood() -> AsyncIterator[tuple[int, str]]:
            nonlocal sent
            for sent in range(10_000):
                yield sent, "x" * 2000

        taken, furthest_ahead = [], 0
        async with self.talk(flood) as client:
            async for number, _ in client.stream("flood"):
                taken.append(number)
                furthest_ahead = max(furthest_ahead, sent - number)
                await asyncio.sleep(0)  # the sender gets many more turns of the loop than this

        assert taken == list(range(10_000))
        assert furthest_ahead < self.most_ahead

    # Errors

    @pytest.mark.parametrize("error", ["boom", {"statusCode": 404, "code": "user-not-found", "message": "nf"}, 5])
    async def test_an_error_reaches_the_caller_as_it_was_raised(self, error: Any) -> None:
        @message_pattern("fail")
        async def fail() -> None:
            raise RpcException(error)

        async with self.talk(fail) as client:
            with pytest.raises(RpcException) as caught:
                await client.send("fail")

        assert caught.value.error == error

    async def test_an_unexpected_error_tells_the_caller_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        @message_pattern("fail")
        def fail() -> None:
            raise ValueError("secret")

        async with self.talk(fail) as client:
            with pytest.raises(RpcException) as caught:
                await client.send("fail")

        assert caught.value.to_wire() == {"status": "error", "message": "Internal server error"}
        assert "secret" in caplog.text

    async def test_a_pattern_that_nobody_handles_is_told_at_once(self) -> None:
        async with self.talk(echo) as client:
            in_time = 0.2 if self.nobody is DeadlineExceeded else self.patience
            with pytest.raises(self.nobody):
                await client.send({"cmd": "unknown"}, timeout=in_time)
            with pytest.raises(self.nobody):
                await anext(client.stream("unknown", timeout=in_time))

    async def test_a_payload_that_does_not_fit_names_the_field(self) -> None:
        ran = []

        @message_pattern("order")
        def order(data: Order) -> None:
            ran.append(data)

        async with self.talk(order) as client:
            with pytest.raises(RpcException) as caught:
                await client.send("order", {"lines": [{"quantity": 1}, {"quantity": "two"}]})

        assert caught.value.status_code == InvalidPayload("").status_code
        assert [error["pointer"] for error in caught.value.errors] == ["/lines/1/quantity"]
        assert ran == []

    async def test_an_answer_without_a_json_form_is_an_internal_error(self, caplog: pytest.LogCaptureFixture) -> None:
        @message_pattern("object")
        async def unsendable() -> Any:
            return object()

        async with self.talk(unsendable, echo) as client:
            with pytest.raises(RpcException, match="Internal server error"):
                await client.send("object")
            after = await client.send("echo", "still here")

        assert after == "still here"
        assert f"{self.served_as('object')} failed" in caplog.text

    async def test_data_without_a_json_form_fails_the_caller_alone(self) -> None:
        async with self.talk(echo) as client:
            with pytest.raises(RpcException) as caught:
                await client.send("echo", object())
            with pytest.raises(RpcException):
                await client.emit("echo", object())
            after = await client.send("echo", "still here")

        assert (caught.value.status_code, caught.value.code) == (400, "not-json")
        assert after == "still here"

    async def test_a_request_to_an_event_handler_is_answered(self) -> None:
        @event_pattern("made")
        async def made(data: int) -> int:
            return data + 1

        async with self.talk(made) as client:
            answer = await client.send("made", 1)

        assert answer == 2

    # Patterns

    @SHAPES
    async def test_a_pattern_of_any_shape_finds_its_handler(self, registered: Any, called: Any) -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()

        @message_pattern(registered)
        async def found(data: Any, ctx: RpcContext) -> str:
            heard.put_nowait(ctx.pattern)
            return ctx.pattern

        async with self.talk(found) as client:
            answer = await client.send(called)
            seen = await heard.get()

        assert seen == answer

    async def test_a_request_to_a_wildcard_is_answered(self) -> None:
        if self.wildcard is None:
            pytest.skip("it has none")
        pattern, name = self.wildcard

        @message_pattern(pattern)
        async def ask(data: Any, ctx: RpcContext) -> Any:
            return [ctx.pattern, ctx.channel, data]

        async with self.talk(ask) as client:
            answer = await client.send(name, 1)
            again = await client.send(name, 2)

        assert answer == [pattern, name, 1]
        assert again == [pattern, name, 2]

    # What is told beside a message

    async def test_the_headers_of_one_request_arrive_with_it_alone(self) -> None:
        if not self.carries_headers:
            pytest.skip("it has none")

        @message_pattern("tell")
        async def tell(data: Any, ctx: RpcContext) -> Any:
            return ctx.headers.get("x-version")

        async with self.talk(tell) as client:
            answers = [
                await client.send("tell", options=options) for options in ({"headers": {"x-version": "1.0"}}, {})
            ]

        assert answers == ["1.0", None]

    async def test_an_option_that_the_transport_has_not_is_refused(self) -> None:
        if not self.has_server:
            pytest.skip("a service of the same process is told what it would be told elsewhere")
        async with self.talk(echo) as client:
            with pytest.raises(ConfigurationError, match="headrs"):
                await client.send("echo", options={"headrs": {}})

    # Deadlines and metadata

    async def test_a_call_without_an_answer_ends_at_its_deadline(self) -> None:
        @message_pattern("never")
        async def never() -> None:
            await asyncio.Event().wait()

        async with self.talk(never, count) as client:
            with pytest.raises(DeadlineExceeded):
                await client.send("never", timeout=0.05)
            with pytest.raises(DeadlineExceeded):
                await anext(client.stream("never", timeout=0.05))

    async def test_the_deadline_reaches_the_handler_and_cancels_it(self) -> None:
        if not self.carries_metadata:
            pytest.skip("a deadline travels as metadata")
        seen: list[float | None] = []
        cancelled = asyncio.Event()

        @message_pattern("never")
        async def never(data: Any, ctx: RpcContext) -> None:
            seen.append(ctx.remaining())
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        async with self.talk(never) as client:
            with pytest.raises(DeadlineExceeded):
                await client.send("never", timeout=0.1)
            await cancelled.wait()

        assert seen[0] is not None
        assert 0 < seen[0] <= 0.1

    async def test_a_call_past_its_deadline_is_not_started(self, gate: threading.Event) -> None:
        ran: list[int] = []
        only_thread_is_taken = threading.Event()

        @message_pattern("block")
        def block() -> None:
            only_thread_is_taken.set()
            gate.wait(PATIENCE)

        @message_pattern("note")
        def note(data: int) -> None:
            ran.append(data)

        async with self.talk(block, note, threads=1) as client:
            blocked = asyncio.create_task(client.send("block"))
            await asyncio.to_thread(only_thread_is_taken.wait, PATIENCE)
            with pytest.raises(DeadlineExceeded):
                await client.send("note", 1, timeout=0.05)
            await asyncio.sleep(0.05)  # a server counts from when the call arrived
            gate.set()
            await blocked
            await client.send("note", 2)

        assert ran == [2]

    async def test_metadata_arrives_beside_the_payload(self) -> None:
        if not self.carries_metadata:
            pytest.skip("it carries none")

        @message_pattern("tell")
        async def tell(data: Any, ctx: RpcContext) -> str:
            return ctx.metadata["trace-id"]

        async with self.talk(tell) as client:
            answer = await client.send("tell", metadata={"trace-id": "é1"})

        assert answer == "é1"

    # Where handlers run, and what stands around them

    async def test_the_colour_of_a_handler_decides_its_thread(self) -> None:
        @message_pattern("def")
        def plain() -> int:
            return threading.get_ident()

        @message_pattern("async-def")
        async def coroutine() -> int:
            return threading.get_ident()

        @message_pattern("inline", inline=True)
        def inline() -> int:
            return threading.get_ident()

        async with self.talk(plain, coroutine, inline) as client:
            threads = [await client.send(pattern) for pattern in ("def", "async-def", "inline")]

        assert [thread == threading.get_ident() for thread in threads] == [False, True, True]

    async def test_middlewares_on_both_sides_see_data_and_outcome(self) -> None:
        @message_pattern("halve")
        def halve(data: int) -> int:
            if data % 2:
                raise RpcException({"statusCode": 409, "message": "odd"})
            return data // 2

        outside, inside = Recorder(), Recorder()
        async with self.talk(halve, client_side=[outside], server_side=[inside]) as client:
            await client.send("halve", 8)
            with pytest.raises(RpcException, match="odd"):
                await client.send("halve", 9)

        for side, recorder, pattern in (("client", outside, "halve"), ("server", inside, self.served_as("halve"))):
            assert {(ctx.side, ctx.service, ctx.pattern) for ctx, _, _ in recorder.calls} == {(side, "shop", pattern)}
        assert [data for _, data, _ in outside.calls] == [8, 9]
        assert [bytes(data) for _, data, _ in inside.calls] == [b"8", b"9"]
        assert inside.calls[0][2] == 4
        assert [outside.calls[1][2].status_code, inside.calls[1][2].status_code] == [409, 409]
        assert [ctx.id for ctx, _, _ in outside.calls] == [ctx.id for ctx, _, _ in inside.calls]

    async def test_a_server_works_on_a_bounded_number_of_messages(self) -> None:
        if not self.bounded:
            pytest.skip("it lets nobody wait")
        self.server_options = {"max_in_flight": 8}
        running: set[int] = set()
        most = 0
        go_on = asyncio.Semaphore(0)
        eight_are_here = asyncio.Event()

        @message_pattern("slow")
        async def slow(data: int) -> int:
            nonlocal most
            running.add(data)
            most = max(most, len(running))
            if most == 8:
                eight_are_here.set()
            await go_on.acquire()
            running.discard(data)
            return data

        async with self.talk(slow) as client:
            calls = [asyncio.create_task(client.send("slow", number)) for number in range(40)]
            await eight_are_here.wait()
            await asyncio.sleep(0.1)  # time for a ninth, which must not come
            for _ in calls:
                go_on.release()
            answers = await asyncio.gather(*calls)

        assert answers == list(range(40))
        assert most == 8

    # The end

    async def test_closing_the_client_fails_what_waits_at_once(self) -> None:
        started: asyncio.Queue[str] = asyncio.Queue()

        @message_pattern("never")
        async def never() -> None:
            started.put_nowait("never")
            await asyncio.Event().wait()

        async with self.talk(never) as client:
            calls = [asyncio.create_task(client.send("never")) for _ in range(3)]
            calls.append(asyncio.create_task(anext(client.stream("never"))))
            for _ in calls:
                await started.get()
            await client.close()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)

        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4

    async def test_a_closed_connection_takes_no_more_calls(self) -> None:
        async with self.talk(echo) as client:
            proxy = client._bound().proxy  # the client itself would make another one
            await client.send("echo")
            await proxy.close()

            for call in (client.send("echo"), client.emit("echo"), anext(client.stream("echo"))):
                with pytest.raises(Unavailable, match="closed"):
                    await call

    async def test_closing_the_server_lets_it_finish_what_runs(self) -> None:
        if not self.has_server:
            pytest.skip("it has no server")
        started, go_on = asyncio.Event(), asyncio.Event()

        @message_pattern("slow")
        async def slow() -> str:
            started.set()
            await go_on.wait()
            return "done"

        async with self.talk(slow) as client:
            answer = asyncio.create_task(client.send("slow"))
            await started.wait()
            closing = asyncio.create_task(self.server.close(PATIENCE))
            await asyncio.sleep(0)
            go_on.set()
            await closing

            assert await answer == "done"


class TransportContract(EventContract, RequestContract):
    """The behaviour of a transport that carries both."""

    async def test_an_event_to_a_request_handler_runs_it(self) -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()

        @message_pattern({"cmd": "ask"})
        async def ask(data: Any, ctx: RpcContext) -> str:
            heard.put_nowait((data, ctx.id))
            return "for nobody"

        async with self.talk(ask) as client:
            await client.emit({"cmd": "ask"}, 1)
            call = await heard.get()

        assert call == (1, None)

    @SHAPES
    async def test_an_event_finds_the_handler_of_a_request(self, registered: Any, called: Any) -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()

        @message_pattern(registered)
        async def found(data: Any, ctx: RpcContext) -> str:
            heard.put_nowait(ctx.pattern)
            return ctx.pattern

        async with self.talk(found) as client:
            await client.emit(called)
            seen = await heard.get()
            answer = await client.send(called)

        assert seen == answer


@pytest.mark.slow
class BrokerContract(Contract):
    """What a transport does when its broker goes and comes back; `broker` is one of the test's own.

    `serve` and `proxy` of a subclass wait for the broker half a second at most: `connect_timeout=0.5`.
    """

    broker: Any
    patience = 30

    async def test_both_sides_find_a_broker_that_has_come_back(self) -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        told = []

        async with self.talk(echo, hearing("made", heard)) as client:
            before = await client.send("echo", 1)
            await client.emit("made", 1)
            await heard.get()
            statuses = [self.server.status, client.status]
            await asyncio.to_thread(self.broker.stop)
            await self._until(lambda: self.server.status is Status.RECONNECTING)
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await client.send("echo", 2, timeout=1)
            try:
                await client.emit("made", 2, timeout=1)
            except RpcException as error:
                told.append(error)
            await asyncio.to_thread(self.broker.start)
            await self._until(lambda: self.server.status is Status.CONNECTED)
            after = await self._insist(client, 3)
            await client.emit("made", 3)
            events = [(await heard.get())[1]]
            while events[-1] != 3:
                events.append((await heard.get())[1])
            statuses += [self.server.status, client.status]

        assert (before, after) == (1, 3)
        assert statuses == [Status.CONNECTED] * 4
        assert events == ([3] if told else [2, 3])
        assert self.server.status is Status.CLOSED

    async def test_what_waits_fails_when_the_broker_goes(self) -> None:
        started: asyncio.Queue[str] = asyncio.Queue()

        @message_pattern("never")
        async def never() -> None:
            started.put_nowait("never")
            await asyncio.Event().wait()

        async with self.talk(never) as client:
            call = asyncio.create_task(client.send("never", timeout=60))
            await started.get()
            await asyncio.to_thread(self.broker.stop)
            with pytest.raises(Unavailable):
                await call
            await asyncio.to_thread(self.broker.start)

    async def test_a_service_may_be_there_before_its_broker(self) -> None:
        await asyncio.to_thread(self.broker.stop)
        async with self.talk(echo) as client:
            status = self.server.status
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await client.send("echo", 1, timeout=1)
            await asyncio.to_thread(self.broker.start)
            await self._until(lambda: self.server.status is Status.CONNECTED)
            answer = await self._insist(client, 2)

        assert status is Status.CONNECTING
        assert answer == 2

    async def _insist(self, client: Client, value: int) -> Any:
        # A broker that has just come back may need a moment until it knows who listens.
        while True:
            try:
                return await client.send("echo", value, timeout=5)
            except (Unavailable, DeadlineExceeded):
                await asyncio.sleep(0.05)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
