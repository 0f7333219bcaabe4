"""Durable events over Redis Streams: the contract, and whatever may end in the middle of an event."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from microservices.client import Client
from microservices.exceptions import ConfigurationError, DeadlineExceeded, RpcException, Unavailable
from microservices.handlers import event_pattern
from microservices.transports import parse
from microservices.transports.base import Status
from microservices.transports.redis_streams import StreamsBus, StreamsListener
from tests.brokers import Valkey
from tests.toolkit.conftest import service
from tests.toolkit.transports.contract import PATIENCE, EventContract, echo, hearing
from tests.toolkit.transports.wire import Wire, listener, until

QUICK = "?retry_after=0.03&take_over_after=0.15"
ROOT = Path(__file__).parents[3]


def streams(url: str, options: str = "") -> str:
    """Return the URL of the bus on this Redis."""
    return url.replace("redis://", "redis-streams://") + options


class TestRedisStreams(EventContract):
    roles = ("listener", "bus")

    @pytest.fixture(autouse=True)
    def use(self, redis: str) -> None:
        self.url = streams(redis)


@asynccontextmanager
async def listening(
    url: str, *functions: Callable[..., Any], name: str = "shop", options: str = QUICK, grace: float = 0
) -> AsyncIterator[StreamsListener]:
    """Hear events as one process of a service."""
    listener = StreamsListener(parse(streams(url, options)), service(*functions, name=name))
    await listener.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            yield listener
    finally:
        await listener.close(grace)


@asynccontextmanager
async def emitting(url: str, options: str = "") -> AsyncIterator[Client]:
    """Give a bus."""
    proxy = StreamsBus(parse(streams(url, options)), "events")
    client = Client("events", lambda: proxy)
    try:
        async with asyncio.timeout(PATIENCE):
            yield client
    finally:
        await client.close()


def taking(taken: list[Any], who: str = "", pattern: str = "made") -> Callable[..., Any]:
    """Make a handler that notes what it was given."""

    @event_pattern(pattern)
    async def take(data: Any) -> None:
        taken.append((who, data) if who else data)

    return take


async def settled(redis: Redis, group: str = "shop", stream: str = "events:made") -> None:
    """Wait until a group has acknowledged all that there is."""

    async def open_entries() -> int:
        groups = {each["name"].decode(): each for each in await redis.xinfo_groups(stream)}
        behind = groups[group]["last-delivered-id"] != (await redis.xinfo_stream(stream))["last-generated-id"]
        return behind + groups[group]["pending"]

    await eventually(open_entries, 0)


async def eventually(look: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    """Look until what is wanted is there."""
    async with asyncio.timeout(PATIENCE):
        while await look() != wanted:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)


async def dead_letters(redis: Redis, service: str = "shop") -> list[dict[str, str]]:
    """Return what a service has given up."""
    entries = await redis.xrange(f"dead:{service}")
    return [{key.decode(): value.decode() for key, value in fields.items()} for _, fields in entries]


def die(listener: StreamsListener) -> None:
    """Do what SIGKILL does: nothing more."""
    assert listener._keeping is not None
    listener._keeping.cancel()
    for task in listener._running.values():
        task.cancel()
    for connection in (listener._reader, listener._writer):
        assert connection is not None
        connection.transport.abort()
    listener._running.clear()


# Copies


@pytest.mark.asyncio
async def test_each_service_gets_a_copy_and_one_process_of_it_takes_each_event(redis: str, foreign: Redis) -> None:
    taken: list[Any] = []
    numbers = list(range(50))

    async with (
        listening(redis, taking(taken, "payments"), name="payments"),
        listening(redis, taking(taken, "first"), options="?prefetch=2"),
        listening(redis, taking(taken, "second"), options="?prefetch=2"),
        emitting(redis) as bus,
    ):
        for number in numbers:
            await bus.emit("made", number)
        await settled(foreign)
        await settled(foreign, "payments")

    assert [data for who, data in taken if who == "payments"] == numbers
    assert sorted(data for who, data in taken if who != "payments") == numbers


@pytest.mark.asyncio
async def test_an_event_for_each_process_is_heard_by_each_and_by_one_where_one_is_enough(redis: str) -> None:
    ones: list[Any] = []
    each: dict[str, list[Any]] = {"first": [], "second": []}

    def everywhere(process: str) -> Callable[..., Any]:
        @event_pattern("made", delivery="each")
        async def drop_cache(data: int) -> None:
            each[process].append(data)

        return drop_cache

    async with (
        listening(redis, taking(ones), everywhere("first")),
        listening(redis, taking(ones), everywhere("second")),
        emitting(redis) as bus,
    ):
        for number in range(20):
            await bus.emit("made", number)
        await until(lambda: len(ones) == len(each["first"]) == len(each["second"]) == 20)

    assert sorted(ones) == each["first"] == each["second"] == list(range(20))


@pytest.mark.asyncio
async def test_a_process_that_starts_later_hears_of_each_event_from_then_on(redis: str) -> None:
    heard: list[int] = []

    @event_pattern("made", delivery="each")
    async def drop_cache(data: int) -> None:
        heard.append(data)

    async with emitting(redis) as bus:
        await bus.emit("made", 1)
        async with listening(redis, drop_cache):
            await bus.emit("made", 2)
            await until(lambda: bool(heard))

    assert heard == [2]


@pytest.mark.asyncio
async def test_an_event_for_each_process_is_heard_after_a_restart_of_redis(own_redis: Valkey) -> None:
    heard: list[int] = []

    @event_pattern("made", delivery="each")
    async def drop_cache(data: int) -> None:
        heard.append(data)

    async with listening(own_redis.url, drop_cache), emitting(own_redis.url) as bus:
        await bus.emit("made", 1)
        await until(lambda: heard == [1])
        own_redis.restart()
        while True:
            try:
                await bus.emit("made", 2)
                break
            except RpcException:
                await asyncio.sleep(0.01)
        await until(lambda: heard == [1, 2])


@pytest.mark.asyncio
async def test_both_processes_of_a_service_take_their_part(redis: str, foreign: Redis) -> None:
    both = asyncio.Barrier(2)

    @event_pattern("made")
    async def made() -> None:
        await both.wait()  # only one that is in the other process can open it

    async with (
        listening(redis, made, options="?prefetch=1"),
        listening(redis, made, options="?prefetch=1"),
        emitting(redis) as bus,
    ):
        for number in range(10):
            await bus.emit("made", number)
        await settled(foreign)


@pytest.mark.asyncio
async def test_an_event_older_than_its_listener_is_heard(redis: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with emitting(redis) as bus:
        await bus.emit("made", "early", metadata={"trace-id": "1"})
        async with listening(redis, hearing("made", heard)):
            call = await heard.get()

    assert call == ("made", "early", {"trace-id": "1"})


@pytest.mark.asyncio
async def test_a_listener_hears_its_own_events_only_and_no_requests(redis: str, foreign: Redis) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with listening(redis, hearing(["made", {"event": "paid"}], heard), echo), emitting(redis) as bus:
        for pattern in ("other", "echo", "made", {"event": "paid"}):
            await bus.emit(pattern, 1)
        calls = {(await heard.get())[0], (await heard.get())[0]}
        groups = [len(await foreign.xinfo_groups(f"events:{route}")) for route in ("other", "echo", "made")]

    assert calls == {"made", '{"event":"paid"}'}
    assert groups == [0, 0, 1]


@pytest.mark.asyncio
async def test_a_bus_answers_no_requests(redis: str) -> None:
    async with emitting(redis) as bus:
        with pytest.raises(RpcException, match="answers no requests"):
            await bus.send("echo", 1)


# Acknowledged when done


@pytest.mark.asyncio
async def test_an_event_is_acknowledged_only_after_its_handler(redis: str, foreign: Redis) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    @event_pattern("made")
    async def made() -> None:
        started.set()
        await go_on.wait()

    async with listening(redis, made), emitting(redis) as bus:
        await bus.emit("made", 1)
        await started.wait()
        meanwhile = (await foreign.xpending("events:made", "shop"))["pending"]
        go_on.set()
        await settled(foreign)

    assert meanwhile == 1


@pytest.mark.asyncio
async def test_a_failed_event_is_tried_again_after_a_pause(redis: str, foreign: Redis) -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []

    @event_pattern("made")
    async def made() -> None:
        times.append(loop.time())
        if len(times) < 3:
            raise ValueError("not yet")

    async with listening(redis, made), emitting(redis) as bus:
        await bus.emit("made", 1)
        await settled(foreign)

    assert len(times) == 3
    assert times[1] - times[0] >= 0.025  # a clock of milliseconds stands between
    assert times[2] - times[1] >= 0.145
    assert await dead_letters(foreign) == []


@pytest.mark.asyncio
async def test_an_event_that_fails_too_often_is_a_dead_letter(
    redis: str, foreign: Redis, losses: Callable[[str, str], int]
) -> None:
    tries: list[Any] = []

    @event_pattern("made")
    async def made(data: Any) -> None:
        tries.append(data)
        if data == "bad":
            raise ValueError("unlucky")

    async with listening(redis, made, options=f"{QUICK}&attempts=2"), emitting(redis) as bus:
        await bus.emit("made", "bad")
        await bus.emit("made", "good")
        await settled(foreign)

    assert sorted(tries) == ["bad", "bad", "good"]
    (letter,) = await dead_letters(foreign)
    assert letter["stream"] == "events:made"
    assert letter["error"] == "attempt 2 failed: ValueError('unlucky')"
    assert msgspec.json.decode(letter["packet"])["data"] == "bad"
    assert next(entry.decode() for entry, _ in await foreign.xrange("events:made")) == letter["entry"]
    assert losses("redis-streams", "dead-letter") == 1


@pytest.mark.asyncio
async def test_a_payload_that_does_not_fit_is_a_dead_letter_at_once(redis: str, foreign: Redis) -> None:
    ran = []

    @event_pattern("made")
    def made(data: int) -> None:
        ran.append(data)

    async with listening(redis, made, options="?retry_after=60"), emitting(redis) as bus:
        await bus.emit("made", "no number")
        await settled(foreign)

    assert ran == []
    assert [letter["error"] for letter in await dead_letters(foreign)] == ["Expected 'int', got 'str'"]


@pytest.mark.asyncio
@pytest.mark.parametrize("fields", [{"packet": "no JSON"}, {"packet": "[1]"}, {"body": "1"}, {"packet": b"\xff"}])
async def test_an_entry_that_is_no_packet_is_a_dead_letter_at_once(
    redis: str, foreign: Redis, fields: dict[str, Any]
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with listening(redis, hearing("made", heard)), emitting(redis) as bus:
        await foreign.xadd("events:made", fields)
        await bus.emit("made", "after")
        await settled(foreign)
        call = await heard.get()

    assert call == ("made", "after", {})
    assert next(fields for _, fields in await foreign.xrange("dead:shop"))[b"error"] == b"it is no packet"


# Processes that end


@pytest.mark.asyncio
async def test_what_a_dead_process_was_working_on_is_taken_over(redis: str, foreign: Redis) -> None:
    started: asyncio.Queue[Any] = asyncio.Queue()
    taken: list[Any] = []

    @event_pattern("made")
    async def hangs(data: Any) -> None:
        started.put_nowait(data)
        await asyncio.Event().wait()

    async with emitting(redis) as bus, listening(redis, hangs) as victim:
        await bus.emit("made", 1)
        await bus.emit("made", 2)
        assert {await started.get(), await started.get()} == {1, 2}
        die(victim)
        async with listening(redis, taking(taken)):
            await settled(foreign)

    assert sorted(taken) == [1, 2]


@pytest.mark.asyncio
async def test_a_process_that_is_killed_in_mid_event_loses_none(redis: str, foreign: Redis) -> None:
    taken: list[Any] = []
    script = f"""
        import asyncio
        from microservices.dispatcher import Dispatcher
        from microservices.executor import Executor
        from microservices.handlers import Handler, event_pattern
        from microservices.transports import parse
        from microservices.transports.redis_streams import StreamsListener

        @event_pattern("made")
        async def made(data):
            print("taken", flush=True)
            await asyncio.Event().wait()

        async def main():
            dispatcher = Dispatcher("shop", [Handler(made)], Executor(1))
            await StreamsListener(parse({streams(redis, QUICK)!r}), dispatcher).listen()
            await asyncio.Event().wait()

        asyncio.run(main())
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "\n".join(line.removeprefix("        ") for line in script.splitlines()),
        env={**os.environ, "PYTHONPATH": str(ROOT / "apps")},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with emitting(redis) as bus:
            await bus.emit("made", 1)
            assert await process.stdout.readline() == b"taken\n"
            process.send_signal(signal.SIGKILL)
            await process.wait()
            async with listening(redis, taking(taken)):
                await settled(foreign)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert taken == [1]


