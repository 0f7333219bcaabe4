"""NestJS's NATS transport: the contracts, and peers and servers of all manners."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
import pytest_asyncio
from nats.aio.client import Client as Foreign
from nats.aio.msg import Msg

from microservices.client import Client
from microservices.context import RpcContext
from microservices.exceptions import ConfigurationError, ConnectionLost, DeadlineExceeded, RpcException, Unavailable
from microservices.handlers import event_pattern, message_pattern
from microservices.transports import nats_protocol, parse
from microservices.transports.base import Status
from microservices.transports.nats import NatsClient, NatsServer
from microservices.transports.nats_events import NatsListener
from tests.brokers import HOST, Nats, _ask
from tests.toolkit.conftest import service
from tests.toolkit.transports.certificates import Authority
from tests.toolkit.transports.contract import PATIENCE, BrokerContract, TransportContract, count, echo, hearing
from tests.toolkit.transports.wire import Wire, listener, until


class TestNats(TransportContract):
    nobody = Unavailable  # NATS tells
    wildcard = ("users.*", "users.created")
    carries_headers = True
    names_with_spaces = False
    notices_who_leaves = False
    holds_back = False

    @pytest.fixture(autouse=True)
    def use(self, nats_url: str) -> None:
        self.url = nats_url


class TestNatsRestarted(BrokerContract):
    @pytest.fixture(autouse=True)
    def use(self, own_nats: Nats) -> None:
        self.broker = own_nats
        self.url = f"{own_nats.url}?connect_timeout=0.5"


@pytest_asyncio.fixture
async def foreign(nats_url: str) -> AsyncIterator[Foreign]:
    """A client of NATS that knows nothing of the toolkit."""
    async with await nats.connect(nats_url) as client:
        yield client


@asynccontextmanager
async def serving(
    url: str,
    *functions: Callable[..., Any],
    options: str = "",
    kind: type[NatsServer] = NatsServer,
    name: str = "shop",
    grace: float = 0,
    **told: Any,
) -> AsyncIterator[Any]:
    """Serve these handlers."""
    address = parse(url + options)
    server = kind(address._replace(options={**address.options, **told}), service(*functions, name=name))
    await server.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            yield server
    finally:
        await server.close(grace)


@asynccontextmanager
async def calling(url: str, options: str = "", kind: type[NatsClient] = NatsClient) -> AsyncIterator[Client]:
    """Give a client."""
    proxy = kind(parse(url + options), "shop")
    client = Client("shop", lambda: proxy)
    try:
        async with asyncio.timeout(PATIENCE):
            yield client
    finally:
        await client.close()


@asynccontextmanager
async def overhearing(foreign: Foreign, subject: str) -> AsyncIterator[asyncio.Queue[Msg]]:
    """Hear what is published to a subject."""
    heard: asyncio.Queue[Msg] = asyncio.Queue()

    async def hear(message: Msg) -> None:
        heard.put_nowait(message)

    subscription = await foreign.subscribe(subject, cb=hear)
    await foreign.flush()
    try:
        yield heard
    finally:
        await subscription.unsubscribe()


@asynccontextmanager
async def answering(foreign: Foreign, subject: str, *answers: bytes) -> AsyncIterator[None]:
    """Be a server that gives these answers; `ID` in them is the request's."""

    async def answer(message: Msg) -> None:
        for body in answers:
            id = json.loads(message.data)["id"].encode()
            await foreign.publish(message.reply, body.replace(b"ID", id))

    subscription = await foreign.subscribe(subject, cb=answer)
    await foreign.flush()
    try:
        yield
    finally:
        await subscription.unsubscribe()


# Who gets a message


@pytest.mark.asyncio
async def test_the_instances_of_a_service_share_its_requests(nats_url: str) -> None:
    asked: list[str] = []

    def counting(who: str) -> Callable[..., Any]:
        @message_pattern("who")
        async def tell() -> str:
            asked.append(who)
            return who

        return tell

    async with serving(nats_url, counting("a")), serving(nats_url, counting("b")), calling(nats_url) as client:
        answers = await asyncio.gather(*(client.send("who") for _ in range(100)))

    assert set(answers) == {"a", "b"}
    assert len(asked) == 100


