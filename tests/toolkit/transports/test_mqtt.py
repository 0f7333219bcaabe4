"""NestJS's MQTT transport: the contract over real brokers, and peers and brokers of all manners."""

import asyncio
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import gmqtt
import pytest
from gmqtt.mqtt.constants import MQTTv50, MQTTv311

from microservices.client import Client
from microservices.context import RpcContext
from microservices.exceptions import (
    ConfigurationError,
    ConnectionLost,
    DeadlineExceeded,
    RpcException,
    Unavailable,
)
from microservices.handlers import event_pattern, message_pattern
from microservices.transports import mqtt, parse
from microservices.transports.base import Status
from microservices.transports.mqtt import MqttClient, MqttServer, Options
from microservices.transports.mqtt_connection import MqttConnection, ignore, open_connection
from microservices.transports.mqtt_events import MqttBus, MqttListener
from microservices.transports.mqtt_packets import Message
from tests.brokers import Mosquitto
from tests.toolkit.conftest import service
from tests.toolkit.transports.certificates import Authority
from tests.toolkit.transports.contract import (
    PATIENCE,
    BrokerContract,
    EventContract,
    TransportContract,
    count,
    echo,
    hearing,
)
from tests.toolkit.transports.wire import Wire, listener, until

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


class TestMqtt(TransportContract):
    nobody = DeadlineExceeded
    notices_who_leaves = False  # one reply topic for all callers of a pattern
    holds_back = False
    wildcard = ("users/+", "users/created")

    @pytest.fixture(autouse=True)
    def use(self, mqtt_url: str) -> None:
        self.url = mqtt_url


class TestMqtt5(TestMqtt):
    nobody = Unavailable  # the acknowledgement says that it reached nobody
    carries_headers = True

    @pytest.fixture(autouse=True)
    def use(self, mqtt_url: str) -> None:
        self.url = f"{mqtt_url}?version=5&qos=1"


class TestMqttOfNats(TestMqtt):
    names_with_spaces = False

    @pytest.fixture(autouse=True)
    def use(self, nats_mqtt_url: str) -> None:
        self.url = nats_mqtt_url


class TestMqttRestarted(BrokerContract):
    @pytest.fixture(autouse=True)
    def use(self, own_mosquitto: Mosquitto) -> None:
        self.broker = own_mosquitto
        self.url = f"{own_mosquitto.url}?connect_timeout=0.5"


class TestMqttBus(EventContract):
    roles = ("listener", "bus")

    @pytest.fixture(autouse=True)
    def use(self, mqtt_url: str) -> None:
        self.url = f"{mqtt_url}?retry_after=0.01"


class TestMqttBusOfNats(TestMqttBus):
    names_with_spaces = False

    @pytest.fixture(autouse=True)
    def use(self, nats_mqtt_url: str) -> None:
        self.url = f"{nats_mqtt_url}?retry_after=0.01&share=false"


@asynccontextmanager
async def serving(url: str, *functions: Callable[..., Any], grace: float = 0) -> AsyncIterator[MqttServer]:
    """Serve these handlers."""
    server = MqttServer(parse(url), service(*functions))
    await server.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            yield server
    finally:
        await server.close(grace)


@asynccontextmanager
async def listening(url: str, *functions: Callable[..., Any], name: str = "shop") -> AsyncIterator[MqttListener]:
    """Hear events as one process of a service."""
    listener = MqttListener(parse(url), service(*functions, name=name))
    await listener.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            yield listener
    finally:
        await listener.close(0)


@asynccontextmanager
async def calling(url: str, kind: type[MqttClient] = MqttClient) -> AsyncIterator[Client]:
    """Give a client."""
    proxy = kind(parse(url), "shop")
    client = Client("shop", lambda: proxy)
    try:
        async with asyncio.timeout(PATIENCE):
            yield client
    finally:
        await client.close()


class Foreign:
    """gmqtt's own client: it knows nothing of the toolkit."""

    def __init__(self, client: gmqtt.Client) -> None:
        self.client = client
        self.heard: asyncio.Queue[tuple[str, bytes, int, dict[str, Any]]] = asyncio.Queue()
        self._subscribed = asyncio.Event()
        client.on_message = self._note
        client.on_subscribe = lambda *_: self._subscribed.set()

    def publish(self, topic: str, body: str | bytes, **more: Any) -> None:
        """Publish, and do not wait."""
        self.client.publish(topic, body, **more)

    async def subscribe(self, topic: str, qos: int = 0) -> None:
        """Subscribe; return when it is done."""
        self._subscribed.clear()
        self.client.subscribe(topic, qos=qos)
        await self._subscribed.wait()

    async def settled(self) -> None:
        """Return when the broker has taken all that this client has sent."""
        await self.subscribe(f"settled/{os.urandom(4).hex()}")

    def _note(self, client: Any, topic: str, payload: bytes, qos: int, properties: dict[str, Any]) -> None:
        self.heard.put_nowait((topic, bytes(payload), qos, properties))


