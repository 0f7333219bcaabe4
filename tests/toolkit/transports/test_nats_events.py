"""Events over NATS, its own and those of JetStream: the contract, processes that end, brokers that restart."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import nats
import pytest
import pytest_asyncio
from nats.aio.client import Client as Foreign

from microservices.exceptions import ConfigurationError, RpcException, Unavailable
from microservices.handlers import event_pattern, message_pattern
from microservices.transports import parse
from microservices.transports.base import Status
from microservices.transports.nats import NatsServer
from microservices.transports.nats_events import NatsBus, NatsListener
from tests.brokers import Nats
from tests.toolkit.conftest import service
from tests.toolkit.transports.contract import PATIENCE, EventContract, echo, hearing
from tests.toolkit.transports.test_nats import calling, configured, serving
from tests.toolkit.transports.wire import until

pytestmark = pytest.mark.slow

QUICK = "&retry_after=0.03&ack_wait=0.3"


class TestNatsBus(EventContract):
    roles = ("listener", "bus")
    wildcard = ("users.*", "users.created")
    carries_headers = True
    names_with_spaces = False

    @pytest.fixture(autouse=True)
    def use(self, nats_url: str) -> None:
        self.url = nats_url


class TestNatsStream(TestNatsBus):
    @pytest.fixture(autouse=True)
    def use(self, nats_url: str, stream: str) -> None:
        self.url = f"{nats_url}?stream={stream}"


@pytest_asyncio.fixture
async def foreign(nats_url: str) -> AsyncIterator[Foreign]:
    """A client of NATS that knows nothing of the toolkit."""
    async with await nats.connect(nats_url) as client:
        yield client


@pytest_asyncio.fixture
async def stream(foreign: Foreign) -> AsyncIterator[str]:
    """The name of a stream that is not there yet."""
    name = f"t{os.urandom(4).hex()}"
    yield name
    with suppress(nats.js.errors.NotFoundError):
        await foreign.jetstream().delete_stream(name)


@asynccontextmanager
async def listening(
    url: str, stream: str, *functions: Callable[..., Any], name: str = "shop", options: str = QUICK, grace: float = 0
) -> AsyncIterator[Any]:
    """Hear events of a stream as one process of a service."""
    opened = serving(url, *functions, options=f"?stream={stream}{options}", kind=NatsListener, name=name, grace=grace)
    async with opened as server:
        yield server


def emitting(url: str, stream: str, options: str = "") -> Any:
    """Give a bus with a stream."""
    return calling(url, f"?stream={stream}{options}", kind=NatsBus)


def taking(taken: list[Any], who: str = "", pattern: str = "made") -> Callable[..., Any]:
    """Make a handler that notes what it was given."""

    @event_pattern(pattern)
    async def take(data: Any) -> None:
        taken.append((who, data) if who else data)

    return take


async def settled(foreign: Foreign, stream: str, service: str = "shop") -> None:
    """Wait until a service has acknowledged all that there is."""

    async def left() -> int:
        consumers = await foreign.jetstream().consumers_info(stream)
        of = [each for each in consumers if each.name.startswith(f"{service}_")]
        return sum(each.num_pending + each.num_ack_pending for each in of) if of else -1

    await eventually(left, 0)


async def eventually(look: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    """Look until what is wanted is there."""
    async with asyncio.timeout(PATIENCE):
        while await look() != wanted:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.002)


async def unacknowledged(foreign: Foreign, stream: str) -> int:
    """Return how many events are at work."""
    return sum(each.num_ack_pending or 0 for each in await foreign.jetstream().consumers_info(stream))


async def dead_letters(foreign: Foreign, stream: str) -> list[tuple[dict[str, str], bytes]]:
    """Return what has been given up of a stream."""
    js = foreign.jetstream()
    state = (await js.stream_info("dead")).state
    letters = [await js.get_msg("dead", number) for number in range(max(1, state.first_seq), state.last_seq + 1)]
    return [(each.headers, each.data) for each in letters if each.headers and each.headers["stream"] == stream]


def die(server: Any) -> None:
    """Do what SIGKILL does: nothing more."""
    server._keeping.cancel()
    for task in list(server.tasks):
        task.cancel()
    server.unwrap().transport.abort()


@pytest.mark.asyncio
async def test_server_and_listener_at_one_broker_do_each_thing_once(nats_url: str, foreign: Foreign) -> None:
    ones: list[Any] = []
    each: list[Any] = []
    asked: list[Any] = []

    @message_pattern("made")
    async def ask(data: Any) -> Any:
        asked.append(data)
        return data

    @event_pattern("made")
    async def once(data: int) -> None:
        ones.append(data)

    @event_pattern("made", delivery="each")
    async def drop_cache(data: int) -> None:
        each.append(data)

    dispatcher = service(ask, once, drop_cache)
    server, bus = NatsServer(parse(nats_url), dispatcher), NatsListener(parse(nats_url), dispatcher)
    server.hears_events = False
    await server.listen()
    await bus.listen()
    try:
        async with calling(nats_url) as client:
            for number in range(20):
                await client.emit("made", number)
                await client.send("made", number)
            await until(lambda: len(ones) == len(each) == 20)
    finally:
        await server.close(1)
        await bus.close(1)

    assert sorted(ones) == each == asked == list(range(20))  # one of two subscriptions gets each of those


@pytest.mark.parametrize("stream", ["a.b", "a%20b", "*", "dead"])
def test_a_bad_name_of_a_stream_is_explained(stream: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name the stream"):
        NatsListener(parse(f"nats://127.0.0.1?stream={stream}"), service(echo))
    with pytest.raises(ConfigurationError, match="cannot name the stream"):
        NatsBus(parse(f"nats://127.0.0.1?stream={stream}"), "events")


@pytest.mark.asyncio
async def test_an_event_is_kept_when_emit_returns(nats_url: str, foreign: Foreign, stream: str) -> None:
    js = foreign.jetstream()

    async with emitting(nats_url, stream, "&max_length=7&max_age=60") as bus:
        await bus.emit({"cmd": "made"}, 1, options={"headers": {"x-version": "1"}})
        message = await js.get_msg(stream, 1)
        for number in range(20):
            await bus.emit("made", number)
        info = await js.stream_info(stream)

    assert message.subject == f'{stream}.{{"cmd":"made"}}'
    assert message.data == b'{"pattern":{"cmd":"made"},"data":1}'
    assert message.headers == {"x-version": "1"}
    assert (info.config.max_age, info.config.storage, info.state.messages, info.state.last_seq) == (60, "file", 7, 21)


@pytest.mark.asyncio
async def test_an_event_with_an_id_is_kept_once(nats_url: str, foreign: Foreign, stream: str) -> None:
    async with emitting(nats_url, stream) as bus:
        for _ in range(2):
            await bus.emit("made", 1, options={"headers": {"Nats-Msg-Id": "7"}})
        info = await foreign.jetstream().stream_info(stream)

    assert info.state.messages == 1


@pytest.mark.asyncio
async def test_a_stream_that_is_there_keeps_its_bounds(nats_url: str, foreign: Foreign, stream: str) -> None:
    js = foreign.jetstream()
    await js.add_stream(name=stream, subjects=[f"{stream}.>"], max_msgs=3)

    async with listening(nats_url, stream, taking([])), emitting(nats_url, stream) as bus:
        await bus.emit("made", 1)
        info = await js.stream_info(stream)

    assert info.config.max_msgs == 3


@pytest.mark.asyncio
async def test_an_event_that_no_stream_keeps_fails_its_emitter(
    nats_url: str, foreign: Foreign, stream: str, own_nats: Nats, tmp_path: Path
) -> None:
    await foreign.jetstream().add_stream(name=stream, subjects=[f"{stream}.other"])
    async with emitting(nats_url, stream) as bus:
        with pytest.raises(Unavailable, match="did not keep the event: there is no stream for it"):
            await bus.emit("made", 1)

    await foreign.jetstream().update_stream(name=stream, subjects=[f"{stream}.>"], max_msg_size=10)
    async with emitting(nats_url, stream) as bus:
        with pytest.raises(Unavailable, match="did not keep the event: message size exceeds maximum allowed"):
            await bus.emit("made", "x" * 100)

    with configured(tmp_path / "other", "") as plain:
        async with emitting(plain.url, stream) as bus:
            with pytest.raises(Unavailable, match="has no JetStream"):
                await bus.emit("made", 1)


@pytest.mark.asyncio
async def test_a_bus_answers_no_requests(nats_url: str) -> None:
    async with calling(nats_url, kind=NatsBus) as bus:
        with pytest.raises(RpcException, match="answers no requests"):
            await bus.send("made", 1)


@pytest.mark.asyncio
async def test_each_service_gets_a_copy_and_one_process_of_it_takes_each_event(
    nats_url: str, foreign: Foreign, stream: str
) -> None:
    taken: list[Any] = []
    numbers = list(range(50))

    async with (
        listening(nats_url, stream, taking(taken, "payments"), name="payments"),
        listening(nats_url, stream, taking(taken, "first"), options="&prefetch=2"),
        listening(nats_url, stream, taking(taken, "second"), options="&prefetch=2"),
        emitting(nats_url, stream) as bus,
    ):
        for number in numbers:
            await bus.emit("made", number)
        await settled(foreign, stream)
        await settled(foreign, stream, "payments")

    assert [data for who, data in taken if who == "payments"] == numbers
    assert sorted(data for who, data in taken if who != "payments") == numbers
    assert {who for who, _ in taken} == {"payments", "first", "second"}


@pytest.mark.asyncio
async def test_an_event_of_a_stream_for_each_process_is_heard_by_each(nats_url: str, stream: str) -> None:
    ones: list[Any] = []
    each: dict[str, list[Any]] = {"first": [], "second": []}

    def everywhere(process: str) -> Callable[..., Any]:
        @event_pattern("made", delivery="each")
        async def drop_cache(data: int) -> None:
            each[process].append(data)

        return drop_cache

    async with emitting(nats_url, stream) as bus:
        await bus.emit("made", -1)  # before anybody was there
        async with (
            listening(nats_url, stream, taking(ones), everywhere("first")),
            listening(nats_url, stream, taking(ones), everywhere("second")),
        ):
            for number in range(20):
                await bus.emit("made", number)
            await until(lambda: len(each["first"]) == len(each["second"]) == 20 and len(ones) == 21)

    assert each["first"] == each["second"] == list(range(20))
    assert sorted(ones) == list(range(-1, 20))


@pytest.mark.asyncio
async def test_a_process_that_leaves_leaves_no_consumer_of_its_own(
    nats_url: str, foreign: Foreign, stream: str
) -> None:
    @event_pattern("made", delivery="each")
    async def drop_cache() -> None: ...

    async with listening(nats_url, stream, drop_cache, grace=1):
        during = len(await foreign.jetstream().consumers_info(stream))

    assert (during, await foreign.jetstream().consumers_info(stream)) == (1, [])


@pytest.mark.asyncio
async def test_an_event_older_than_its_listener_is_heard(nats_url: str, stream: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with emitting(nats_url, stream) as bus:
        await bus.emit("made", "early", metadata={"trace-id": "1"})
        async with listening(nats_url, stream, hearing("made", heard)):
            call = await heard.get()

    assert call == ("made", "early", {"trace-id": "1"})


@pytest.mark.asyncio
async def test_a_listener_without_event_handlers_needs_no_nats(stream: str) -> None:
    async with listening("nats://127.0.0.1:1", stream, echo) as server:
        assert server.status is Status.DISCONNECTED


@pytest.mark.asyncio
async def test_an_event_is_acknowledged_after_its_handler(nats_url: str, foreign: Foreign, stream: str) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    @event_pattern("made")
    async def made() -> None:
        started.set()
        await go_on.wait()

    async with listening(nats_url, stream, made), emitting(nats_url, stream) as bus:
        await bus.emit("made", 1)
        await started.wait()
        meanwhile = await unacknowledged(foreign, stream)
        go_on.set()
        await settled(foreign, stream)

    assert meanwhile == 1


@pytest.mark.asyncio
async def test_a_failed_event_is_tried_again_after_a_pause_that_grows(
    nats_url: str, foreign: Foreign, stream: str
) -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []

    @event_pattern("made")
    async def made() -> None:
        times.append(loop.time())
        if len(times) < 3:
            raise ValueError("not yet")

    async with listening(nats_url, stream, made), emitting(nats_url, stream) as bus:
        await bus.emit("made", 1)
        await settled(foreign, stream)

    assert len(times) == 3
    assert times[1] - times[0] >= 0.025
    assert times[2] - times[1] >= 0.145
    assert await dead_letters(foreign, stream) == []


@pytest.mark.asyncio
async def test_an_event_that_fails_too_often_is_a_dead_letter(
    nats_url: str, foreign: Foreign, stream: str, losses: Callable[[str, str], int]
) -> None:
    tries: list[Any] = []

    @event_pattern("made")
    async def made(data: Any) -> None:
        tries.append(data)
        if data == "bad":
            raise ValueError("unlucky\nand more")

    async with listening(nats_url, stream, made, options=f"{QUICK}&attempts=2"), emitting(nats_url, stream) as bus:
        await bus.emit("made", "bad")
        await bus.emit("made", "good")
        await settled(foreign, stream)

    assert sorted(tries) == ["bad", "bad", "good"]
    ((headers, body),) = await dead_letters(foreign, stream)
    assert headers["subject"] == f"{stream}.made"
    assert headers["number"] == "1"
    assert headers["error"] == "attempt 2 failed: ValueError('unlucky\\nand more')"
    assert json.loads(body) == {"pattern": "made", "data": "bad"}
    assert losses("nats", "dead-letter") == 1


@pytest.mark.asyncio
async def test_a_payload_that_does_not_fit_is_a_dead_letter_at_once(
    nats_url: str, foreign: Foreign, stream: str
) -> None:
    ran = []

    @event_pattern("made")
    def made(data: int) -> None:
        ran.append(data)

    async with listening(nats_url, stream, made, options="&retry_after=60"), emitting(nats_url, stream) as bus:
        await bus.emit("made", "no number")
        await settled(foreign, stream)

    assert ran == []
    assert [headers["error"] for headers, _ in await dead_letters(foreign, stream)] == ["Expected 'int', got 'str'"]


@pytest.mark.asyncio
async def test_what_is_no_json_is_a_dead_letter_at_once(nats_url: str, foreign: Foreign, stream: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    large = b"x" * (2**20 - 10)  # leaves no room for headers

    async with listening(nats_url, stream, hearing("made", heard)), emitting(nats_url, stream) as bus:
        await foreign.jetstream().publish(f"{stream}.made", b"no JSON")
        await foreign.jetstream().publish(f"{stream}.made", large)
        await bus.emit("made", "after")
        await settled(foreign, stream)
        call = await heard.get()

    assert call == ("made", "after", {})
    ((headers, body),) = await dead_letters(foreign, stream)
    assert (headers["error"], body) == ("it is no packet", b"no JSON")
    assert (await foreign.jetstream().get_last_msg("dead", "dead.shop")).data == large


@pytest.mark.asyncio
async def test_what_a_dead_process_was_working_on_is_taken_over(nats_url: str, foreign: Foreign, stream: str) -> None:
    started: asyncio.Queue[Any] = asyncio.Queue()
    taken: list[Any] = []

    @event_pattern("made")
    async def hangs(data: Any) -> None:
        started.put_nowait(data)
        await asyncio.Event().wait()

    async with emitting(nats_url, stream) as bus, listening(nats_url, stream, hangs) as victim:
        await bus.emit("made", 1)
        await bus.emit("made", 2)
        assert {await started.get(), await started.get()} == {1, 2}
        die(victim)
        async with listening(nats_url, stream, taking(taken)):
            await settled(foreign, stream)

    assert sorted(taken) == [1, 2]


@pytest.mark.asyncio
async def test_an_event_that_ends_every_process_is_a_dead_letter(nats_url: str, foreign: Foreign, stream: str) -> None:
    started: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("made")
    async def hangs(data: Any) -> None:
        started.put_nowait(data)
        await asyncio.Event().wait()

    async with emitting(nats_url, stream) as bus:
        await bus.emit("made", 1)
        for _ in range(2):
            async with listening(nats_url, stream, hangs) as victim:
                await started.get()
                die(victim)
        async with listening(nats_url, stream, hangs, options=f"{QUICK}&attempts=2"):
            await settled(foreign, stream)

    assert started.empty()
    assert [h["error"] for h, _ in await dead_letters(foreign, stream)] == ["its process ended 2 times"]


@pytest.mark.asyncio
async def test_a_long_handler_is_not_taken_over_while_its_process_lives(
    nats_url: str, foreign: Foreign, stream: str
) -> None:
    taken: list[Any] = []
    started, go_on = asyncio.Event(), asyncio.Event()

    @event_pattern("made")
    async def long(data: Any) -> None:
        taken.append(data)
        started.set()
        await go_on.wait()

    async with emitting(nats_url, stream) as bus, listening(nats_url, stream, long):
        await bus.emit("made", 1)
        await started.wait()
        async with listening(nats_url, stream, taking(taken, "thief")):
            await asyncio.sleep(0.7)  # longer than ack_wait, twice
            go_on.set()
            await settled(foreign, stream)

    assert taken == [1]


@pytest.mark.asyncio
async def test_no_more_events_run_than_prefetch_says_and_the_rest_waits_in_nats(
    nats_url: str, foreign: Foreign, stream: str
) -> None:
    running, most, heard = 0, 0, 0
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made() -> None:
        nonlocal running, most, heard
        running, heard = running + 1, heard + 1
        most = max(most, running)
        await go_on.wait()
        running -= 1

    async with listening(nats_url, stream, made, options="&prefetch=3"), emitting(nats_url, stream) as bus:
        await asyncio.gather(*(bus.emit("made", number) for number in range(100)))
        await until(lambda: heard == 3)
        for _ in range(20):  # time enough to start a fourth, if it were allowed to
            await foreign.flush()
        meanwhile = (heard, await unacknowledged(foreign, stream))
        go_on.set()
        await settled(foreign, stream)

    assert meanwhile == (3, 3)
    assert (most, heard) == (3, 100)


@pytest.mark.asyncio
async def test_an_event_that_waits_in_a_full_process_is_neither_doubled_nor_counted_as_failed(
    nats_url: str, foreign: Foreign, stream: str
) -> None:
    taken: list[Any] = []
    go_on = asyncio.Event()

    def blocking(pattern: str) -> Callable[..., Any]:
        @event_pattern(pattern)
        async def take(data: Any) -> None:
            taken.append((pattern, data))
            await go_on.wait()

        return take

    async with emitting(nats_url, stream) as bus:
        for pattern in ("made", "paid", "sent"):
            await bus.emit(pattern, 1)
            await bus.emit(pattern, 2)
        patterns = [blocking(pattern) for pattern in ("made", "paid", "sent")]
        async with listening(nats_url, stream, *patterns, options="&ack_wait=0.1&attempts=2&prefetch=1"):
            await until(lambda: bool(taken))
            await asyncio.sleep(0.25)  # longer than ack_wait, twice
            before = len(taken)
            go_on.set()
            await settled(foreign, stream)

    assert before == 1
    assert sorted(taken) == [(pattern, number) for pattern in ("made", "paid", "sent") for number in (1, 2)]


@pytest.mark.asyncio
async def test_nothing_is_lost_when_a_process_closes_in_the_middle(
    nats_url: str, foreign: Foreign, stream: str
) -> None:
    taken: list[Any] = []
    started: asyncio.Queue[Any] = asyncio.Queue()
    numbers = list(range(200))

    @event_pattern("made")
    async def slow(data: int) -> None:
        started.put_nowait(data)
        await asyncio.sleep(0)
        taken.append(data)

    async with emitting(nats_url, stream) as bus:
        emitted = asyncio.gather(*(bus.emit("made", number) for number in numbers))
        for _ in range(5):  # one process after the other, each for a moment
            async with listening(nats_url, stream, slow, options=f"{QUICK}&prefetch=10&attempts=20"):
                await started.get()
        await emitted
        async with listening(nats_url, stream, slow, options=f"{QUICK}&attempts=20"):
            await settled(foreign, stream)

    assert sorted(set(taken)) == numbers
    assert await dead_letters(foreign, stream) == []


@pytest.mark.asyncio
async def test_what_a_closing_process_cannot_finish_is_taken_over_without_delay(
    nats_url: str, foreign: Foreign, stream: str
) -> None:
    taken: list[Any] = []
    started = asyncio.Event()

    @event_pattern("made")
    async def hangs() -> None:
        started.set()
        await asyncio.Event().wait()

    async with emitting(nats_url, stream) as bus:
        async with listening(nats_url, stream, hangs, options="&ack_wait=60"):
            await bus.emit("made", 1)
            await started.wait()
        async with listening(nats_url, stream, taking(taken), options="&ack_wait=60"):
            await settled(foreign, stream)

    assert taken == [1]


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["stream", "consumer"])
async def test_what_somebody_removed_is_made_again(nats_url: str, foreign: Foreign, stream: str, what: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    js = foreign.jetstream()

    async with listening(nats_url, stream, hearing("made", heard)), emitting(nats_url, stream) as bus:
        await bus.emit("made", 1)
        calls = [await heard.get()]
        await settled(foreign, stream)
        if what == "stream":
            await js.delete_stream(stream)
        else:
            (consumer,) = await js.consumers_info(stream)
            await js.delete_consumer(stream, consumer.name)
        await bus.emit("made", 2)
        while calls[-1][1] != 2:  # a consumer made anew begins anew
            calls.append(await heard.get())

    assert {call[1] for call in calls} == {1, 2}


@pytest.mark.asyncio
@pytest.mark.parametrize("keeps", [True, False], ids=["with its data", "without its data"])
async def test_bus_and_listener_survive_a_restart_of_nats(own_nats: Nats, keeps: bool) -> None:
    taken: list[Any] = []
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made(data: Any) -> None:
        taken.append(data)
        await go_on.wait()

    url = own_nats.url
    async with listening(url, "events", made, options="&ack_wait=5") as server, emitting(url, "events") as bus:
        await bus.emit("made", "before")
        await until(lambda: taken == ["before"])
        own_nats.stop()
        go_on.set()
        with pytest.raises(Unavailable):
            await bus.emit("made", "meanwhile")
        if not keeps:
            shutil.rmtree(own_nats._folder / "jetstream")
        own_nats.start()
        await bus.emit("made", "after")
        await until(lambda: server.status is Status.CONNECTED)
        async with await nats.connect(url) as foreign:
            await settled(foreign, "events")

    assert list(dict.fromkeys(taken)) == ["before", "after"]  # NATS may forget in a crash what it has handed out


@pytest.mark.asyncio
async def test_an_event_for_each_process_is_heard_after_a_restart_of_nats(own_nats: Nats) -> None:
    heard: list[int] = []

    @event_pattern("made", delivery="each")
    async def drop_cache(data: int) -> None:
        heard.append(data)

    async with listening(own_nats.url, "events", drop_cache), emitting(own_nats.url, "events") as bus:
        await bus.emit("made", 1)
        await until(lambda: heard == [1])
        own_nats.restart()
        for number in (2, 3):
            while True:
                try:
                    await bus.emit("made", number)
                    break
                except Unavailable:
                    await asyncio.sleep(0.01)
        await until(lambda: len(heard) >= 3)

    assert list(dict.fromkeys(heard)) == [1, 2, 3]  # NATS may forget in a crash what it has handed out


@pytest.mark.asyncio
async def test_a_server_can_be_closed_at_any_moment_of_its_start(
    nats_url: str, stream: str, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = asyncio.all_tasks()

    for turns in range(0, 60, 3):
        for server in (
            NatsServer(parse(nats_url), service(echo)),
            NatsListener(parse(f"{nats_url}?stream={stream}"), service(hearing("made", asyncio.Queue()))),
        ):
            starting = asyncio.create_task(server.listen())
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.sleep(turns / 10_000)
            async with asyncio.timeout(PATIENCE):
                await server.close(0)
            starting.cancel()
            await asyncio.wait([starting])
    async with asyncio.timeout(PATIENCE):
        while asyncio.all_tasks() != tasks:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)

    assert caplog.records == []
