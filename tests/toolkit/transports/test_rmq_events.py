"""Durable events over RabbitMQ: the contract of a bus, retries, dead letters, and processes that die."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest
import pytest_asyncio
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from microservices.client import Client
from microservices.context import RpcContext
from microservices.exceptions import ConfigurationError, RpcException, Unavailable
from microservices.handlers import event_pattern
from microservices.instruments import dropped
from microservices.transports import parse
from microservices.transports.base import Status
from microservices.transports.rmq_events import RmqBus, RmqListener
from tests.brokers import RabbitMQ
from tests.toolkit.conftest import service
from tests.toolkit.transports.contract import PATIENCE, EventContract, echo, hearing
from tests.toolkit.transports.test_rmq import die, eventually, joined, next_of, unique, waiting
from tests.toolkit.transports.wire import until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


class TestRmqEvents(EventContract):
    roles = ("listener", "bus")
    carries_headers = True
    wildcard = ("users.*", "users.created")

    @pytest.fixture(autouse=True)
    def use(self, rabbitmq_url: str) -> None:
        self.url = joined(rabbitmq_url, f"exchange={unique('events')}")


class Events:
    """The bus of one test: an exchange of its own, and the names that come from it."""

    def __init__(self, url: str, channel: AbstractChannel) -> None:
        self.url = url
        self.exchange = unique("events")
        self.name = unique("shop")
        self.queue = f"{self.name}.{self.exchange}"
        self.dead = f"dead.{self.name}"
        self.channel = channel

    def address(self, options: str) -> str:
        """Return the bus's URL."""
        return f"{self.url}?exchange={self.exchange}{options}"

    @asynccontextmanager
    async def listening(
        self, *functions: Callable[..., Any], name: str = "", options: str = "&retry_after=0.05", grace: float = 0
    ) -> AsyncIterator[RmqListener]:
        """Hear events as one process of a service."""
        listener = RmqListener(parse(self.address(options)), service(*functions, name=name or self.name))
        await listener.listen()
        try:
            async with asyncio.timeout(PATIENCE):
                yield listener
        finally:
            await listener.close(grace)

    @asynccontextmanager
    async def emitting(self, options: str = "") -> AsyncIterator[Client]:
        """Give a bus."""
        proxy = RmqBus(parse(self.address(options)), "events")
        client = Client("events", lambda: proxy)
        try:
            async with asyncio.timeout(PATIENCE):
                yield client
        finally:
            await client.close()

    async def letters(self, number: int) -> list[AbstractIncomingMessage]:
        """Wait for so many dead letters."""
        dead = await self.channel.get_queue(self.dead)
        return [await next_of(dead) for _ in range(number)]


@pytest_asyncio.fixture
async def events(rabbitmq_url: str) -> AsyncIterator[Events]:
    """A bus of this test's own."""
    async with await aio_pika.connect(rabbitmq_url) as connection, connection.channel() as channel:
        bus = Events(rabbitmq_url, channel)
        yield bus
        for name in (bus.queue, bus.dead, f"{bus.queue}.retry.50"):
            await channel.queue_delete(name)
        await channel.exchange_delete(bus.exchange)


def taking(taken: list[Any], who: str = "", pattern: str = "made") -> Callable[..., Any]:
    """Make a handler that notes what it was given."""

    @event_pattern(pattern)
    async def take(data: Any) -> None:
        taken.append((who, data) if who else data)

    return take


@pytest.mark.asyncio
async def test_each_service_gets_a_copy_and_one_process_of_it_takes_each_event(events: Events) -> None:
    taken: list[Any] = []
    numbers = list(range(50))
    other = unique("payments")

    async with (
        events.listening(taking(taken, "payments"), name=other),
        events.listening(taking(taken, "first"), options="&prefetch=2"),
        events.listening(taking(taken, "second"), options="&prefetch=2"),
        events.emitting() as bus,
    ):
        for number in numbers:
            await bus.emit("made", number)
        await until(lambda: len(taken) == 100)
    for name in (f"{other}.{events.exchange}", f"dead.{other}"):
        await events.channel.queue_delete(name)

    assert [data for who, data in taken if who == "payments"] == numbers
    assert sorted(data for who, data in taken if who != "payments") == numbers
    assert {who for who, _ in taken} == {"payments", "first", "second"}