@asynccontextmanager
async def foreign(url: str, version: int = MQTTv311) -> AsyncIterator[Foreign]:
    """Give somebody else's client."""
    client = gmqtt.Client(f"foreign-{os.urandom(4).hex()}")
    peer = Foreign(client)
    address = parse(url)
    await client.connect(address.host, address.port, version=version)
    try:
        yield peer
    finally:
        await client.disconnect()


def taking(taken: list[Any], pattern: str = "made", **options: Any) -> Callable[..., Any]:
    """Make a handler that notes what it was given."""

    @event_pattern(pattern, **options)
    async def take(data: Any) -> None:
        taken.append(data)

    return take


# Peers of all manners


@pytest.mark.asyncio
async def test_an_answer_goes_to_the_reply_topic_as_nestjs_writes_it(mqtt_url: str) -> None:
    async with serving(mqtt_url, echo), foreign(mqtt_url) as peer:
        await peer.subscribe("echo/reply")
        peer.publish("echo", '{"pattern":"echo","data":"é","id":7}')
        topic, body, qos, _ = await peer.heard.get()

    assert (topic, body.decode(), qos) == ("echo/reply", '{"response":"é","isDisposed":true,"id":7}', 0)


@pytest.mark.asyncio
async def test_a_request_is_published_as_nestjs_writes_it(mqtt_url: str) -> None:
    async with foreign(mqtt_url) as peer, calling(mqtt_url) as client:
        await peer.subscribe('{"a":"x","b":1}')
        call = asyncio.create_task(client.send({"b": 1, "a": "x"}, "é"))
        _, body, qos, properties = await peer.heard.get()
        request = json.loads(body)
        peer.publish('{"a":"x","b":1}/reply', json.dumps({"id": request["id"], "response": 1}))
        peer.publish('{"a":"x","b":1}/reply', json.dumps({"id": request["id"], "isDisposed": True}))
        answer = await call

    assert list(request) == ["pattern", "data", "metadata", "id"]
    assert (request["pattern"], request["data"]) == ({"b": 1, "a": "x"}, "é")
    assert len(request["id"]) > 32
    assert (qos, properties["retain"], properties["dup"]) == (0, 0, 0)
    assert answer == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("message", "data"),
    [
        ('{"pattern":"made","data":{"id":1}}', {"id": 1}),
        ('{"pattern":{"other":1},"data":2}', 2),  # the topic decides
        ('{"id":7,"total":1.5}', {"id": 7, "total": 1.5}),
        ("[1,2]", [1, 2]),
        ("null", None),
        ("plain é 😀 text", "plain é 😀 text"),
        ('{"cut":', '{"cut":'),
        ("", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
async def test_whatever_others_publish_becomes_an_event(mqtt_url: str, message: str | bytes, data: Any) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with serving(mqtt_url, hearing("made", heard)), foreign(mqtt_url) as peer:
        peer.publish("made", message)
        call = await heard.get()

    assert call == ("made", data, {})


@pytest.mark.asyncio
@pytest.mark.parametrize("odd", ["no JSON", "5", "[]", "null", '{"id":"another","response":1,"isDisposed":true}'])
async def test_answers_to_others_and_nonsense_are_passed_over(mqtt_url: str, odd: str) -> None:
    go_on = asyncio.Event()

    @message_pattern("slow")
    async def slow() -> str:
        await go_on.wait()
        return "done"

    async with serving(mqtt_url, slow), calling(mqtt_url) as client, foreign(mqtt_url) as peer:
        call = asyncio.create_task(client.send("slow"))
        peer.publish("slow/reply", odd)
        await peer.settled()
        go_on.set()
        answer = await call

    assert answer == "done"


@pytest.mark.asyncio
async def test_a_handler_sees_the_message_itself(mqtt_url: str) -> None:
    seen: asyncio.Queue[RpcContext] = asyncio.Queue()

    @event_pattern("users/+")
    async def hear(data: Any, ctx: RpcContext) -> None:
        seen.put_nowait(ctx)

    async with serving(f"{mqtt_url}?version=5&qos=1", hear), foreign(mqtt_url, MQTTv50) as peer:
        peer.publish(
            "users/7",
            '{"pattern":"users/7","data":1}',
            qos=1,
            user_property=[("x-version", "1"), ("traceparent", "00-1-2-01")],
            content_type="application/json",
        )
        ctx = await seen.get()

    native = ctx.native
    assert (ctx.pattern, ctx.channel) == ("users/+", "users/7")
    assert dict(ctx.headers) == {"x-version": "1", "traceparent": "00-1-2-01"}
    assert ctx.metadata == {"traceparent": "00-1-2-01"}
    assert (native.topic, native.qos, native.retain) == ("users/7", 1, False)
    assert json.loads(native.payload) == {"pattern": "users/7", "data": 1}
    assert native.properties["content_type"] == "application/json"


@pytest.mark.asyncio
async def test_the_trace_of_a_call_travels_as_user_properties(mqtt_url: str) -> None:
    url = f"{mqtt_url}?version=5"
    async with foreign(mqtt_url, MQTTv50) as peer, calling(url) as client:
        await peer.subscribe("made")
        await client.emit("made", 1, metadata={"traceparent": "00-1-2-01", "other": "x"})
        _, body, _, properties = await peer.heard.get()

    assert json.loads(body)["metadata"] == {"traceparent": "00-1-2-01", "other": "x"}
    assert properties["user_property"] == [("traceparent", "00-1-2-01")]


# What one message may be told


@pytest.mark.asyncio
async def test_a_message_may_be_retained_and_have_properties_of_its_own(mqtt_url: str) -> None:
    url = f"{mqtt_url}?version=5"
    told = {"message_expiry_interval": 60, "content_type": "text/x", "correlation_data": "id"}
    async with calling(url) as client, foreign(mqtt_url, MQTTv50) as peer:
        await client.emit("kept", 1, options={"qos": 1, "retain": True, "dup": True, "properties": told})
        await peer.subscribe("kept", qos=1)
        _, body, qos, properties = await peer.heard.get()
        peer.publish("kept", b"", retain=True)
        await peer.settled()

    assert json.loads(body)["data"] == 1
    assert (qos, properties["retain"], properties["content_type"]) == (1, 1, ["text/x"])
    assert properties["correlation_data"] == [b"id"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("version", "options", "complaint"),
    [
        ("3.1.1", {"headers": {"a": "b"}}, "version=5"),
        ("3.1.1", {"properties": {"content_type": "x"}}, "version=5"),
        ("5", {"properties": {"conten_type": "x"}}, "conten_type"),
        ("5", {"properties": {"message_expiry_interval": "soon"}}, "cannot be sent"),
        ("5", {"qos": 3}, "qos"),
        ("5", {"dup": True}, "dup needs"),
    ],
)
async def test_what_cannot_be_told_is_refused(mqtt_url: str, version: str, options: Any, complaint: str) -> None:
    async with calling(f"{mqtt_url}?version={version}") as client:
        with pytest.raises(ConfigurationError, match=complaint):
            await client.emit("made", 1, options=options)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["users/+", "c++", "a#", "a\0b", "", "x" * 70_000])
async def test_a_name_that_cannot_be_a_topic_fails_its_caller_alone(mqtt_url: str, name: str) -> None:
    async with serving(mqtt_url, echo), calling(mqtt_url) as client:
        with pytest.raises(RpcException) as caught:
            await client.send(name, 1)
        with pytest.raises(RpcException):
            await client.emit(name, 1)
        answer = await client.send("echo", 2)

    assert caught.value.code == "bad-topic"
    assert answer == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("pattern", ["a/#/b", "a+", "a/b#", '{"lang":"c++"}'])
async def test_a_pattern_that_no_broker_takes_is_told_at_the_start(mqtt_url: str, pattern: str) -> None:
    server = MqttServer(parse(mqtt_url), service(hearing(pattern, asyncio.Queue())))
    with pytest.raises(ConfigurationError, match="must be a whole"):
        await server.listen()


@pytest.mark.parametrize("query", ["version=4", "qos=3", "share=a/b", "clean=false", "keepalive=-1", "max_packet=1"])
def test_an_option_that_makes_no_sense_is_told(query: str) -> None:
    with pytest.raises(ConfigurationError):
        MqttServer(parse(f"mqtt://localhost?{query}"), service(echo))


# Subscriptions


@pytest.mark.asyncio
@pytest.mark.parametrize("version", ["3.1.1", "5"])
async def test_a_name_goes_to_its_own_handler_and_once_though_others_match(mqtt_url: str, version: str) -> None:
    taken: list[Any] = []
    patterns = ["u/#", "u/+", "u/made", "u/made/now", "u"]
    handlers = [taking(taken, "end"), *(_noting(taken, pattern) for pattern in patterns)]
    names = ["u/made", "u/other", "u/made/now", "u/x/y", "u"]

    async with serving(f"{mqtt_url}?version={version}", *handlers), foreign(mqtt_url) as peer:
        for name in names:
            peer.publish(name, "1")
        peer.publish("end", "1")
        await until(lambda: 1 in taken)

    assert taken[:-1] == ["u/made", "u/#", "u/made/now", "u/#", "u"]


def _noting(taken: list[Any], pattern: str) -> Callable[..., Any]:
    @event_pattern(pattern)
    async def note(data: Any, ctx: RpcContext) -> None:
        taken.append(ctx.pattern)

    return note


@pytest.mark.asyncio
async def test_a_server_does_not_hear_its_own_answers(mqtt_url: str, losses: Callable[[str, str], int]) -> None:
    taken: list[Any] = []

    @message_pattern("w/#")
    async def ask(data: Any, ctx: RpcContext) -> Any:
        taken.append(ctx.channel)
        return data

    async with serving(mqtt_url, ask, taking(taken, "end")), calling(mqtt_url) as client:
        answer = await client.send("w/a", 1)
        await client.emit("end", "end")
        await until(lambda: "end" in taken)

    assert answer == 1
    assert taken == ["w/a", "end"]


@pytest.mark.asyncio
@pytest.mark.parametrize("version", ["3.1.1", "5"])
@pytest.mark.parametrize("named", [True, False])
async def test_servers_of_one_group_share_the_messages(mqtt_url: str, version: str, named: bool) -> None:
    taken: dict[str, list[int]] = {"first": [], "second": []}
    pattern = "$share/g/shared/+" if named else "shared/+"
    url = f"{mqtt_url}?version={version}" + ("" if named else "&share=g")

    async with (
        serving(url, taking(taken["first"], pattern)),
        serving(url, taking(taken["second"], pattern)),
        calling(f"{mqtt_url}?version={version}") as client,
    ):
        for number in range(20):
            await client.emit("shared/x", number)
        await until(lambda: len(taken["first"]) + len(taken["second"]) >= 20)

    assert sorted(taken["first"] + taken["second"]) == list(range(20))
    assert taken["first"]
    assert taken["second"]


@pytest.mark.asyncio
async def test_one_subscription_carries_all_answers_of_a_topic(mqtt_url: str) -> None:
    async with serving(mqtt_url, echo, count), calling(mqtt_url) as client:
        answers = await asyncio.gather(*(client.send("echo", number) for number in range(50)))
        values = [value async for value in client.stream("count", 3)]
        replies = client._bound().proxy._replies

        assert answers == list(range(50))
        assert values == [0, 1, 2]
        assert list(replies) == ["echo", "count"]


@pytest.mark.asyncio
async def test_reply_topics_are_bounded(mqtt_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "_MOST_REPLY_TOPICS", 3)
    go_on = asyncio.Event()

    @message_pattern("users/+")
    async def ask(data: Any) -> Any:
        if data == 0:
            await go_on.wait()
        return data

    async with serving(mqtt_url, ask), calling(mqtt_url) as client:
        waiting = asyncio.create_task(client.send("users/0", 0))
        answers = [await client.send(f"users/{number}", number) for number in range(1, 9)]
        kept = list(client._bound().proxy._replies)
        again = await client.send("users/1", 1)
        go_on.set()
        last = await waiting

    assert answers == list(range(1, 9))
    assert kept == ["users/0", "users/7", "users/8"]
    assert (again, last) == (1, 0)


@pytest.mark.asyncio
async def test_a_request_to_nobody_fails_at_once_where_the_broker_tells(
    mqtt_url: str, losses: Callable[[str, str], int]
) -> None:
    async with calling(f"{mqtt_url}?version=5&qos=1") as client:
        with pytest.raises(Unavailable, match="Nobody listens for shop on mqtt://"):
            await client.send("nobody/here", 1)
        await client.emit("nobody/here", 1)

    assert losses("mqtt", "nobody-listens") == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("version", ["3.1.1", "5"])
async def test_messages_of_qos_2_come_once(mqtt_url: str, version: str) -> None:
    taken: list[Any] = []
    url = f"{mqtt_url}?version={version}&qos=2"

    async with serving(url, echo, taking(taken)), calling(url) as client:
        for number in range(10):
            await client.emit("made", number)
        answers = [await client.send("echo", number) for number in range(5)]
        await until(lambda: len(taken) == 10)

    assert taken == list(range(10))
    assert answers == list(range(5))


@pytest.mark.asyncio
@pytest.mark.parametrize("qos", [0, 1])
async def test_no_packet_waits_for_the_next(mqtt_url: str, qos: int) -> None:
    url = f"{mqtt_url}?qos={qos}"
    async with serving(url, echo, count), calling(url) as client:
        native = client._bound().proxy
        await client.send("echo", 0)
        begin = asyncio.get_running_loop().time()
        for number in range(20):
            await client.send("echo", number)
        took = asyncio.get_running_loop().time() - begin
        nodelay = native.unwrap()._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert nodelay
    assert took < 0.4  # with 40 ms each it would be 0.8 s and more


# Bounds


@pytest.mark.asyncio
@pytest.mark.parametrize("query", ["qos=0", "qos=1", "qos=1&version=5"])
async def test_a_flood_of_events_waits_unread_and_none_is_lost(mqtt_url: str, query: str) -> None:
    running, most = 0, 0
    heard: list[int] = []
    others = asyncio.Event()

    @event_pattern("made")
    async def made(data: int) -> None:
        nonlocal running, most
        running += 1
        heard.append(data)
        most = max(most, running)
        await others.wait()
        running -= 1

    async with serving(f"{mqtt_url}?max_in_flight=3&{query}", made), foreign(mqtt_url) as peer:
        for number in range(100):
            peer.publish("made", str(number))
        await until(lambda: len(heard) == 3)
        await peer.settled()
        meanwhile = len(heard)
        others.set()
        await until(lambda: len(heard) == 100)

    assert (meanwhile, most) == (3, 3)
    assert heard == list(range(100))


@pytest.mark.asyncio
@pytest.mark.parametrize("query", ["qos=0", "qos=1", "qos=1&version=5"])
async def test_streams_of_a_full_server_go_on(mqtt_url: str, query: str) -> None:
    url = f"{mqtt_url}?max_in_flight=2&{query}"
    async with serving(url, count), calling(url) as client:

        async def all_of(number: int) -> int:
            return len([value async for value in client.stream("count", number)])

        lengths = await asyncio.gather(*(all_of(60) for _ in range(6)))

    assert lengths == [60] * 6


@pytest.mark.asyncio
async def test_a_message_that_is_too_large_hurts_nobody_else(mqtt_url: str, losses: Callable[[str, str], int]) -> None:
    taken: list[Any] = []
    url = f"{mqtt_url}?max_packet=2000&qos=1"

    async with serving(url, taking(taken)) as server, foreign(mqtt_url) as peer, calling(url) as client:
        for number in range(30):  # more than the broker lets wait for acknowledgement
            peer.publish("made", "x" * (300_000 if number % 2 else 3000), qos=1)
        peer.publish("made", "1", qos=1)
        await until(lambda: bool(taken))
        with pytest.raises(RpcException) as caught:
            await client.emit("made", "x" * 2000)
        status = server.status

    assert taken == [1]
    assert losses("mqtt", "too-large") == 30
    assert caught.value.code == "too-large"
    assert status is Status.CONNECTED


@pytest.mark.asyncio
async def test_an_answer_that_is_too_large_is_an_error_for_its_caller(mqtt_url: str) -> None:
    @message_pattern("large")
    async def large() -> str:
        return "x" * 5000

    async with serving(f"{mqtt_url}?max_packet=2000", large), calling(mqtt_url) as client:
        with pytest.raises(RpcException) as caught:
            await client.send("large")

    assert caught.value.code == "too-large"


@pytest.mark.asyncio
async def test_a_stream_that_is_taken_too_slowly_fails_and_hurts_no_other_call(mqtt_url: str) -> None:
    async with serving(mqtt_url, count, echo), calling(mqtt_url) as client:
        values = client.stream("count", 3000)
        first = await anext(values)
        await until(lambda: not client._bound().proxy._pending)
        other = await client.send("echo", 1)
        with pytest.raises(RpcException) as caught:
            async for _ in values:
                pass

    assert (first, other) == (0, 1)
    assert caught.value.code == "stream-overflow"


@pytest.mark.asyncio
async def test_a_stream_that_nobody_hears_ends_where_the_broker_tells(mqtt_url: str) -> None:
    closed = asyncio.Event()

    @message_pattern("flood")
    async def flood() -> AsyncIterator[int]:
        try:
            number = 0
            while True:
                yield (number := number + 1)
        finally:
            closed.set()

    url = f"{mqtt_url}?version=5&qos=1"
    async with serving(url, flood):
        async with calling(url) as client:
            first = await anext(client.stream("flood"))
        await closed.wait()

    assert first == 1


@pytest.mark.asyncio
async def test_closing_takes_what_has_arrived_and_nothing_more(mqtt_url: str) -> None:
    heard: list[int] = []
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made(data: int) -> None:
        heard.append(data)
        await go_on.wait()

    async with serving(f"{mqtt_url}?max_in_flight=3", made) as server, foreign(mqtt_url) as peer:
        for number in range(10):
            peer.publish("made", str(number))
        await until(lambda: len(heard) == 3)
        await peer.settled()
        closing = asyncio.create_task(server.close(PATIENCE))
        go_on.set()
        await closing
        peer.publish("made", "10")
        await peer.settled()

    assert heard == list(range(10))


# Brokers of all manners


def _packet(kind: int, body: bytes) -> bytes:
    return bytes([kind, len(body)]) + body


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["send", "emit"])
@pytest.mark.parametrize("greeting", [b"", b"\x20\2\0\0"])
async def test_a_broker_that_falls_silent_costs_no_more_than_the_deadline(verb: str, greeting: bytes) -> None:
    async def silent(wire: Wire) -> None:
        await wire.say(greeting)
        await wire.reader.read(-1)

    async with listener(silent) as port, calling(f"mqtt://127.0.0.1:{port}?qos=1") as client:
        with pytest.raises(DeadlineExceeded):
            await getattr(client, verb)("echo", 1, timeout=0.1)


