"""What a process tells of itself, how often, and what it does when nobody hears it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
import pytest

from microservices.discovery import registry
from microservices.discovery.registry import Heartbeat, Report
from microservices.exceptions import Unavailable

pytestmark = pytest.mark.asyncio


class Turns:
    """A pause that ends when the test says so."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[float] = asyncio.Queue()
        self._over: asyncio.Queue[None] = asyncio.Queue()

    async def __call__(self, seconds: float) -> None:
        self.asked.put_nowait(seconds)
        await self._over.get()

    async def begun(self) -> float:
        """Wait until the beat is over and its pause has begun; return how long that is to be."""
        return await asyncio.wait_for(self.asked.get(), 5)

    async def next(self) -> None:
        """End the pause and wait for the next one."""
        self._over.put_nowait(None)
        await self.begun()


class Bus:
    """Keeps what was emitted; fails, or never answers, when it is told to."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Report]] = []
        self.failure: Exception | None = None
        self.hangs = False

    async def __call__(self, event: str, report: Report) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        self.heard.append((event, report))


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
def turns() -> Turns:
    return Turns()


def two_services() -> list[Report]:
    return [Report("users", "a"), Report("orders", "a")]


async def stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_every_service_is_told_at_once_and_again_after_each_interval(bus: Bus, turns: Turns) -> None:
    heartbeat = Heartbeat(bus, two_services, 7, pause=turns)

    beating = asyncio.create_task(heartbeat.beat())
    pause = await turns.begun()
    first = [(event, report.service) for event, report in bus.heard]
    await turns.next()
    await stopped(beating)

    assert first == [("instance_up", "users"), ("instance_up", "orders")]
    assert [(event, report.service) for event, report in bus.heard] == first * 2
    assert pause == 7


async def test_the_reports_of_a_start_have_one_id_and_growing_numbers(bus: Bus, turns: Turns) -> None:
    heartbeat = Heartbeat(bus, two_services, pause=turns)

    beating = asyncio.create_task(heartbeat.beat())
    await turns.begun()
    await turns.next()
    await heartbeat.tell("down")
    await stopped(beating)

    assert {report.start for _, report in bus.heard} == {heartbeat.start}
    assert [report.sequence for _, report in bus.heard if report.service == "users"] == [1, 2, 3]
    assert Heartbeat(bus, two_services).start != heartbeat.start


async def test_each_beat_tells_what_is_true_then(bus: Bus, turns: Turns) -> None:
    states = iter(["up", "degraded"])
    heartbeat = Heartbeat(bus, lambda: [Report("users", "a", state=next(states))], pause=turns)  # type: ignore[arg-type]

    beating = asyncio.create_task(heartbeat.beat())
    await turns.begun()
    await turns.next()
    await stopped(beating)

    assert [report.state for _, report in bus.heard] == ["up", "degraded"]


@pytest.mark.parametrize("failure", [Unavailable("no bus"), RuntimeError("no bus")], ids=["expected", "unexpected"])
async def test_an_outage_is_logged_once_and_the_beat_goes_on(
    bus: Bus, turns: Turns, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    heartbeat = Heartbeat(bus, lambda: [Report("users", "a")], pause=turns)

    def warnings() -> int:
        return sum(record.message.startswith("nobody hears") for record in caplog.records)

    with caplog.at_level(logging.INFO):
        bus.failure = failure
        beating = asyncio.create_task(heartbeat.beat())
        await turns.begun()
        await turns.next()
        await turns.next()
        during = warnings()
        bus.failure = None
        await turns.next()
        bus.failure = failure
        await turns.next()
        await stopped(beating)

    assert (during, warnings()) == (1, 2)
    assert [report.sequence for _, report in bus.heard] == [4]
    assert "it is heard again" in caplog.text


async def test_a_bus_that_never_answers_holds_up_no_beat(
    bus: Bus, turns: Turns, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "EMIT_LIMIT", 0.01)
    bus.hangs = True

    beating = asyncio.create_task(Heartbeat(bus, two_services, pause=turns).beat())
    await turns.begun()
    await turns.next()
    await stopped(beating)

    assert caplog.text.count("nobody hears that this process is up: not within 0.01 s") == 1


@pytest.mark.parametrize(("state", "event"), [("draining", "instance_draining"), ("down", "instance_down")])
async def test_the_end_is_told_once_for_each_service(bus: Bus, state: str, event: str) -> None:
    await Heartbeat(bus, two_services).tell(state)  # type: ignore[arg-type]

    assert [(event, r.service, r.state) for event, r in bus.heard] == [
        (event, "users", state),
        (event, "orders", state),
    ]


async def test_nobody_waits_longer_than_a_moment_to_tell_the_end(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAREWELL_LIMIT", 0.01)
    bus.hangs = True

    async with asyncio.timeout(1):
        await Heartbeat(bus, two_services).tell("down")

    assert bus.heard == []


async def test_an_end_that_nobody_hears_raises_nothing(bus: Bus) -> None:
    bus.failure = Unavailable("no bus")

    await Heartbeat(bus, two_services).tell("down")

    assert bus.heard == []


def changed(**fields: object) -> bytes:
    return msgspec.json.encode({"service": "users", "instance": "a", **fields})


async def test_a_report_with_fields_of_a_later_version_is_read() -> None:
    report = msgspec.json.decode(changed(load=0.5, pid=7), type=Report)

    assert (report.service, report.pid, report.state) == ("users", 7, "up")


@pytest.mark.parametrize(
    "body",
    [
        changed(service=""),
        changed(service="x" * 101),
        changed(reason="x" * 301),
        changed(reason="\x00"),
        changed(state="fine"),
        changed(sequence=-1),
        changed(sequence=2**40),
        changed(started_at=1e300),
        changed(addresses={str(n): "" for n in range(21)}),
        changed(patterns=[{"name": "x", "kind": "event"}] * 1001),
        msgspec.json.encode({"service": "users"}),
    ],
)
async def test_a_report_that_would_not_fit_where_it_is_kept_is_refused(body: bytes) -> None:
    decode: Callable[[bytes], Report] = msgspec.json.Decoder(Report).decode

    with pytest.raises(msgspec.ValidationError):
        decode(body)