@pytest.mark.asyncio
async def test_an_event_for_each_process_is_heard_by_each_and_by_one_where_one_is_enough(events: Events) -> None:
    ones: list[Any] = []
    each: dict[str, list[Any]] = {"first": [], "second": []}

    def everywhere(process: str) -> Callable[..., Any]:
        @event_pattern("made", delivery="each")
        async def drop_cache(data: int) -> None:
            each[process].append(data)

        return drop_cache

    async with (
        events.listening(taking(ones), everywhere("first")),
        events.listening(taking(ones), everywhere("second")),
        events.emitting() as bus,
    ):
        for number in range(20):
            await bus.emit("made", number)
        await until(lambda: len(ones) == len(each["first"]) == len(each["second"]) == 20)

    assert sorted(ones) == each["first"] == each["second"] == list(range(20))


@pytest.mark.asyncio
async def test_a_wildcard_for_one_and_a_name_for_each_both_hear(events: Events) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("users.*")
    async def one(data: Any) -> None:
        heard.put_nowait("one")

    @event_pattern("users.made", delivery="each")
    async def each(data: Any) -> None:
        heard.put_nowait("each")

    async with events.listening(one, each), events.emitting() as bus:
        await bus.emit("users.made", 1)
        calls = {await heard.get(), await heard.get()}

    assert calls == {"one", "each"}


@pytest.mark.asyncio
async def test_events_wait_for_a_service_that_is_away(events: Events) -> None:
    taken: list[Any] = []

    async with events.emitting() as bus:
        async with events.listening(taking(taken)):
            pass
        for number in range(20):
            await bus.emit("made", number)
        async with events.listening(taking(taken)):
            await until(lambda: len(taken) == 20)

    assert taken == list(range(20))


@pytest.mark.asyncio
async def test_an_object_with_dots_in_its_pattern_finds_its_handler(events: Events) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with events.listening(hearing({"v": 1.5}, heard)), events.emitting() as bus:
        await bus.emit({"v": 1.6}, 0)
        await bus.emit({"v": 1.5}, 1)
        call = await heard.get()

    assert call == ('{"v":1.5}', 1, {})


@pytest.mark.asyncio
async def test_a_foreign_event_is_known_by_its_routing_key(events: Events) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with events.listening(hearing("made", heard)):
        exchange = await events.channel.get_exchange(events.exchange)
        await exchange.publish(aio_pika.Message(b'{"total":5}'), "made")
        call = await heard.get()

    assert call == ("made", {"total": 5}, {})


@pytest.mark.asyncio
async def test_a_failed_event_is_tried_again_after_a_growing_pause(events: Events) -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []
    seen: list[Any] = []

    @event_pattern("made")
    async def made(data: Any, ctx: RpcContext) -> None:
        times.append(loop.time())
        seen.append((data, ctx.channel, ctx.headers.get("x")))
        if len(times) < 3:
            raise ValueError("not yet")

    async with events.listening(made), events.emitting() as bus:
        await bus.emit("made", 1, options={"headers": {"x": "1"}})
        await until(lambda: len(times) == 3)
        await eventually(lambda: waiting(events.channel, f"{events.queue}.retry.250"), 0)
    await events.channel.queue_delete(f"{events.queue}.retry.250")

    assert seen == [(1, "made", "1")] * 3
    assert times[1] - times[0] >= 0.045
    assert times[2] - times[1] >= 0.245
    assert await waiting(events.channel, events.dead) == 0
    assert await waiting(events.channel, events.queue) == 0


@pytest.mark.asyncio
async def test_an_event_that_fails_too_often_is_a_dead_letter(events: Events) -> None:
    tries: list[Any] = []

    @event_pattern("made")
    async def made(data: Any) -> None:
        tries.append(data)
        if data == "bad":
            raise ValueError("unlucky")

    async with events.listening(made, options="&retry_after=0.05&attempts=2"), events.emitting() as bus:
        await bus.emit("made", "bad")
        await bus.emit("made", "good")
        (letter,) = await events.letters(1)

    assert sorted(tries) == ["bad", "bad", "good"]
    assert json.loads(letter.body)["data"] == "bad"
    assert letter.headers["x-route"] == "made"
    assert letter.headers["x-error"] == "attempt 2 failed: ValueError('unlucky')"
    assert letter.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert dropped.value(events.name, "amqp", "dead-letter") == 1