@pytest.mark.asyncio
async def test_a_broker_that_takes_no_answers_brings_no_more_requests() -> None:
    requests, running = 300, 0
    go_on = asyncio.Event()
    answers = bytearray()

    @message_pattern("large")
    async def large() -> str:
        nonlocal running
        running += 1
        return "x" * 100_000

    async def talk(wire: Wire) -> None:
        await wire.reader.read(1000)
        await wire.say(b"\x20\2\0\0")
        await wire.reader.read(1000)
        wire.stop_reading()
        await wire.say(b"\x90\3\0\1\0")
        for id in range(requests):
            await wire.say(_packet(0x30, b"\0\5large" + b'{"pattern":"large","id":"%d"}' % id))
        await go_on.wait()
        wire.go_on_reading()
        while data := await wire.reader.read(1_000_000):
            answers.extend(data)

    async with listener(talk) as port, serving(f"mqtt://127.0.0.1:{port}?max_in_flight=5", large) as server:
        await until(lambda: server.unwrap()[0]._held and not server.full)
        meanwhile = running
        go_on.set()
        await until(lambda: answers.count(b'"isDisposed":true') == requests)

    assert 0 < meanwhile < requests


@pytest.mark.asyncio
async def test_a_broker_that_says_nothing_any_more_counts_as_lost() -> None:
    async def silent(wire: Wire) -> None:
        await wire.say(b"\x20\2\0\0")
        await wire.reader.read(-1)

    async with listener(silent) as port, calling(f"mqtt://127.0.0.1:{port}?qos=1&keepalive=1") as client:
        with pytest.raises(ConnectionLost, match="says nothing"):
            await client.emit("made", 1)