@pytest.mark.asyncio
@pytest.mark.parametrize(("first", "second", "copies"), [("", "", 2), ("x", "x", 1), ("x", "y", 2), ("x", "", 2)])
async def test_the_queue_decides_who_shares_events(
    nats_url: str, foreign: Foreign, first: str, second: str, copies: int
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with (
        serving(nats_url, hearing("made", heard), queue=first),
        serving(nats_url, hearing("made", heard), queue=second),
        serving(nats_url, hearing("last", heard)),
        calling(nats_url) as client,
    ):
        await client.emit("made", 1)
        numbers = [(await heard.get())[1] for _ in range(copies)]
        await client.emit("last", 2)
        last = await heard.get()

    assert numbers == [1] * copies
    assert last == ("last", 2, {})


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [NatsServer, NatsListener])
async def test_an_event_for_each_process_is_heard_by_each_and_by_one_where_one_is_enough(
    nats_url: str, kind: type[NatsServer]
) -> None:
    ones: list[Any] = []
    each: dict[str, list[Any]] = {"first": [], "second": []}

    @event_pattern("made")
    async def once(data: int) -> None:
        ones.append(data)

    def everywhere(process: str) -> Callable[..., Any]:
        @event_pattern("made", delivery="each")
        async def drop_cache(data: int) -> None:
            each[process].append(data)

        return drop_cache

    async with (
        serving(nats_url, once, everywhere("first"), kind=kind),
        serving(nats_url, once, everywhere("second"), kind=kind),
        calling(nats_url) as client,
    ):
        for number in range(20):
            await client.emit("made", number)
        await until(lambda: len(ones) == len(each["first"]) == len(each["second"]) == 20)

    assert sorted(ones) == each["first"] == each["second"] == list(range(20))


@pytest.mark.asyncio
async def test_a_request_on_a_route_of_all_kinds_is_answered_once(nats_url: str, foreign: Foreign) -> None:
    ran: list[Any] = []

    @message_pattern("made")
    async def ask(data: Any) -> Any:
        ran.append(data)
        return data

    @event_pattern("made", delivery="each")
    async def drop_cache(data: Any) -> None:
        ran.append(data)

    async with serving(nats_url, ask, drop_cache), overhearing(foreign, "_INBOX.own") as replies:
        await foreign.publish("made", b'{"data":1,"id":"7"}', reply="_INBOX.own")
        answer = await replies.get()
        await foreign.publish("made", b'{"data":2}')
        await until(lambda: 2 in ran)

    assert json.loads(answer.data)["response"] == 1
    assert replies.empty()
    assert ran == [1, 2]


@pytest.mark.asyncio
async def test_a_pattern_of_everything_hears_no_answers(nats_url: str, foreign: Foreign) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with serving(nats_url, hearing(">", heard)), serving(nats_url, echo), calling(nats_url) as client:
        await client.send("echo", 1)
        await client.emit("made.here", 2)
        while (await heard.get())[1] != 2:
            pass

    assert heard.empty()


