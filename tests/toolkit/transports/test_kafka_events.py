"""Durable events over Kafka: groups, order of keys, second attempts, dead letters."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from microservices.exceptions import DeadlineExceeded, RpcException, Unavailable
from microservices.handlers import event_pattern
from microservices.transports import parse
from microservices.transports.base import Status
from microservices.transports.kafka import KafkaServer
from microservices.transports.kafka_events import KafkaBus, KafkaListener
from tests.brokers import Kafka
from tests.toolkit.conftest import service
from tests.toolkit.transports.contract import PATIENCE, EventContract, echo, hearing
from tests.toolkit.transports.test_kafka import COMMON, Foreign, calling, listened, serving, until_slowly
from tests.toolkit.transports.test_kafka import foreign as foreign
from tests.toolkit.transports.test_kafka import prefix as prefix
from tests.toolkit.transports.test_kafka import url as url

pytestmark = pytest.mark.slow


class TestKafkaEvents(EventContract):
    roles = ("listener", "bus")

    @pytest.fixture(autouse=True)
    def use(self, url: str) -> None:
        self.url = url


def listening(url: str, *functions: Callable[..., Any], **facts: Any) -> Any:
    """Hear events as one process of a service."""
    return serving(url, *functions, kind=KafkaListener, **facts)


@pytest.mark.asyncio
async def test_an_event_may_be_older_than_the_first_start_of_its_listener(url: str, foreign: Foreign) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with calling(url, KafkaBus) as bus:
        await bus.emit("made", {"id": 1})
        async with listening(url, hearing("made", heard)):
            call = await heard.get()
            await foreign.settled("shop", "made", 1)

    assert call == ("made", {"id": 1}, {})


@pytest.mark.asyncio
async def test_each_process_hears_what_is_meant_for_each(url: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    def handlers(who: str) -> list[Callable[..., Any]]:
        @event_pattern("made", delivery="each")
        async def each(data: Any) -> None:
            heard.put_nowait((who, "each", data))

        @event_pattern("made")
        async def one(data: Any) -> None:
            heard.put_nowait(("", "one", data))

        return [each, one]

    # A consumer that stands alone shares nothing: the second one only hears what is for each.
    async with (
        calling(url, KafkaBus) as bus,
        listening(url, *handlers("a")),
        listening(url, handlers("b")[0]),
    ):
        for number in range(20):
            await bus.emit("made", number)
        calls = [await heard.get() for _ in range(60)]

    assert sorted(calls) == sorted(
        (who, kind, n) for n in range(20) for who, kind in (("a", "each"), ("b", "each"), ("", "one"))
    )


@pytest.mark.asyncio
async def test_an_event_is_heard_once_where_requests_take_the_same_cluster(url: str, foreign: Foreign) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    dispatcher = service(echo, hearing("echo", heard), hearing("made", heard))
    server, listener = KafkaServer(parse(url), dispatcher), KafkaListener(parse(url), dispatcher)
    server.hears_events = False

    async with listened(server), listened(listener), calling(url, KafkaBus) as bus:
        for topic in ("echo", "made"):
            await bus.emit(topic, topic)
            await foreign.settled("shop", topic, 1)
        await foreign.settled("shop-server", "echo", 1)
        calls = [heard.get_nowait()[1] for _ in range(heard.qsize())]

    assert calls == ["echo", "made"]


@pytest.mark.asyncio
async def test_a_failed_event_is_tried_again_while_others_go_on(url: str, foreign: Foreign) -> None:
    tries: list[Any] = []

    @event_pattern("made")
    async def made(data: Any) -> None:
        tries.append(data)
        if data == "bad" and tries.count("bad") < 3:
            raise ValueError("unlucky")

    async with calling(url, KafkaBus) as bus, listening(f"{url}&retry_after=0.02", made):
        await bus.emit("made", "bad")
        await bus.emit("made", "good")
        await foreign.settled("shop", "made", 2)

    assert tries == ["bad", "good", "bad", "bad"]


@pytest.mark.asyncio
async def test_an_event_that_fails_too_often_is_a_dead_letter(
    url: str, foreign: Foreign, prefix: str, losses: Callable[[str, str], int]
) -> None:
    @event_pattern("made")
    async def made(data: int) -> None:
        raise ValueError("unlucky")

    async with calling(url, KafkaBus) as bus, listening(f"{url}&retry_after=0.01&attempts=2", made):
        await bus.emit("made", 1, metadata={"trace-id": "t"}, options={"key": "k"})
        await bus.emit("made", "no number")
        await foreign.settled("shop", "made", 2)
        letters = await foreign.read("dead.shop", 2)

    found = {letter.value: (letter.key, dict(letter.headers)) for letter in letters}
    where = {"dead-topic": f"{prefix}made".encode(), "dead-partition": b"0"}
    assert found[b"1"] == (
        b"k",
        {
            "trace-id": b"t",
            "kafka_type": b"json",
            **where,
            "dead-offset": b"0",
            "dead-error": b"attempt 2 failed: ValueError('unlucky')",
        },
    )
    assert found[b"no number"] == (None, where | {"dead-offset": b"1", "dead-error": b"Expected 'int', got 'str'"})
    assert losses("kafka", "dead-letter") == 2


@pytest.mark.asyncio
async def test_a_dead_letter_that_would_be_too_large_tells_where_its_event_is(url: str, foreign: Foreign) -> None:
    @event_pattern("made")
    async def made(data: int) -> None:
        """Take numbers only."""

    async with calling(f"{url}&max_message=1000", KafkaBus) as bus, listening(f"{url}&max_message=1000", made):
        await bus.emit("made", "x" * 900)
        await foreign.settled("shop", "made", 1)
        (letter,) = await foreign.read("dead.shop", 1)

    assert letter.value is None
    assert dict(letter.headers)["dead-offset"] == b"0"


@pytest.mark.asyncio
async def test_events_of_one_key_keep_their_order(url: str, foreign: Foreign) -> None:
    taken: list[Any] = []

    @event_pattern("made")
    async def made(data: Any) -> None:
        await asyncio.sleep(0.02 if data[1] == 0 else 0)
        taken.append(tuple(data))

    async with calling(url, KafkaBus) as bus, listening(url, made):
        for number in range(5):
            for key in ("a", "b"):
                await bus.emit("made", [key, number], options={"key": key})
        await foreign.settled("shop", "made", 10)

    assert [each for each in taken if each[0] == "a"] == [("a", number) for number in range(5)]
    assert [each for each in taken if each[0] == "b"] == [("b", number) for number in range(5)]


@pytest.mark.asyncio
async def test_an_event_between_two_attempts_does_not_hold_up_the_end(url: str, foreign: Foreign) -> None:
    tried = asyncio.Event()
    heard: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("made")
    async def made() -> None:
        tried.set()
        raise ValueError("unlucky")

    async with calling(url, KafkaBus) as bus:
        begun = time.monotonic()
        async with listening(f"{url}&retry_after=60", made, grace=PATIENCE):
            await bus.emit("made", 1)
            await tried.wait()
            await asyncio.sleep(0.02)
        took = time.monotonic() - begun
        async with listening(url, hearing("made", heard)):
            call = await heard.get()

    assert took < PATIENCE / 2
    assert call[1] == 1


@pytest.mark.asyncio
async def test_a_listener_works_on_a_bounded_number_of_events(url: str, foreign: Foreign) -> None:
    running = most = 0

    @event_pattern("made")
    async def made() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1

    async with calling(url, KafkaBus) as bus, listening(f"{url}&max_in_flight=4", made):
        await asyncio.gather(*(bus.emit("made", number) for number in range(40)))
        await foreign.settled("shop", "made", 40)

    assert most == 4


@pytest.mark.asyncio
async def test_a_listener_adds_nothing_to_the_name_of_its_group(url: str, prefix: str) -> None:
    listener = KafkaListener(parse(url), service(hearing("made", asyncio.Queue())))

    assert listener._group.name == f"{prefix}shop"


@pytest.mark.asyncio
async def test_a_bus_answers_no_requests(url: str) -> None:
    async with calling(url, KafkaBus) as bus:
        with pytest.raises(RpcException, match="answers no requests"):
            await bus.send("ask", 1)


@pytest.mark.slow
@pytest.mark.asyncio
async def test_bus_and_listener_survive_a_restart(own_kafka: Kafka) -> None:
    url = f"{own_kafka.url}?{COMMON}&alone=true&connect_timeout=0.5"
    heard: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("told", delivery="each")
    async def told(data: Any) -> None:
        heard.put_nowait(("told", data, {}))

    async with listening(url, hearing("made", heard), told) as server, calling(url, KafkaBus) as bus:
        for topic in ("made", "told"):
            await bus.emit(topic, "before")
        before = [await heard.get(), await heard.get()]
        await asyncio.to_thread(own_kafka.stop)
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await bus.emit("made", "meanwhile", timeout=2)
        await until_slowly(lambda: server.status is Status.RECONNECTING)
        await asyncio.to_thread(own_kafka.start)
        await until_slowly(lambda: server.status is Status.CONNECTED)
        for topic in ("made", "told"):
            await bus.emit(topic, "after")
        after = [await heard.get(), await heard.get()]

    assert sorted(call[:2] for call in before) == [("made", "before"), ("told", "before")]
    assert sorted(call[:2] for call in after) == [("made", "after"), ("told", "after")]