@pytest.mark.asyncio
async def test_a_connection_that_says_nothing_is_kept_alive(mqtt_url: str) -> None:
    async with serving(f"{mqtt_url}?keepalive=1", echo) as server, calling(f"{mqtt_url}?keepalive=1") as client:
        await client.send("echo", 1)
        connection = client._bound().proxy.unwrap()
        await asyncio.sleep(1.8)  # one and a half times what the broker was promised, and more

        assert not connection.ended.done()
        assert server.status is Status.CONNECTED


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "nonsense",
    [b"\x30\xff\xff\xff\xff\xff", b"\x30\2\0\x09", b"\x30\3\0\1\xff", b"\x36\3\0\1a", b"\x90\xff\xff\xff\x7f"],
)
async def test_bytes_that_are_no_mqtt_end_the_connection(nonsense: bytes) -> None:
    async def talk(wire: Wire) -> None:
        await wire.say(b"\x20\2\0\0", nonsense)
        await wire.reader.read(-1)

    async with listener(talk) as port, calling(f"mqtt://127.0.0.1:{port}?qos=1") as client:
        with pytest.raises(Unavailable):
            await client.emit("made", 1)


@pytest.mark.asyncio
@pytest.mark.parametrize("version", ["3.1.1", "5"])
async def test_a_refusal_is_told_with_its_reason(version: str) -> None:
    async def talk(wire: Wire) -> None:
        await wire.say(b"\x20\2\0\5" if version == "3.1.1" else b"\x20\3\0\x87\0")
        await wire.reader.read(-1)

    async with listener(talk) as port, calling(f"mqtt://127.0.0.1:{port}?version={version}") as client:
        with pytest.raises(Unavailable, match=r"(?i)not authori[sz]ed"):
            await client.emit("made", 1)