# Peers of all manners


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("message", "data"),
    [
        ('{"pattern":"made","data":{"id":1}}', {"id": 1}),
        ('{"pattern":{"other":1},"data":2}', 2),  # the subject decides
        ('{"data":[1,2],"trace":"x"}', [1, 2]),
        ('{"id":7,"total":1.5}', {"id": 7, "total": 1.5}),
        ("[1,2]", [1, 2]),
        ("5", 5),
        ('"quoted"', "quoted"),
        ("null", None),
    ],
)
async def test_whatever_json_others_publish_becomes_an_event(
    nats_url: str, foreign: Foreign, message: str, data: Any
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with serving(nats_url, hearing("made", heard)):
        await foreign.publish("made", message.encode())
        call = await heard.get()

    assert call == ("made", data, {})


@pytest.mark.asyncio
@pytest.mark.parametrize("message", [b"", b"plain text", b'{"cut":', b"\xff\xfe", b"NaN"])
async def test_what_is_no_json_is_dropped_and_counted(
    nats_url: str, foreign: Foreign, message: bytes, losses: Callable[[str, str], int]
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with serving(nats_url, hearing("made", heard)):
        await foreign.publish("made", message, reply="_INBOX.own")
        await foreign.publish("made", b"1")
        call = await heard.get()

    assert call == ("made", 1, {})
    assert losses("nats", "no-packet") == 1


@pytest.mark.asyncio
async def test_an_answer_goes_to_the_inbox_as_nestjs_writes_it(nats_url: str, foreign: Foreign) -> None:
    async with serving(nats_url, echo, count), overhearing(foreign, "_INBOX.own") as replies:
        await foreign.publish("echo", '{"pattern":"echo","data":"é","id":7}'.encode(), reply="_INBOX.own")
        answer = await replies.get()
        await foreign.publish("count", b'{"pattern":"count","data":2,"id":"8"}', reply="_INBOX.own")
        values = [(await replies.get()).data for _ in range(3)]

    assert answer.data.decode() == '{"response":"é","isDisposed":true,"id":7}'
    assert answer.headers is None
    assert values == [b'{"response":0,"id":"8"}', b'{"response":1,"id":"8"}', b'{"isDisposed":true,"id":"8"}']


@pytest.mark.asyncio
async def test_without_id_or_inbox_nothing_is_answered(nats_url: str, foreign: Foreign) -> None:
    ran: asyncio.Queue[Any] = asyncio.Queue()

    @message_pattern("ask")
    async def ask(data: Any) -> Any:
        ran.put_nowait(data)
        return data

    async with serving(nats_url, ask, echo), overhearing(foreign, "_INBOX.own") as replies:
        await foreign.publish("ask", b'{"data":1}', reply="_INBOX.own")
        await foreign.publish("ask", b'{"data":2,"id":"2"}')
        calls = [await ran.get(), await ran.get()]
        await foreign.publish("echo", b'{"data":3,"id":"3"}', reply="_INBOX.own")
        answer = await replies.get()

    assert sorted(calls) == [1, 2]
    assert json.loads(answer.data)["id"] == "3"


@pytest.mark.asyncio
async def test_a_request_is_published_as_nestjs_writes_it(nats_url: str, foreign: Foreign) -> None:
    async with overhearing(foreign, '{"a":"x","b":1}') as requests, calling(nats_url) as client:
        call = asyncio.create_task(client.send({"b": 1, "a": "x"}, "é", timeout=None))
        message = await requests.get()
        request = json.loads(message.data)
        await foreign.publish(message.reply, json.dumps({"id": request["id"], "response": 1}).encode())
        await foreign.publish(message.reply, b'{"isDisposed":true}')
        answer = await call

    assert [key for key in request if key != "metadata"] == ["pattern", "data", "id"]
    assert (request["pattern"], request["data"]) == ({"b": 1, "a": "x"}, "é")
    assert message.reply.startswith("_INBOX.")
    assert message.reply.endswith(f".{request['id']}")
    assert message.headers is None
    assert answer == 1


@pytest.mark.asyncio
async def test_an_event_is_published_as_nestjs_writes_it(nats_url: str, foreign: Foreign) -> None:
    async with overhearing(foreign, "made") as events, calling(nats_url) as client:
        await client.emit("made", {"id": 1})
        message = await events.get()

    assert message.data == b'{"pattern":"made","data":{"id":1}}'
    assert (message.reply, message.headers) == ("", None)


@pytest.mark.asyncio
async def test_one_subscription_carries_all_answers(nats_url: str, foreign: Foreign) -> None:
    inboxes = set()

    async with overhearing(foreign, "*") as requests, serving(nats_url, echo, count), calling(nats_url) as client:
        await asyncio.gather(*(client.send("echo", number) for number in range(20)))
        [value async for value in client.stream("count", 3)]
        while not requests.empty():
            inboxes.add(requests.get_nowait().reply.rpartition(".")[0])
        proxy = client._bound().proxy
        subscriptions = len(proxy.unwrap()._takes)

    assert len(inboxes) == subscriptions == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answers", "value"),
    [
        ([b'{"response":1,"isDisposed":true,"id":"ID"}'], 1),
        ([b'{"response":1,"isDisposed":true}'], 1),
        ([b'{"response":1,"isDisposed":true,"trace":"x"}'], 1),  # NestJS from 12.0.2 on would take the whole
        ([b'{"response":9,"isDisposed":true,"id":"another"}', b'{"response":1,"isDisposed":true}'], 1),
        ([b'{"id":"ID"}', b'{"response":1}'], 1),
        ([b'{"isDisposed":true}'], None),
        ([b'{"total":5,"id":"7"}'], {"total": 5, "id": "7"}),
        ([b"[1,2]"], [1, 2]),
        ([b"5"], 5),
        ([b'"text"'], "text"),
    ],
)
async def test_servers_of_all_manners_are_understood(
    nats_url: str, foreign: Foreign, answers: list[bytes], value: Any
) -> None:
    async with answering(foreign, "odd", *answers), calling(nats_url) as client:
        answer = await client.send("odd", 0)

    assert answer == value


@pytest.mark.asyncio
async def test_an_answer_that_is_no_json_fails_its_call_alone(
    nats_url: str, foreign: Foreign, losses: Callable[[str, str], int]
) -> None:
    async with answering(foreign, "odd", b"plain text"), serving(nats_url, echo), calling(nats_url) as client:
        with pytest.raises(RpcException) as caught:
            await client.send("odd", 0)
        after = await client.send("echo", 1)

    assert (caught.value.status_code, caught.value.code) == (502, "no-packet")
    assert after == 1
    assert losses("nats", "no-packet") == 1


@pytest.mark.asyncio
async def test_a_request_to_nobody_fails_at_once_and_the_next_one_finds_who_has_come(
    nats_url: str, foreign: Foreign
) -> None:
    async with calling(nats_url) as client:
        with pytest.raises(Unavailable, match=r"Nobody listens for shop on nats://"):
            await client.send("echo", 1, timeout=PATIENCE)
        async with answering(foreign, "odd", b""):  # an empty answer is nobody, too
            with pytest.raises(Unavailable, match="Nobody listens"):
                await client.send("odd", 1)
        async with serving(nats_url, echo):
            answer = await client.send("echo", 2)

    assert answer == 2


@pytest.mark.asyncio
async def test_bytes_that_are_no_utf_8_in_a_subject_hurt_nobody(nats_url: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    _, writer = await asyncio.open_connection(HOST, parse(nats_url).port)
    try:
        async with serving(nats_url, hearing("users.*", heard), echo), calling(nats_url) as client:
            writer.write(b"CONNECT {}\r\nPUB users.\xff 1\r\n1\r\nPUB users.x \xff 1\r\n2\r\nPUB users.y 1\r\n3\r\n")
            calls = [await heard.get() for _ in range(3)]
            answer = await client.send("echo", 1)
    finally:
        writer.close()
        await writer.wait_closed()

    assert calls == [("users.*", number, {}) for number in (1, 2, 3)]
    assert answer == 1


@pytest.mark.asyncio
async def test_a_codec_of_ones_own_is_spoken_by_both_sides(
    nats_url: str, foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "docs" / "examples"))
    heard: asyncio.Queue[Any] = asyncio.Queue()
    zipped = "?codec=zipped.Zipped"

    async with (
        serving(nats_url, echo, hearing("made", heard), options=zipped),
        calling(nats_url, zipped) as client,
        overhearing(foreign, "echo") as requests,
        overhearing(foreign, "_INBOX.>") as answers,
    ):
        answer = await client.send("echo", {"text": "é" * 1000})
        await client.emit("made", 1)
        event = await heard.get()
        await foreign.publish("made", b'"not compressed"')
        foreign_event = await heard.get()
        bodies = [(await requests.get()).data, (await answers.get()).data]

    assert answer == {"text": "é" * 1000}
    assert (event[1], foreign_event[1]) == (1, "not compressed")
    assert all(body.startswith(b"x\x9c") and len(body) < 200 for body in bodies)


# Headers, and what a handler is told


@pytest.mark.asyncio
async def test_a_handler_is_told_where_its_message_came_from(nats_url: str, foreign: Foreign) -> None:
    facts: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("users.*")
    async def hear(data: Any, ctx: RpcContext) -> None:
        facts.put_nowait(ctx)

    async with serving(nats_url, hear):
        headers = {"x-version": "1.0", "traceparent": "00-1-2-01"}
        await foreign.publish("users.created", b'{"data":1}', headers=headers)
        ctx = await facts.get()
        await foreign.publish("users.created", b'{"data":1,"metadata":{"traceparent":"00-3"}}', headers=headers)
        other = await facts.get()

    assert (ctx.pattern, ctx.channel, ctx.transport, ctx.peer) == ("users.*", "users.created", "nats", nats_url)
    assert ctx.headers == headers
    assert ctx.metadata == {"traceparent": "00-1-2-01"}
    assert (ctx.native.subject, ctx.native.reply, ctx.native.data) == ("users.created", "", b'{"data":1}')
    assert other.metadata == {"traceparent": "00-3"}


@pytest.mark.asyncio
async def test_headers_and_the_trace_travel_beside_the_packet(nats_url: str, foreign: Foreign) -> None:
    async with overhearing(foreign, "made") as events, calling(nats_url) as client:
        metadata = {"traceparent": "00-1-2-01", "other": "x"}
        await client.emit("made", 1, metadata=metadata, options={"headers": {"x-version": "é 1"}})
        message = await events.get()

    assert message.headers == {"traceparent": "00-1-2-01", "x-version": "é 1"}
    assert json.loads(message.data) == {"pattern": "made", "data": 1, "metadata": metadata}


@pytest.mark.asyncio
@pytest.mark.parametrize("headers", [{"x version": "1"}, {"x:": "1"}, {"é": "1"}, {"x\r\nPUB": "1"}, {"x": "\ud800"}])
async def test_what_can_be_no_header_fails_its_message_alone(nats_url: str, headers: dict[str, str]) -> None:
    async with serving(nats_url, echo), calling(nats_url) as client:
        with pytest.raises(RpcException) as caught:
            await client.send("echo", 1, options={"headers": headers})
        answer = await client.send("echo", 2, options={"headers": {"x": "1\r\nPUB echo 1\r\n1"}})

    assert (caught.value.status_code, caught.value.code) == (400, "bad-header")
    assert answer == 2


# Names that NATS does not have


@pytest.mark.parametrize(
    "pattern", ["a b", "a\tb", "a\nb", "", "a..b", ".a", "a.", "a*", ">.a", "a>", "\ud800", {"cmd": "a b"}]
)
@pytest.mark.asyncio
async def test_a_pattern_that_can_be_no_subject_is_refused_at_start(nats_url: str, pattern: Any) -> None:
    @message_pattern(pattern)
    async def unreachable() -> None: ...

    with pytest.raises(ConfigurationError, match=r"unreachable in shop, .* is no subject of NATS"):
        await NatsServer(parse(nats_url), service(unreachable)).listen()


@pytest.mark.parametrize("pattern", ["a b", "a\tb", "a\r\nPUB x", "a\vb", "", "a..b", ".a", "x" * 3000])
@pytest.mark.asyncio
async def test_a_pattern_that_can_be_no_subject_fails_its_call_alone(nats_url: str, pattern: str) -> None:
    async with serving(nats_url, echo), calling(nats_url) as client:
        for call in (client.send(pattern, 1), client.emit(pattern, 1), anext(client.stream(pattern, 1))):
            with pytest.raises(RpcException) as caught:
                await call
            assert (caught.value.status_code, caught.value.code) == (400, "bad-pattern")
        answer = await client.send("echo", 2)

    assert answer == 2


# Bounds


@pytest.mark.asyncio
async def test_a_message_that_is_too_large_fails_alone(nats_url: str, caplog: pytest.LogCaptureFixture) -> None:
    @message_pattern("large")
    async def large() -> str:
        return "x" * 2_000_000

    async with serving(nats_url, echo, large), calling(nats_url) as client:
        for call in (client.send("echo", "x" * 2_000_000), client.emit("echo", "x" * 2_000_000)):
            with pytest.raises(RpcException) as caught:
                await call
            assert (caught.value.status_code, caught.value.code) == (413, "too-large")
        with pytest.raises(RpcException) as caught:
            await client.send("echo", "x" * (2**20 - 300), options={"headers": {"x": "y" * 300}})
        assert caught.value.code == "too-large"
        with pytest.raises(RpcException, match="Internal server error"):
            await client.send("large")
        answer = await client.send("echo", 2)

    assert answer == 2
    assert "where NATS takes 1048576" in caplog.text


@pytest.mark.asyncio
async def test_messages_beyond_the_bound_are_dropped_and_counted(
    nats_url: str, foreign: Foreign, losses: Callable[[str, str], int]
) -> None:
    heard: list[int] = []
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made(data: int) -> None:
        heard.append(data)
        await go_on.wait()

    async with serving(nats_url, made, options="?max_in_flight=1&max_waiting=10"):
        await foreign.publish("made", b"0")
        await until(lambda: heard == [0])
        for number in range(1, 100):
            await foreign.publish("made", b"%d" % number)
        await until(lambda: losses("nats", "slow-consumer") >= 88)
        go_on.set()
        await until(lambda: len(heard) == 100 - losses("nats", "slow-consumer"))

    assert heard == sorted(heard)
    assert losses("nats", "slow-consumer") in (88, 89)  # one may wait for its turn beside those


@pytest.mark.asyncio
async def test_a_flood_of_values_reaches_who_takes_them_at_once(nats_url: str) -> None:
    async with serving(nats_url, count), calling(nats_url) as client:
        values = [value async for value in client.stream("count", 10_000)]

    assert values == list(range(10_000))


@pytest.mark.asyncio
async def test_a_stream_that_is_taken_too_slowly_fails_and_hurts_no_other_call(nats_url: str) -> None:
    all_sent = asyncio.Event()

    @message_pattern("flood")
    async def flood() -> AsyncIterator[int]:
        for number in range(3000):
            yield number
        all_sent.set()

    async with serving(nats_url, flood, echo), calling(nats_url) as client:
        values = client.stream("flood")
        first = await anext(values)
        await all_sent.wait()
        others = [await client.send("echo", number) for number in range(3)]
        with pytest.raises(RpcException) as caught:
            async for _ in values:
                pass

    assert (first, others) == (0, [0, 1, 2])
    assert caught.value.code == "stream-overflow"


@pytest.mark.asyncio
async def test_closing_takes_what_has_arrived_and_nothing_more(nats_url: str, foreign: Foreign) -> None:
    heard: list[int] = []
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made(data: int) -> None:
        heard.append(data)
        await go_on.wait()

    async with serving(nats_url, made, options="?max_in_flight=3") as server:
        for number in range(10):
            await foreign.publish("made", b"%d" % number)
        await foreign.flush()
        await until(lambda: len(heard) == 3)
        closing = asyncio.create_task(server.close(PATIENCE))
        while True:  # until NATS knows that it is leaving
            try:
                await foreign.request("made", b"10", timeout=0.01)
            except nats.errors.NoRespondersError:
                break
            except TimeoutError:
                continue
        go_on.set()
        await closing
        after = len(heard)

    assert heard[:10] == list(range(10))
    assert len(heard) == after


@pytest.mark.asyncio
async def test_closing_in_a_hurry_starts_nothing_more(nats_url: str, foreign: Foreign) -> None:
    heard: list[int] = []

    @event_pattern("made")
    async def made(data: int) -> None:
        heard.append(data)
        await asyncio.Event().wait()

    async with serving(nats_url, made, options="?max_in_flight=3") as server:
        for number in range(10):
            await foreign.publish("made", b"%d" % number)
        await until(lambda: len(heard) == 3)
        await server.close(0)

    assert heard == [0, 1, 2]


@pytest.mark.asyncio
async def test_the_last_answers_leave_before_the_connection_closes(nats_url: str, foreign: Foreign) -> None:
    async with serving(nats_url, count) as server, overhearing(foreign, "_INBOX.own") as replies:
        await foreign.publish("count", b'{"data":5000,"id":"1"}', reply="_INBOX.own")
        await foreign.flush()
        await replies.get()
        await server.close(PATIENCE)
        await until(lambda: replies.qsize() == 5000)


GREETING = b'INFO {"server_id":"x","version":"2.9.0","headers":true,"max_payload":1048576}\r\n'


async def greet(wire: Wire) -> None:
    """Be a NATS until somebody has connected and subscribed."""
    await wire.say(GREETING)
    await wire.reader.readuntil(b"PING\r\n")
    await wire.say(b"PONG\r\n")
    await wire.reader.readuntil(b"PING\r\n")
    await wire.say(b"PONG\r\n")


async def greet_halfway(wire: Wire) -> None:
    """Be a NATS that says who it is, and nothing more."""
    await wire.say(GREETING)


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["send", "emit"])
@pytest.mark.parametrize("until_silent", [None, greet_halfway, greet])
async def test_a_nats_that_falls_silent_costs_no_more_than_the_deadline(
    verb: str, until_silent: Callable[[Wire], Awaitable[None]] | None
) -> None:
    async def fall_silent(wire: Wire) -> None:
        if until_silent is not None:
            await until_silent(wire)
        await wire.reader.read()

    async with listener(fall_silent) as port, calling(f"nats://127.0.0.1:{port}") as client:
        with pytest.raises(DeadlineExceeded):
            await getattr(client, verb)("echo", 1, timeout=0.05)


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["send", "emit"])
@pytest.mark.parametrize("nonsense", [b"nonsense\r\n", b"-ERR\r\n", b"MSG x 1 -1\r\n"])
async def test_bytes_that_are_not_nats_end_the_connection(verb: str, nonsense: bytes) -> None:
    async def talk(wire: Wire) -> None:
        await greet(wire)
        await wire.reader.readuntil(b"PUB")
        await wire.say(nonsense)
        await wire.reader.read()

    async with listener(talk) as port, calling(f"nats://127.0.0.1:{port}") as client:
        with pytest.raises(ConnectionLost):
            await getattr(client, verb)("echo", 1)