@pytest.mark.asyncio
async def test_an_event_that_ends_every_process_is_a_dead_letter(redis: str, foreign: Redis) -> None:
    started: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("made")
    async def hangs(data: Any) -> None:
        started.put_nowait(data)
        await asyncio.Event().wait()

    async with emitting(redis) as bus:
        await bus.emit("made", 1)
        for _ in range(2):
            async with listening(redis, hangs) as victim:
                await started.get()
                die(victim)
        async with listening(redis, hangs, options=f"{QUICK}&attempts=2"):
            await settled(foreign)

    assert started.empty()
    assert [letter["error"] for letter in await dead_letters(foreign)] == ["its process ended 2 times"]


@pytest.mark.asyncio
async def test_a_long_handler_is_not_taken_over_while_its_process_lives(redis: str, foreign: Redis) -> None:
    taken: list[Any] = []
    started, go_on = asyncio.Event(), asyncio.Event()

    @event_pattern("made")
    async def long(data: Any) -> None:
        taken.append(data)
        started.set()
        await go_on.wait()

    async def idle() -> int:
        (pending,) = await foreign.xpending_range("events:made", "shop", "-", "+", 10)
        return int(pending["time_since_delivered"])

    async with emitting(redis) as bus, listening(redis, long):
        await bus.emit("made", 1)
        await started.wait()
        async with listening(redis, taking(taken, "thief")):
            longest = [await idle() for _ in range(3) if await asyncio.sleep(0.15) is None]
            go_on.set()
            await settled(foreign)

    assert taken == [1]
    assert max(longest) < 150