@pytest.mark.asyncio
async def test_a_payload_that_does_not_fit_is_a_dead_letter_at_once(events: Events) -> None:
    ran = []

    @event_pattern("made")
    def made(data: int) -> None:
        ran.append(data)

    async with events.listening(made, options="&retry_after=60"), events.emitting() as bus:
        await bus.emit("made", "no number")
        (letter,) = await events.letters(1)

    assert ran == []
    assert letter.headers["x-error"] == "Expected 'int', got 'str'"


@pytest.mark.asyncio
@pytest.mark.parametrize("body", [b"no JSON", b"", b"\xff"])
async def test_what_is_no_packet_is_a_dead_letter_at_once(events: Events, body: bytes) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with events.listening(hearing("made", heard)), events.emitting() as bus:
        exchange = await events.channel.get_exchange(events.exchange)
        await exchange.publish(aio_pika.Message(body), "made")
        await bus.emit("made", "after")
        call = await heard.get()
        (letter,) = await events.letters(1)

    assert call == ("made", "after", {})
    assert (letter.body, letter.headers["x-error"]) == (body, "it is no packet")


@pytest.mark.asyncio
async def test_an_error_without_end_is_cut_short(events: Events) -> None:
    @event_pattern("made")
    async def made() -> None:
        raise ValueError("x" * 200_000)  # more than a frame of AMQP has room for

    async with events.listening(made, options="&attempts=1"), events.emitting() as bus:
        await bus.emit("made", 1)
        (letter,) = await events.letters(1)

    assert str(letter.headers["x-error"]).startswith("attempt 1 failed: ValueError('xxx")
    assert len(str(letter.headers["x-error"])) == 1000


@pytest.mark.asyncio
async def test_an_event_of_a_binding_that_is_left_over_goes_by(events: Events) -> None:
    taken: list[Any] = []

    async with events.emitting() as bus:
        async with events.listening(taking(taken), taking(taken, pattern="gone")):
            pass
        await bus.emit("gone", 1)
        await bus.emit("made", 2)
        async with events.listening(taking(taken)):
            await until(lambda: taken == [2])

    assert await waiting(events.channel, events.queue) == 0
    assert dropped.value(events.name, "amqp", "unknown-event") == 1


@pytest.mark.asyncio
async def test_what_a_dead_process_was_working_on_is_taken_over_at_once(events: Events) -> None:
    started: asyncio.Queue[Any] = asyncio.Queue()
    taken: list[Any] = []

    @event_pattern("made")
    async def hangs(data: Any) -> None:
        started.put_nowait(data)
        await asyncio.Event().wait()

    async with events.emitting() as bus, events.listening(hangs, options="&retry_after=60") as victim:
        await bus.emit("made", 1)
        await bus.emit("made", 2)
        assert {await started.get(), await started.get()} == {1, 2}
        die(victim)
        async with events.listening(taking(taken), options="&retry_after=60"):
            await until(lambda: len(taken) == 2)

    assert sorted(taken) == [1, 2]