@pytest.mark.asyncio
async def test_a_nats_that_takes_nothing_costs_no_more_than_the_deadline_and_a_bounded_buffer() -> None:
    over = asyncio.Event()

    async def full(wire: Wire) -> None:
        await greet(wire)
        wire.stop_reading()
        await over.wait()

    async with listener(full) as port, calling(f"nats://127.0.0.1:{port}") as client:
        with pytest.raises(DeadlineExceeded):
            await client.emit("made", 0, timeout=0.05)
        calls = [client.emit("made", "x" * 900_000, timeout=0.2) for _ in range(40)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        unsent = client._bound().proxy.unwrap().transport.get_write_buffer_size()
        over.set()

    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * 40
    assert unsent < 2.1 * 2**20


@pytest.mark.asyncio
async def test_requests_wait_while_nats_takes_no_answers() -> None:
    ran = 0
    noticed, over = asyncio.Event(), asyncio.Event()

    @message_pattern("large", inline=True)
    def large() -> str:
        nonlocal ran
        ran += 1
        return "x" * 900_000

    async def full(wire: Wire) -> None:
        await greet(wire)
        wire.stop_reading()
        for number in range(50):
            await wire.say(b'MSG large 1 _INBOX.x 19\r\n{"id":%3d,"data":1}\r\n' % number)
        await noticed.wait()
        wire.go_on_reading()
        tail = b""
        while b'"id":49}' not in tail:
            tail = tail[-10:] + await wire.reader.read(2**16)
        over.set()
        await wire.reader.read()

    async with listener(full) as port, serving(f"nats://127.0.0.1:{port}", large) as server:
        await until(lambda: ran > 1 and server.unwrap().congestion() is not None)
        before = ran
        noticed.set()
        await over.wait()

    assert before < 30
    assert ran == 50


@pytest.mark.asyncio
async def test_a_nats_that_has_vanished_without_a_word_counts_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_protocol, "_EVERY", 0.1)
    pinged = 0

    async def vanish(wire: Wire) -> None:
        nonlocal pinged
        await greet(wire)
        while pinged < 3:  # so long it is there
            await wire.reader.readuntil(b"PING\r\n")
            pinged += 1
            await wire.say(b"PONG\r\n")
        await wire.reader.read()

    async with listener(vanish) as port, calling(f"nats://127.0.0.1:{port}") as client:
        with pytest.raises(ConnectionLost, match="NATS fell silent"):
            await client.send("echo", 1, timeout=PATIENCE)

    assert pinged == 3