@pytest.mark.asyncio
async def test_an_event_that_waits_in_a_full_process_is_neither_doubled_nor_counted_as_failed(
    redis: str, foreign: Redis
) -> None:
    taken: list[Any] = []
    go_on = asyncio.Event()

    def blocking(pattern: str) -> Callable[..., Any]:
        @event_pattern(pattern)
        async def take(data: Any) -> None:
            taken.append((pattern, data))
            await go_on.wait()

        return take

    async with emitting(redis) as bus:
        for pattern in ("made", "paid", "sent"):  # each read gives one of each, and there is room for one
            await bus.emit(pattern, 1)
            await bus.emit(pattern, 2)
        patterns = [blocking(pattern) for pattern in ("made", "paid", "sent")]
        async with listening(redis, *patterns, options="?retry_after=0.01&attempts=2&prefetch=1"):
            await until(lambda: bool(taken))
            await asyncio.sleep(0.1)  # as long as several attempts
            before = len(taken)
            go_on.set()
            for stream in ("made", "paid", "sent"):
                await settled(foreign, stream=f"events:{stream}")

    assert before == 1
    assert sorted(taken) == [(pattern, number) for pattern in ("made", "paid", "sent") for number in (1, 2)]
    assert await dead_letters(foreign) == []


# Bounds