@pytest.mark.asyncio
async def test_packets_may_come_in_any_pieces() -> None:
    message = b"\x30" + b"\xb4\1" + b"\0\4made" + b'{"data":"' + b"x" * 163 + b'"}'
    packets = message + b"\xd0\0" + message * 2
    heard: list[Any] = []

    for size in (1, 2, 3, 7, 200, len(packets)):
        connection = MqttConnection(Options(), lambda _, message: heard.append(message.payload))
        transport = _Transport()
        connection.connection_made(transport)
        for at in range(0, len(packets), size):
            connection.data_received(packets[at : at + size])

    assert len(heard) == 18
    assert {len(payload) for payload in heard} == {174}


@pytest.mark.asyncio
@pytest.mark.parametrize("qos", [0, 1])
async def test_what_is_too_large_is_passed_over_in_whatever_pieces_it_comes(qos: int) -> None:
    small = b"\x30\x08\0\4made{}"
    large = bytes([0x30 | qos << 1]) + b"\xe0\xa7\x12" + b"\0\4made" + b"\0\7" + b"x" * (300_000 - 8)
    packets = small + large + small + large * 2 + small
    options = Options(max_packet=1024)

    for size in (1000, 5000, 65_000, 299_999, 300_000, 650_000, len(packets)):
        heard: list[bytes] = []
        lost: list[str] = []
        connection = MqttConnection(options, _noting_payloads(heard), lost.append)
        connection.connection_made(_Transport())
        for at in range(0, len(packets), size):
            connection.data_received(packets[at : at + size])

        assert heard == [b"{}"] * 3
        assert lost == ["too-large"] * 3
        assert b"".join(connection._out) == b"\x40\2\0\7" * 3 * qos