# Restarts


@pytest.mark.asyncio
async def test_a_server_can_be_closed_while_nats_is_away(own_nats: Nats, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(own_nats.url, echo) as server:
        own_nats.stop()
        await until(lambda: server.status is not Status.CONNECTED)
        await server.close(1)

        assert server.status is Status.CLOSED
    assert f"shop does not hear {own_nats.url}: the connection was lost" in caplog.text


@pytest.mark.asyncio
async def test_of_several_servers_the_first_that_answers_is_taken(own_nats: Nats, nats_url: str) -> None:
    url = f"nats://127.0.0.1:{own_nats.port},127.0.0.1:{parse(nats_url).port}"

    async with serving(url, echo) as server, calling(url) as client:
        before = await client.send("echo", 1)
        own_nats.stop()
        await until(lambda: server.status is not Status.CONNECTED)
        await until(lambda: server.status is Status.CONNECTED)
        after = await client.send("echo", 2)

    assert (before, after) == (1, 2)


# Options, credentials, TLS


@pytest.mark.asyncio
async def test_the_prefix_of_inboxes_is_an_option(nats_url: str, foreign: Foreign) -> None:
    async with overhearing(foreign, "echo") as requests, serving(nats_url, echo):
        async with calling(nats_url, "?inbox_prefix=shop.in") as client:
            answer = await client.send("echo", 1)
        message = await requests.get()

    assert message.reply.startswith("shop.in.")
    assert answer == 1


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("queu=x", "did you mean 'queue'"),
        ("max_waiting=0", "Expected `int` >= 1"),
        ("inbox_prefix=a%20b", "cannot start the name of an inbox"),
        ("inbox_prefix=a.*", "cannot start the name of an inbox"),
        ("queue=a%20b", "must hold no blanks"),
        ("cafile=/nowhere.pem", "TLS cannot be set up with /nowhere.pem"),
        ("stream=events", "unknown option 'stream'"),
    ],
)
def test_a_bad_option_is_explained(query: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        NatsServer(parse(f"nats://127.0.0.1?{query}"), service(echo))


class Configured(Nats):
    """A NATS with a configuration of its own."""

    more = ""

    def _command(self) -> list[str]:
        file = self._folder / "nats.conf"
        file.write_text(f"listen: {HOST}:{self.port}\n{self.more}")
        return [self._binary, "-c", str(file)]

    def _answers(self) -> bool:
        return _ask(self.port, b"PING\r\n", 5) == b"INFO "


@contextmanager
def configured(folder: Path, more: str) -> Iterator[Configured]:
    """Run a NATS with these lines in its configuration."""
    server = Configured(folder / "nats")
    server.more = more
    with server:
        yield server


@pytest.mark.asyncio
async def test_user_and_password_open_the_door(tmp_path: Path) -> None:
    with configured(tmp_path, 'authorization { user: shop, password: "se:cr@t" }') as server:
        url = f"nats://shop:se%3Acr%40t@{HOST}:{server.port}"
        async with serving(url, echo), calling(url) as client:
            answer = await client.send("echo", 1)

    assert answer == 1


@pytest.mark.asyncio
async def test_a_token_opens_the_door_and_without_it_stays_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with configured(tmp_path, 'authorization { token: "t0ken" }') as server:
        url = f"nats://t0ken@{HOST}:{server.port}"
        async with serving(url, echo), calling(url) as client:
            answer = await client.send("echo", 1)
        wrong = f"nats://s3cret@{HOST}:{server.port}"
        async with serving(wrong, echo, options="?connect_timeout=0.1") as shut, calling(wrong) as client:
            with pytest.raises(Unavailable, match="Authorization Violation") as caught:
                await client.send("echo", 1)
            shown = [repr(shut), str(caught.value), repr(caught.value), repr(shut.address)]

    assert answer == 1
    assert "does not hear nats://" in caplog.text
    assert "s3cret" not in caplog.text + "".join(shown)


PERMISSIONS = """
authorization { users = [
  { user: all, password: x }
  { user: shop, password: x, permissions { publish: ["echo", "_INBOX.>"], subscribe: ["echo", "_INBOX.>"] } }
  { user: deaf, password: x, permissions { subscribe: ["echo"] } }
] }
"""


@pytest.mark.asyncio
async def test_a_subject_that_is_not_allowed_is_told_and_hurts_no_other_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with configured(tmp_path, PERMISSIONS) as server:
        place = f"{HOST}:{server.port}"
        async with serving(f"nats://all:x@{place}", echo), calling(f"nats://shop:x@{place}") as client:
            outcomes = await asyncio.gather(
                client.send("echo", 1),
                client.send("secret", 2, timeout=PATIENCE),
                client.emit({"cmd": "Secret"}, 3),
                client.send("echo", 4),
                return_exceptions=True,
            )
        async with serving(f"nats://shop:x@{place}", echo, count, options="?connect_timeout=0.1") as shut:
            status = shut.status
        async with calling(f"nats://deaf:x@{place}") as client:
            with pytest.raises(Unavailable, match="where answers come"):
                await client.send("echo", 1)

    assert [outcomes[0], outcomes[3]] == [1, 4]
    refused = [outcome for outcome in outcomes if isinstance(outcome, RpcException)]
    assert [(error.status_code, error.code) for error in refused] == [(403, "forbidden")] * 2
    assert status is Status.CONNECTING
    assert "does not allow 'count'" in caplog.text


@pytest.mark.asyncio
async def test_both_sides_of_tls_can_ask_for_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    ours, theirs = authority.issue("shop"), authority.issue("nats")
    more = (
        f'tls {{ cert_file: "{theirs.certfile}", key_file: "{theirs.keyfile}", '
        f'ca_file: "{authority.cafile}", verify: true }}'
    )
    with configured(tmp_path, more) as server:
        url = f"{server.url}?cafile={authority.cafile}&certfile={ours.certfile}&keyfile={ours.keyfile}"
        async with serving(url, echo), calling(f"{url}&server_name=nats") as client:
            answer = await client.send("echo", 1)
        for bad in (f"{url}&server_name=other", f"{server.url}?cafile={authority.cafile}", server.url):
            async with calling(bad) as client:
                with pytest.raises(Unavailable, match="NATS cannot be reached"):
                    await client.send("echo", 1)

    assert answer == 1


@pytest.mark.asyncio
async def test_tls_that_nats_only_offers_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    theirs = authority.issue("nats")
    more = f'tls {{ cert_file: "{theirs.certfile}", key_file: "{theirs.keyfile}" }}\nallow_non_tls: true'
    with configured(tmp_path, more) as server:
        encrypted = f"{server.url}?cafile={authority.cafile}"
        async with serving(server.url, echo) as plain, calling(encrypted) as client:
            answer = await client.send("echo", 1)
            used = [
                end.unwrap().transport.get_extra_info("ssl_object") is not None
                for end in (plain, client._bound().proxy)
            ]

    assert answer == 1
    assert used == [False, True]


@pytest.mark.asyncio
async def test_credentials_are_not_sent_where_tls_was_asked_for_and_is_not_there(tmp_path: Path) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def plain(wire: Wire) -> None:
        await wire.say(GREETING)
        try:
            heard.put_nowait(await wire.reader.read())
        except ConnectionError:
            heard.put_nowait(b"")

    cafile = Authority(tmp_path).cafile
    async with listener(plain) as port, calling(f"nats://shop:x@127.0.0.1:{port}?cafile={cafile}") as client:
        with pytest.raises(Unavailable, match="secure connection not available"):
            await client.send("echo", 1)
        said = await heard.get()

    assert said == b""