@pytest.mark.asyncio
async def test_no_more_events_run_than_prefetch_says_and_the_rest_waits_in_redis(redis: str, foreign: Redis) -> None:
    running, most, heard = 0, 0, 0
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made() -> None:
        nonlocal running, most, heard
        running, heard = running + 1, heard + 1
        most = max(most, running)
        await go_on.wait()
        running -= 1

    async with listening(redis, made, options="?prefetch=3"), emitting(redis) as bus:
        await asyncio.gather(*(bus.emit("made", number) for number in range(100)))
        await until(lambda: heard == 3)
        for _ in range(20):  # time enough to start a fourth, if it were allowed to
            await foreign.ping()
        meanwhile = (heard, (await foreign.xpending("events:made", "shop"))["pending"])
        go_on.set()
        await settled(foreign)

    assert meanwhile == (3, 3)
    assert (most, heard) == (3, 100)


@pytest.mark.asyncio
async def test_a_stream_keeps_no_more_than_about_its_bound(redis: str, foreign: Redis) -> None:
    async with emitting(redis, "?max_length=100") as bus:
        await asyncio.gather(*(bus.emit("made", number) for number in range(1000)))

    assert 100 <= await foreign.xlen("events:made") < 400  # Redis drops whole nodes of about a hundred


@pytest.mark.asyncio
@pytest.mark.parametrize("greeting", [b"", b"%0\r\n"])
async def test_a_redis_that_says_nothing_costs_no_more_than_the_deadline(greeting: bytes) -> None:
    async def silent(wire: Wire) -> None:
        await wire.say(greeting)
        await wire.reader.read()

    async with listener(silent) as port, emitting(f"redis://127.0.0.1:{port}") as bus:
        with pytest.raises(DeadlineExceeded):
            await bus.emit("made", 1, timeout=0.05)


# Restarts