def _noting_payloads(heard: list[bytes]) -> Callable[[MqttConnection, Message], None]:
    return lambda _, message: heard.append(message.payload)


class _Transport(asyncio.Transport):
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self

    def setsockopt(self, *_: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return False


@pytest.mark.asyncio
async def test_the_first_of_several_brokers_that_answers_is_taken(mqtt_url: str) -> None:
    url = mqtt_url.replace("mqtt://", "mqtt://127.0.0.1:1,")
    async with serving(url, echo), calling(url) as client:
        answer = await client.send("echo", 1)

    assert answer == 1


@pytest.mark.asyncio
async def test_mqtts_is_tls(mqtt_url: str, tmp_path: Path) -> None:
    authority, plain = Authority(tmp_path), parse(mqtt_url)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("mqtt"))

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
        target.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection(plain.host, plain.port)
        await asyncio.gather(pass_on(reader, onward[1]), pass_on(onward[0], writer))

    front = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    url = f"mqtts://127.0.0.1:{front.sockets[0].getsockname()[1]}?cafile={authority.cafile}"
    try:
        async with serving(url, echo), calling(url) as client:
            answer = await client.send("echo", "x" * 300_000)
        async with calling(url.partition("?")[0]) as stranger:
            with pytest.raises(Unavailable, match="cannot be reached"):
                await stranger.send("echo", 1)
    finally:
        front.close()

    assert answer == "x" * 300_000