@pytest.mark.asyncio
async def test_an_event_that_ends_every_process_is_a_dead_letter(events: Events) -> None:
    started: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("made")
    async def hangs(data: Any) -> None:
        started.put_nowait(data)
        await asyncio.Event().wait()

    async with events.emitting() as bus:
        async with events.listening(hangs):
            pass
        await bus.emit("made", 1)
        for _ in range(2):
            async with events.listening(hangs, options="&attempts=2") as victim:
                await started.get()
                await until(lambda victim=victim: len(victim.tasks) == 1)  # it has counted, if it had to
                await waiting(events.channel, events.queue)
                die(victim)
        async with events.listening(hangs, options="&attempts=2"):
            (letter,) = await events.letters(1)

    assert started.empty()
    assert letter.headers["x-error"] == "its process ended 2 times"


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_process_that_is_killed_in_mid_event_loses_none(events: Events) -> None:
    taken: list[Any] = []
    script = f"""
        import asyncio
        from microservices.dispatcher import Dispatcher
        from microservices.executor import Executor
        from microservices.handlers import Handler, event_pattern
        from microservices.transports import parse
        from microservices.transports.rmq_events import RmqListener

        @event_pattern("made")
        async def made(data):
            print("taken", flush=True)
            await asyncio.Event().wait()

        async def main():
            dispatcher = Dispatcher({events.name!r}, [Handler(made)], Executor(1))
            await RmqListener(parse({events.address("")!r}), dispatcher).listen()
            print("ready", flush=True)
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
        async with events.emitting() as bus:
            assert await process.stdout.readline() == b"ready\n"
            await bus.emit("made", 1)
            assert await process.stdout.readline() == b"taken\n"
            process.send_signal(signal.SIGKILL)
            await process.wait()
            async with events.listening(taking(taken)):
                await until(lambda: bool(taken))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert taken == [1]


@pytest.mark.asyncio
async def test_an_event_that_waits_for_its_next_attempt_outlives_its_process(events: Events) -> None:
    taken: list[Any] = []
    failed = asyncio.Event()

    @event_pattern("made")
    async def fails(data: Any) -> None:
        failed.set()
        raise ValueError("not yet")

    async with events.emitting() as bus:
        async with events.listening(fails, options="&retry_after=0.3") as victim:
            await bus.emit("made", 1)
            await failed.wait()
            await until(lambda: not victim.tasks)
            die(victim)
        async with events.listening(taking(taken), options="&retry_after=0.3"):
            await until(lambda: bool(taken))
    await events.channel.queue_delete(f"{events.queue}.retry.300")

    assert taken == [1]


@pytest.mark.asyncio
async def test_no_more_events_run_than_prefetch_says_and_the_rest_waits(events: Events) -> None:
    running, most, heard = 0, 0, 0
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made() -> None:
        nonlocal running, most, heard
        running, heard = running + 1, heard + 1
        most = max(most, running)
        await go_on.wait()
        running -= 1

    async with events.listening(made, options="&prefetch=3"), events.emitting() as bus:
        await asyncio.gather(*(bus.emit("made", number) for number in range(100)))
        await until(lambda: heard == 3)
        left = await waiting(events.channel, events.queue)
        go_on.set()
        await until(lambda: heard == 100)

    assert (left, most) == (97, 3)


@pytest.mark.asyncio
async def test_nothing_is_lost_when_a_process_closes_in_the_middle(events: Events) -> None:
    taken: list[Any] = []
    started: asyncio.Queue[Any] = asyncio.Queue()
    numbers = list(range(200))

    @event_pattern("made")
    async def slow(data: int) -> None:
        started.put_nowait(data)
        await asyncio.sleep(0)
        taken.append(data)

    async with events.emitting() as bus:
        async with events.listening(slow):
            pass
        await asyncio.gather(*(bus.emit("made", number) for number in numbers))
        for _ in range(5):  # one process after the other, each for a moment
            async with events.listening(slow, options="&prefetch=10&attempts=50"):
                await started.get()
        async with events.listening(slow, options="&attempts=50"):
            await until(lambda: set(taken) == set(numbers))

    assert await waiting(events.channel, events.dead) == 0


@pytest.mark.asyncio
async def test_events_survive_a_restart_of_rabbitmq(own_rabbitmq: RabbitMQ) -> None:
    taken: list[Any] = []
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made(data: Any) -> None:
        taken.append(data)
        await go_on.wait()

    async with await aio_pika.connect(own_rabbitmq.url) as connection, connection.channel() as channel:
        events = Events(own_rabbitmq.url, channel)
    async with events.listening(made) as server, events.emitting() as bus:
        await bus.emit("made", "before")
        await until(lambda: taken == ["before"])
        await asyncio.to_thread(own_rabbitmq.stop)
        with pytest.raises(Unavailable):
            await bus.emit("made", "meanwhile", timeout=2)
        go_on.set()
        await asyncio.to_thread(own_rabbitmq.start)
        await until(lambda: server.status is Status.CONNECTED)
        await bus.emit("made", "after")
        await until(lambda: len(taken) == 3)

    # Its acknowledgement was lost with the connection, so that the first one came twice.
    assert sorted(taken) == ["after", "before", "before"]


@pytest.mark.asyncio
async def test_a_listener_without_events_does_not_connect() -> None:
    listener = RmqListener(parse("amqp://127.0.0.1:1"), service(echo))
    await listener.listen()
    await listener.close(0)

    assert listener.status is Status.CLOSED


@pytest.mark.asyncio
async def test_a_bus_answers_no_requests(events: Events) -> None:
    async with events.emitting() as bus:
        with pytest.raises(RpcException, match="answers no requests"):
            await bus.send("ask", 1)


@pytest.mark.asyncio
async def test_a_route_that_amqp_has_no_room_for_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="255 bytes"):
        RmqListener(parse("amqp://127.0.0.1"), service(hearing("é" * 128, asyncio.Queue())))