@pytest.mark.asyncio
@pytest.mark.parametrize("keeps", [True, False], ids=["with its data", "without its data"])
async def test_bus_and_listener_survive_a_restart_of_redis(own_redis: Valkey, keeps: bool) -> None:
    taken: list[Any] = []
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made(data: Any) -> None:
        taken.append(data)
        await go_on.wait()

    url = own_redis.url
    async with listening(url, made) as server, emitting(url) as bus:
        await bus.emit("made", "before")
        await until(lambda: taken == ["before"])
        own_redis.stop()
        go_on.set()
        with pytest.raises(Unavailable):
            await bus.emit("made", "meanwhile")
        if not keeps:
            own_redis.lose_everything()
        own_redis.start()
        await bus.emit("made", "after")
        await until(lambda: server.status is Status.CONNECTED)
        async with Redis.from_url(url) as foreign:
            await settled(foreign)

    assert taken == ["before", "after"]


@pytest.mark.asyncio
async def test_events_that_were_never_heard_are_there_after_a_restart(own_redis: Valkey) -> None:
    taken: list[Any] = []

    async with emitting(own_redis.url) as bus:
        for number in range(100):
            await bus.emit("made", number)
        own_redis.restart()
        async with listening(own_redis.url, taking(taken)), Redis.from_url(own_redis.url) as foreign:
            await settled(foreign)

    assert taken == list(range(100))


@pytest.mark.asyncio
async def test_a_stream_that_somebody_removed_is_made_again(redis: str, foreign: Redis) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with listening(redis, hearing("made", heard)), emitting(redis) as bus:
        await foreign.delete("events:made")
        await bus.emit("made", 1)
        call = await heard.get()

    assert call == ("made", 1, {})


@pytest.mark.asyncio
async def test_a_listener_can_start_and_close_while_redis_is_away(
    own_redis: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    own_redis.stop()

    async with listening(own_redis.url, taking([]), options="?connect_timeout=0.05") as server:
        await server.close(1)

        assert server.status is Status.CLOSED
    assert "shop does not hear redis-streams://" in caplog.text


# The end


@pytest.mark.asyncio
async def test_nothing_is_lost_when_a_process_closes_in_the_middle(redis: str, foreign: Redis) -> None:
    taken: list[Any] = []
    started: asyncio.Queue[Any] = asyncio.Queue()
    numbers = list(range(200))

    @event_pattern("made")
    async def slow(data: int) -> None:
        started.put_nowait(data)
        await asyncio.sleep(0)
        taken.append(data)

    async with emitting(redis) as bus:
        emitted = asyncio.gather(*(bus.emit("made", number) for number in numbers))
        for _ in range(5):  # one process after the other, each for a moment
            async with listening(redis, slow, options=f"{QUICK}&prefetch=10"):
                await started.get()
        await emitted
        async with listening(redis, slow):
            await settled(foreign)

    assert sorted(set(taken)) == numbers
    assert await dead_letters(foreign) == []


@pytest.mark.asyncio
async def test_what_a_closing_process_cannot_finish_is_taken_over_without_delay(redis: str, foreign: Redis) -> None:
    taken: list[Any] = []
    started = asyncio.Event()

    @event_pattern("made")
    async def hangs() -> None:
        started.set()
        await asyncio.Event().wait()

    options = f"?retry_after=0.03&take_over_after={PATIENCE * 2}"
    async with emitting(redis) as bus:
        async with listening(redis, hangs, options=options):
            await bus.emit("made", 1)
            await started.wait()
        async with listening(redis, taking(taken), options=options):
            await settled(foreign)

    assert taken == [1]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("attemps=3", "did you mean 'attempts'"),
        ("prefetch=0", "Expected `int` >= 1"),  # it would never read
        ("retry_after=-1", "Expected `float` > 0"),
    ],
)
async def test_a_bad_option_is_explained(query: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        StreamsListener(parse(f"redis-streams://127.0.0.1?{query}"), service(echo))


@pytest.mark.asyncio
async def test_closing_lets_an_event_for_each_process_finish(redis: str) -> None:
    started, go_on, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @event_pattern("made", delivery="each")
    async def made() -> None:
        started.set()
        await go_on.wait()
        finished.set()

    async with listening(redis, made) as listener, emitting(redis) as events:
        await events.emit("made")
        await started.wait()
        closing = asyncio.create_task(listener.close(PATIENCE))
        await asyncio.sleep(0)
        go_on.set()
        await closing

    assert finished.is_set()