@pytest.mark.asyncio
async def test_user_and_password_are_told_to_the_broker_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    greetings: list[bytes] = []

    async def talk(wire: Wire) -> None:
        greetings.append(await wire.reader.read(1000))
        await wire.say(b"\x20\2\0\4")

    async with listener(talk) as port:
        url = f"mqtt://shöp:s3c%3Aret@127.0.0.1:{port}?client_id=né&keepalive=7"
        async with calling(url) as client:
            with pytest.raises(Unavailable, match="bad user name or password") as caught:
                await client.emit("made", 1)
            shown = f"{client._bound().proxy!r}{caught.value}{caught.value!r}{caplog.text}"

    head, rest = greetings[0][:14], greetings[0][14:]
    assert head[2:] == b"\0\4MQTT\4\xc2\0\7\0\x10"
    assert rest[:4] == "né-".encode()
    assert rest[16:] == "\0\5shöp".encode() + b"\0\7s3c:ret"
    assert "s3c:ret" not in shown


@pytest.mark.asyncio
async def test_a_codec_of_ones_own_is_spoken_by_both_sides(mqtt_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    heard: asyncio.Queue[Any] = asyncio.Queue()
    url = f"{mqtt_url}?codec=zipped.Zipped"

    async with serving(url, echo, hearing("made", heard)), calling(url) as client, foreign(mqtt_url) as peer:
        await peer.subscribe("echo")
        await peer.subscribe("echo/reply")
        answer = await client.send("echo", {"text": "é" * 1000})
        await client.emit("made", 1)
        event = await heard.get()
        peer.publish("made", '"not compressed"')
        foreign_event = await heard.get()
        bodies = [(await peer.heard.get())[1] for _ in range(2)]

    assert answer == {"text": "é" * 1000}
    assert (event[1], foreign_event[1]) == (1, "not compressed")
    assert all(body.startswith(b"x\x9c") and len(body) < 200 for body in bodies)


# Events as a bus


@pytest.mark.asyncio
@pytest.mark.parametrize("query", ["version=3.1.1", "version=5", "version=5&qos=0"])
async def test_an_event_is_heard_once_in_a_service_or_once_in_each_of_its_processes(mqtt_url: str, query: str) -> None:
    url = f"{mqtt_url}?{query}"
    ones: list[Any] = []
    payments: list[Any] = []
    first: list[Any] = []
    second: list[Any] = []

    async with (
        listening(url, taking(payments), name="payments"),
        listening(url, taking(ones), taking(first, delivery="each")),
        listening(url, taking(ones), taking(second, delivery="each")),
        calling(url, MqttBus) as bus,
    ):
        for number in range(20):
            await bus.emit("made", number)
        await until(lambda: all(len(each) >= 20 for each in (ones, payments, first, second)))

    assert sorted(ones) == payments == first == second == list(range(20))


@pytest.mark.asyncio
async def test_a_bus_answers_no_requests(mqtt_url: str) -> None:
    async with calling(mqtt_url, MqttBus) as bus:
        with pytest.raises(RpcException, match="answers no requests"):
            await bus.send("made", 1)


@pytest.mark.asyncio
async def test_a_service_that_hears_nothing_does_not_connect(mqtt_url: str) -> None:
    async with listening(mqtt_url, echo) as listener:
        assert listener.status is Status.DISCONNECTED
        assert listener.unwrap() == []


@pytest.mark.asyncio
async def test_a_broker_without_shared_subscriptions_is_told(
    nats_mqtt_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(f"{nats_mqtt_url}?connect_timeout=0.2", taking([])) as listener:
        await until(lambda: listener.status is Status.CONNECTED)

    assert "know no shared subscriptions" in caplog.text
    assert "share=false" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("version", ["3.1.1", "5"])
async def test_events_wait_for_a_process_that_is_away(mqtt_url: str, version: str) -> None:
    id = os.urandom(4).hex()
    url = f"{mqtt_url}?version={version}&client_id={id}"
    ones: list[Any] = []
    each: list[Any] = []
    handlers = (taking(ones, f"made/{id}"), taking(each, f"made/{id}", delivery="each"))

    async with calling(url, MqttBus) as bus:
        async with listening(url, *handlers):
            await bus.emit(f"made/{id}", 1)
            await until(lambda: ones == each == [1])
        await bus.emit(f"made/{id}", 2)
        async with listening(url, *handlers):
            await until(lambda: len(ones) == len(each) == 2)
    await _forget(url)

    assert ones == each == [1, 2]


@pytest.mark.asyncio
async def test_what_a_process_has_left_comes_again(mqtt_url: str) -> None:
    id = os.urandom(4).hex()
    url = f"{mqtt_url}?client_id={id}"
    started: list[Any] = []
    taken: list[Any] = []

    @event_pattern(f"made/{id}")
    async def stuck(data: Any) -> None:
        started.append(data)
        await asyncio.Event().wait()

    async with calling(url, MqttBus) as bus:
        async with listening(url, stuck):
            for number in range(5):
                await bus.emit(f"made/{id}", number)
            await until(lambda: len(started) == 5)
        async with listening(url, taking(taken, f"made/{id}")):
            await until(lambda: len(taken) == 5)
    await _forget(url)

    assert taken == list(range(5))


async def _forget(url: str) -> None:
    address = parse(url)
    for delivery in ("one", "each"):
        name = f"{address.options['client_id']}-shop-{delivery}"
        await (await open_connection(address, Options(), name, ignore)).close()


@pytest.mark.asyncio
async def test_an_event_is_tried_again_then_given_up_and_holds_up_no_other(
    mqtt_url: str, losses: Callable[[str, str], int]
) -> None:
    tries: list[int] = []

    @event_pattern("made")
    async def made(data: int) -> None:
        tries.append(data)
        if data < 30 or tries.count(data) < 2:
            raise ValueError("unlucky")

    url = f"{mqtt_url}?retry_after=0.001"
    async with listening(url, made), calling(url, MqttBus) as bus:
        for number in range(31):  # more than the broker lets wait for acknowledgement
            await bus.emit("made", number)
        await until(lambda: tries.count(30) == 2)
        await until(lambda: losses("mqtt", "failed-event") == 30)

    assert [tries.count(number) for number in range(31)] == [3] * 30 + [2]


# Restarts


@pytest.mark.asyncio
async def test_an_event_is_not_taken_for_sent_while_the_broker_is_away(own_mosquitto: Mosquitto) -> None:
    async with calling(own_mosquitto.url, MqttBus) as bus:
        await bus.emit("made", 1)
        own_mosquitto.stop()
        with pytest.raises(Unavailable):
            await bus.emit("made", 2)
        with pytest.raises(Unavailable, match="cannot be reached at mqtt://"):
            await bus.emit("made", 3)
        own_mosquitto.start()
        await bus.emit("made", 4)


@pytest.mark.asyncio
async def test_a_stream_ends_when_the_broker_goes(own_mosquitto: Mosquitto) -> None:
    closed = asyncio.Event()

    @message_pattern("tick")
    async def tick() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    async with serving(own_mosquitto.url, tick), calling(own_mosquitto.url) as client:
        stream = client.stream("tick")
        await anext(stream)
        own_mosquitto.stop()
        with pytest.raises(ConnectionLost):
            async for _ in stream:
                pass
        await closed.wait()


@pytest.mark.asyncio
async def test_a_server_can_be_closed_while_the_broker_is_away(own_mosquitto: Mosquitto) -> None:
    async with serving(own_mosquitto.url, echo) as server:
        own_mosquitto.stop()
        await until(lambda: server.status is not Status.CONNECTED)
        await server.close(1)

        assert server.status is Status.CLOSED
