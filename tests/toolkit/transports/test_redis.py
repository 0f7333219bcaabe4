"""NestJS's Redis transport: the contract over a real server, and peers and servers of all manners."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from microservices.client import Client
from microservices.context import RpcContext
from microservices.exceptions import ConfigurationError, ConnectionLost, DeadlineExceeded, RpcException, Unavailable
from microservices.handlers import event_pattern, message_pattern
from microservices.transports import parse
from microservices.transports.base import Status
from microservices.transports.redis import RedisClient, RedisServer
from tests.brokers import Valkey, free_port
from tests.toolkit.conftest import service
from tests.toolkit.transports.certificates import Authority
from tests.toolkit.transports.contract import PATIENCE, BrokerContract, TransportContract, count, echo, hearing
from tests.toolkit.transports.front import front
from tests.toolkit.transports.wire import Wire, listener, until


class TestRedis(TransportContract):
    nobody = Unavailable  # PUBLISH says that it reached nobody
    notices_who_leaves = False  # one reply channel for all callers of a pattern
    holds_back = False

    @pytest.fixture(autouse=True)
    def use(self, redis: str) -> None:
        self.url = redis


class TestRedisWildcards(TestRedis):
    wildcard = ("users.*", "users.created")
    server_options = MappingProxyType({"wildcards": True})


class TestRedisRestarted(BrokerContract):
    @pytest.fixture(autouse=True)
    def use(self, own_redis: Valkey) -> None:
        self.broker = own_redis
        self.url = f"{own_redis.url}?connect_timeout=0.5"


@asynccontextmanager
async def serving(url: str, *functions: Callable[..., Any], options: str = "") -> AsyncIterator[RedisServer]:
    """Serve these handlers."""
    server = RedisServer(parse(url + options), service(*functions))
    await server.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            yield server
    finally:
        await server.close(0)


@asynccontextmanager
async def calling(url: str, options: str = "") -> AsyncIterator[Client]:
    """Give a client."""
    proxy = RedisClient(parse(url + options), "shop")
    client = Client("shop", lambda: proxy)
    try:
        async with asyncio.timeout(PATIENCE):
            yield client
    finally:
        await client.close()


async def heard_by(redis: Redis, channel: str, number: int) -> None:
    """Wait until so many connections have subscribed to a channel."""
    while dict(await redis.pubsub_numsub(channel)).get(channel.encode()) != number:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0)


# Subscriptions


@pytest.mark.asyncio
async def test_one_subscription_carries_all_answers_of_a_pattern(redis: str, foreign: Redis) -> None:
    async def subscriptions() -> int:
        return int((await foreign.info("commandstats")).get("cmdstat_subscribe", {"calls": 0})["calls"])

    async with serving(redis, echo, count), calling(redis) as client:
        before = await subscriptions()
        answers = await asyncio.gather(*(client.send("echo", number) for number in range(50)))
        again = [await client.send("echo", number) for number in range(50)]
        values = [value async for value in client.stream("count", 3)]
        after = await subscriptions()

    assert answers == again == list(range(50))
    assert values == [0, 1, 2]
    assert after - before == 2


@pytest.mark.asyncio
async def test_a_request_to_nobody_fails_at_once_and_the_next_one_finds_who_has_come(redis: str) -> None:
    async with calling(redis) as client:
        with pytest.raises(Unavailable, match="Nobody listens for shop on redis://"):
            await client.send("echo", 1, timeout=PATIENCE)
        async with serving(redis, echo):
            answer = await client.send("echo", 2)

    assert answer == 2


@pytest.mark.asyncio
async def test_the_answers_of_the_names_used_last_are_subscribed_to_and_of_no_more(
    redis: str, foreign: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisClient, "max_pending", 3)

    @message_pattern("room.*")
    async def room(data: int) -> int:
        return data

    async def subscribed() -> set[bytes]:
        return {channel for channel in await foreign.pubsub_channels("room.*") if channel.endswith(b".reply")}

    async with serving(redis, room, options="?wildcards=true"), calling(redis) as client:
        answers = [await client.send(f"room.{number}", number) for number in (*range(10), 7, 10)]
        kept = await subscribed()
        again = await client.send("room.0", 11)

    assert answers == [*range(10), 7, 10]
    assert kept == {b"room.7.reply", b"room.9.reply", b"room.10.reply"}
    assert again == 11


@pytest.mark.asyncio
async def test_an_event_to_nobody_is_counted(redis: str, losses: Callable[[str, str], int]) -> None:
    async with calling(redis) as client:
        await client.emit("unheard", 1)

    assert losses("redis", "nobody-listens") == 1


@pytest.mark.asyncio
async def test_several_instances_answer_and_the_first_wins(redis: str) -> None:
    asked: asyncio.Queue[str] = asyncio.Queue()
    go_on = asyncio.Event()

    @message_pattern("who")
    async def quick() -> str:
        asked.put_nowait("quick")
        return "quick"

    @message_pattern("who")
    async def slow() -> str:
        asked.put_nowait("slow")
        await go_on.wait()
        return "slow"

    async with serving(redis, quick), serving(redis, slow, echo), calling(redis) as client:
        first = await client.send("who")
        both = {await asked.get(), await asked.get()}
        go_on.set()
        after = await client.send("echo", "the late answer hurts nobody")

    assert first == "quick"
    assert both == {"quick", "slow"}
    assert after == "the late answer hurts nobody"


@pytest.mark.asyncio
async def test_a_service_without_handlers_listens_all_the_same(redis: str) -> None:
    async with serving(redis) as server:
        assert server.status is Status.CONNECTED


# Peers of all manners


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("message", "data"),
    [
        ('{"pattern":"made","data":{"id":1}}', {"id": 1}),
        ('{"pattern":{"other":1},"data":2}', 2),  # the channel decides
        ('{"data":[1,2],"trace":"x"}', [1, 2]),
        ('{"id":7,"total":1.5}', {"id": 7, "total": 1.5}),
        ("[1,2]", [1, 2]),
        ("5", 5),
        ('"quoted"', "quoted"),
        ("null", None),
        ("plain é 😀 text", "plain é 😀 text"),
        ('{"cut":', '{"cut":'),
        ("", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
async def test_whatever_others_publish_becomes_an_event(
    redis: str, foreign: Redis, message: str | bytes, data: Any
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with serving(redis, hearing("made", heard)):
        await foreign.publish("made", message)
        call = await heard.get()

    assert call == ("made", data, {})


@pytest.mark.asyncio
async def test_an_answer_goes_to_the_reply_channel_as_nestjs_writes_it(redis: str, foreign: Redis) -> None:
    async with serving(redis, echo), foreign.pubsub() as replies:
        await replies.subscribe("echo.reply")
        await replies.get_message(timeout=PATIENCE)
        await foreign.publish("echo", '{"pattern":"echo","data":"é","id":7}')
        answer = await replies.get_message(timeout=PATIENCE)

    assert answer is not None
    assert answer["data"].decode() == '{"response":"é","isDisposed":true,"id":7}'


@pytest.mark.asyncio
async def test_a_request_is_published_as_nestjs_writes_it(redis: str, foreign: Redis) -> None:
    async with foreign.pubsub() as requests, calling(redis) as client:
        await requests.subscribe('{"a":"x","b":1}')
        await requests.get_message(timeout=PATIENCE)
        call = asyncio.create_task(client.send({"b": 1, "a": "x"}, "é"))
        message = await requests.get_message(timeout=PATIENCE)
        assert message is not None
        request = json.loads(message["data"])
        await foreign.publish('{"a":"x","b":1}.reply', json.dumps({"id": request["id"], "response": 1}))
        await foreign.publish('{"a":"x","b":1}.reply', json.dumps({"id": request["id"], "isDisposed": True}))
        answer = await call

    assert list(request) == ["pattern", "data", "metadata", "id"]
    assert (request["pattern"], request["data"]) == ({"b": 1, "a": "x"}, "é")
    assert len(request["id"]) > 32
    assert answer == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("odd", ["no JSON", "5", "[]", "null", '{"id":"another","response":1,"isDisposed":true}'])
async def test_answers_to_others_and_nonsense_are_passed_over(redis: str, foreign: Redis, odd: str) -> None:
    go_on = asyncio.Event()

    @message_pattern("slow")
    async def slow() -> str:
        await go_on.wait()
        return "done"

    async with serving(redis, slow), calling(redis) as client:
        call = asyncio.create_task(client.send("slow"))
        await heard_by(foreign, "slow.reply", 1)
        await foreign.publish("slow.reply", odd)
        go_on.set()
        answer = await call

    assert answer == "done"


@pytest.mark.asyncio
async def test_a_stream_that_nobody_listens_to_any_more_ends(redis: str) -> None:
    closed = asyncio.Event()

    @message_pattern("flood")
    async def flood() -> AsyncIterator[int]:
        try:
            number = 0
            while True:
                yield (number := number + 1)
        finally:
            closed.set()

    async with serving(redis, flood):
        async with calling(redis) as client:
            first = await anext(client.stream("flood"))
        await closed.wait()

    assert first == 1


@pytest.mark.asyncio
async def test_a_stream_that_is_taken_too_slowly_fails_and_hurts_no_other_call(redis: str) -> None:
    all_sent = asyncio.Event()

    @message_pattern("flood")
    async def flood() -> AsyncIterator[int]:
        for number in range(3000):
            yield number
        all_sent.set()

    async with serving(redis, flood, echo), calling(redis) as client:
        values = client.stream("flood")
        first = await anext(values)
        await all_sent.wait()
        others = [await client.send("echo", number) for number in range(3)]
        with pytest.raises(RpcException) as caught:
            async for _ in values:
                pass

    assert (first, others) == (0, [0, 1, 2])
    assert caught.value.code == "stream-overflow"


# Bounds


@pytest.mark.asyncio
async def test_a_flood_of_events_waits_unread_and_none_is_lost(redis: str, foreign: Redis) -> None:
    running, most, heard = 0, 0, 0
    slow_one, others = asyncio.Event(), asyncio.Event()

    @event_pattern("made")
    async def made(data: int) -> None:
        nonlocal running, most, heard
        running, heard = running + 1, heard + 1
        most = max(most, running)
        await (slow_one if data == 2 else others).wait()
        running -= 1

    async with serving(redis, made, options="?max_in_flight=3"):
        for number in range(100):
            await foreign.publish("made", number)
        await until(lambda: heard == 3)
        for _ in range(20):  # time enough to start a fourth, if it were allowed to
            await foreign.ping()
        meanwhile = heard
        others.set()  # while the last one of the three goes on
        await until(lambda: heard == 100)
        slow_one.set()

    assert (meanwhile, most) == (3, 3)


@pytest.mark.asyncio
async def test_a_redis_that_takes_no_answers_brings_no_more_requests(redis: str, foreign: Redis) -> None:
    @message_pattern("page", inline=True)
    def page(data: int) -> str:
        return "x" * 50_000

    async with front(redis) as passing:
        url = f"redis://127.0.0.1:{passing.port}{urlsplit(redis).path}"
        async with serving(url, page) as server, calling(redis) as client:
            passing.taking.clear()
            calls = [asyncio.create_task(client.send("page", number, timeout=30)) for number in range(1000)]
            connection = server.unwrap()
            await until(lambda: connection.congestion() is not None)
            for _ in range(20):  # time enough to answer them all, if they came
                await foreign.ping()
            unsent = connection.transport.get_write_buffer_size()
            passing.taking.set()
            answers = await asyncio.gather(*calls)

    assert unsent < 8 * 1024 * 1024
    assert {len(answer) for answer in answers} == {50_000}


@pytest.mark.asyncio
async def test_closing_takes_what_has_arrived_and_nothing_more(redis: str, foreign: Redis) -> None:
    heard: list[int] = []
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made(data: int) -> None:
        heard.append(data)
        await go_on.wait()

    async with serving(redis, made, options="?max_in_flight=3") as server:
        for number in range(10):
            await foreign.publish("made", number)
        await until(lambda: len(heard) == 3)
        closing = asyncio.create_task(server.close(PATIENCE))
        await heard_by(foreign, "made", 0)
        await foreign.publish("made", 10)
        go_on.set()
        await closing

    assert heard == list(range(10))


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["send", "emit"])
async def test_a_redis_that_says_nothing_costs_no_more_than_the_deadline(verb: str) -> None:
    async def silent(wire: Wire) -> None:
        await wire.reader.read()

    async with listener(silent) as port, calling(f"redis://127.0.0.1:{port}") as client:
        with pytest.raises(DeadlineExceeded):
            await getattr(client, verb)("echo", 1, timeout=0.05)


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["send", "emit"])
async def test_a_redis_that_falls_silent_costs_no_more_than_the_deadline(verb: str) -> None:
    async def greet(wire: Wire) -> None:
        await wire.reader.readuntil(b"HELLO")
        await wire.say(b"%0\r\n")
        await wire.reader.read()

    async with listener(greet) as port, calling(f"redis://127.0.0.1:{port}") as client:
        with pytest.raises(DeadlineExceeded):
            await getattr(client, verb)("echo", 1, timeout=0.05)


@pytest.mark.asyncio
async def test_bytes_that_are_no_resp_end_the_connection() -> None:
    async def talk(wire: Wire) -> None:
        await wire.reader.readuntil(b"HELLO")
        await wire.say(b"%0\r\n")
        await wire.reader.readuntil(b"PUBLISH")
        await wire.say(b"nonsense\r\n")
        await wire.reader.read()

    async with listener(talk) as port, calling(f"redis://127.0.0.1:{port}") as client:
        with pytest.raises(ConnectionLost):
            await client.send("echo", 1)


# Restarts


@pytest.mark.asyncio
async def test_client_and_server_survive_a_restart_of_redis(own_redis: Valkey) -> None:
    started: asyncio.Queue[str] = asyncio.Queue()
    heard: asyncio.Queue[Any] = asyncio.Queue()

    @message_pattern("never")
    async def never() -> None:
        started.put_nowait("never")
        await asyncio.Event().wait()

    url = own_redis.url
    async with serving(url, never, echo, hearing("made", heard)) as server, calling(url) as client:
        pending = [asyncio.create_task(client.send("never", timeout=PATIENCE)) for _ in range(3)]
        pending.append(asyncio.create_task(anext(client.stream("never", timeout=PATIENCE))))
        for _ in pending:
            await started.get()
        own_redis.stop()
        outcomes = await asyncio.gather(*pending, return_exceptions=True)
        with pytest.raises(Unavailable, match="cannot be reached at redis://"):
            await client.send("echo", "nobody there")
        with pytest.raises(Unavailable):
            await client.emit("made", "nobody there")
        own_redis.start()
        await until(lambda: server.status is Status.CONNECTED)
        answer = await client.send("echo", "again")
        await client.emit("made", "again")
        call = await heard.get()

    assert [type(outcome) for outcome in outcomes] == [ConnectionLost] * 4
    assert answer == "again"
    assert call == ("made", "again", {})


@pytest.mark.asyncio
async def test_a_server_that_starts_before_redis_listens_as_soon_as_it_is_there(
    own_redis: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.stop()

    async with serving(own_redis.url, echo, options="?connect_timeout=0.5") as server:
        before = server.status
        own_redis.start()
        await until(lambda: server.status is Status.CONNECTED)
        async with calling(own_redis.url) as client:
            answer = await client.send("echo", 1)

    assert before is not Status.CONNECTED
    assert answer == 1
    assert [record.message for record in caplog.records if "does not hear" in record.message] == [
        f"shop does not hear {own_redis.url}: Redis cannot be reached at {own_redis.url}: Connect call failed "
        f"('127.0.0.1', {own_redis.port})."
    ]


@pytest.mark.asyncio
async def test_a_server_can_be_closed_while_redis_is_away(own_redis: Valkey) -> None:
    async with serving(own_redis.url, echo) as server:
        own_redis.stop()
        await until(lambda: server.status is not Status.CONNECTED)
        await server.close(1)

        assert server.status is Status.CLOSED


# Credentials


@pytest.mark.asyncio
async def test_user_and_password_open_the_door(own_redis: Valkey) -> None:
    host = f"127.0.0.1:{own_redis.port}"
    async with Redis.from_url(own_redis.url) as admin:
        await admin.acl_setuser("shop", enabled=True, passwords=["+se:cr@t"], channels=["*"], commands=["+@all"])
        await admin.config_set("requirepass", "everybody")

        async with serving(f"redis://shop:se%3Acr%40t@{host}", echo), calling(f"redis://:everybody@{host}") as client:
            answer = await client.send("echo", 1)

    assert answer == 1


@pytest.mark.asyncio
async def test_a_password_is_in_no_log_error_or_repr(own_redis: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    url = f"redis://shop:s3cret@127.0.0.1:{own_redis.port}"

    async with serving(url, echo, options="?connect_timeout=0.1") as server, calling(url) as client:
        with pytest.raises(Unavailable, match="WRONGPASS") as caught:
            await client.send("echo", 1)
        shown = [repr(server), repr(client._bound().proxy), str(caught.value), repr(caught.value)]
        shown += [str(server.address), repr(server.address)]

    assert "WRONGPASS" in caplog.text
    assert "s3cret" not in caplog.text + "".join(shown)


@pytest.mark.parametrize("url", ["redis://u:s3cret@host:port", "radis://u:s3cret@host", "tcp://u:s3cret@a:1,b:2"])
def test_a_password_is_in_no_complaint_about_a_url(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(url)

    assert "s3cret" not in str(caught.value)
    assert "***@" in str(caught.value)


@pytest.mark.asyncio
async def test_a_channel_that_is_not_allowed_is_told_and_mixes_up_no_answers(own_redis: Valkey) -> None:
    url = f"redis://shop:pass@127.0.0.1:{own_redis.port}"
    async with Redis.from_url(own_redis.url) as admin:
        await admin.acl_setuser(
            "shop", enabled=True, passwords=["+pass"], channels=["echo", "echo.reply", "deaf"], commands=["+@all"]
        )

        async with serving(own_redis.url, echo), calling(url) as client:
            outcomes = await asyncio.gather(
                client.send("echo", 1),
                client.send("deaf", 2),  # may be asked, but not be heard
                client.send("secret", 3),
                client.send("echo", 4),
                return_exceptions=True,
            )

    assert [outcomes[0], outcomes[3]] == [1, 4]
    assert ["NOPERM" in str(outcome) for outcome in outcomes] == [False, True, True, False]


# Wildcards


@pytest.mark.asyncio
async def test_an_answer_to_a_wildcard_goes_to_the_concrete_channel_and_comes_to_no_handler(
    redis: str, foreign: Redis
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    @message_pattern("users.*")
    async def ask(data: Any, ctx: RpcContext) -> str:
        heard.put_nowait((ctx.channel, data))
        return "answered"

    async with serving(redis, ask, options="?wildcards=true"), foreign.pubsub() as replies:
        await replies.subscribe("users.get.reply")
        await replies.get_message(timeout=PATIENCE)
        await foreign.publish("users.get", '{"pattern":"users.get","data":1,"id":"7"}')
        answer = await replies.get_message(timeout=PATIENCE)
        await foreign.publish("users.next", '{"data":2}')
        calls = [await heard.get(), await heard.get()]

    assert answer is not None
    assert answer["data"].decode() == '{"response":"answered","isDisposed":true,"id":"7"}'
    assert calls == [("users.get", 1), ("users.next", 2)]


# Several hosts, and what reconnecting leaves


@pytest.mark.asyncio
async def test_a_host_that_says_nothing_leaves_time_for_the_next_one(own_redis: Valkey) -> None:
    async def silent(wire: Wire) -> None:
        await asyncio.Event().wait()

    async with listener(silent) as port:
        url = f"redis://127.0.0.1:{port},127.0.0.1:{own_redis.port}?connect_timeout=1"
        async with serving(own_redis.url, echo), calling(url) as client:
            answer = await client.send("echo", 1, timeout=PATIENCE)

    assert answer == 1


@pytest.mark.asyncio
async def test_a_connection_that_was_held_for_work_of_the_last_one_is_read_again(own_redis: Valkey) -> None:
    go_on = [asyncio.Event(), asyncio.Event()]
    started: asyncio.Queue[int] = asyncio.Queue()

    @event_pattern("work")
    async def work(data: int) -> None:
        started.put_nowait(data)
        await go_on[data].wait()

    async with (
        serving(own_redis.url, work, echo, options="?max_in_flight=1") as server,
        calling(own_redis.url) as client,
    ):
        await client.emit("work", 0)
        await started.get()
        server.unwrap().transport.abort()
        await until(lambda: server.status is not Status.CONNECTED)
        await until(lambda: server.status is Status.CONNECTED)
        await client.emit("work", 1)
        await started.get()
        go_on[1].set()
        await until(lambda: len(server.tasks) == 1)
        go_on[0].set()
        answer = await client.send("echo", "heard")

    assert answer == "heard"


# Sentinels, clusters, TLS


class Sentinel(Valkey):
    """Tells where the masters are."""

    def _command(self) -> list[str]:
        file = self._folder / "sentinel.conf"
        file.write_text(f"port {self.port}\nbind 127.0.0.1\n")
        return [self._binary, str(file), "--sentinel"]


class ClusterNode(Valkey):
    """One node of a cluster."""

    def _command(self) -> list[str]:
        return [*super()._command(), "--cluster-enabled", "yes", "--cluster-port", str(free_port())]


@pytest.mark.asyncio
async def test_the_sentinels_tell_where_the_master_is(own_redis: Valkey, tmp_path: Path) -> None:
    with Sentinel(tmp_path / "sentinel") as sentinel:
        gone = f"127.0.0.1:{free_port()}"
        url = f"redis://{gone},127.0.0.1:{sentinel.port}/3?sentinel=shop&connect_timeout=2"
        async with Redis.from_url(sentinel.url) as admin, calling(url) as early:
            with pytest.raises(Unavailable, match="knows no shop"):
                await early.send("echo", 1)
            await admin.execute_command("SENTINEL", "MONITOR", "shop", "127.0.0.1", own_redis.port, 1)
            async with serving(url, echo) as server, calling(url) as client:
                answer = await client.send("echo", 1)
                status = server.status

    assert (answer, status) == (1, Status.CONNECTED)


@pytest.mark.asyncio
async def test_in_a_cluster_all_nodes_carry_the_messages(tmp_path: Path) -> None:
    with ClusterNode(tmp_path / "one") as one, ClusterNode(tmp_path / "other") as other:
        async with asyncio.timeout(PATIENCE), Redis.from_url(one.url) as admin:
            bus_port = other._process.args[-1]
            await admin.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port, bus_port)
            while b"cluster_known_nodes:2" not in await admin.execute_command("CLUSTER", "INFO"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        heard: asyncio.Queue[Any] = asyncio.Queue()
        async with (
            serving(f"{one.url}?cluster=true", echo, count, hearing("made", heard)),
            calling(f"{other.url}?cluster=true") as client,
        ):
            answer = await _insist(client)
            values = [value async for value in client.stream("count", 3)]
            await client.emit("made", 1)
            event = await heard.get()

    assert answer == 1
    assert values == [0, 1, 2]  # nobody on the server's own node listens for them
    assert event[1] == 1


async def _insist(client: Client) -> Any:
    # The two nodes may still be getting to know each other.
    while True:
        with suppress(DeadlineExceeded):
            return await client.send("echo", 1, timeout=0.2)


@pytest.mark.asyncio
async def test_rediss_is_tls(redis: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("redis")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*own)

    async with front(redis, context) as passing:
        url = f"rediss://127.0.0.1:{passing.port}{urlsplit(redis).path}?cafile={authority.cafile}"
        async with serving(url, echo), calling(url) as client:
            answer = await client.send("echo", 1)
        async with calling(url.partition("?")[0]) as stranger:
            with pytest.raises(Unavailable, match="cannot be reached"):
                await stranger.send("echo", 1)

    assert answer == 1
