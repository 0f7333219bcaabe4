"""A process from its start to its end: what it opens, what it waits for, what it leaves behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from pytest_django import Settings

from microservices import ConfigurationError, RpcContext, clients, event_pattern, message_pattern, transports
from microservices.client import Client
from microservices.conf import get_settings
from microservices.discovery.registry import Report
from microservices.lifecycle import Lifecycle, State, _bus_for_beats
from microservices.microservice import get_executor, get_microservice
from microservices.transports import Transport, parse
from microservices.transports.base import Server, Status
from microservices.transports.tcp import TcpClient
from tests.toolkit.django.conftest import is_open, turn, until

Install = Callable[..., None]

pytestmark = pytest.mark.asyncio


class Witness(Server):
    """A door that notes in which state the process opens and closes it."""

    scheme = "witness"
    process: ClassVar[Lifecycle]
    seen: ClassVar[list[tuple[str, State]]]

    async def listen(self) -> None:
        self.seen.append(("listen", self.process.state))
        self.status = Status.CONNECTED

    async def close(self, grace: float) -> None:
        self.seen.append(("close", self.process.state))
        self.status = Status.CLOSED

    def unwrap(self) -> None:
        return None


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> type[Witness]:
    monkeypatch.setitem(transports.SCHEMES, "witness", Transport(server=f"{__name__}.Witness"))
    Witness.process = Lifecycle()
    Witness.seen = []
    return Witness


def change(settings: Settings, **given: Any) -> None:
    settings.MICROSERVICES = {**settings.MICROSERVICES, **given}


async def test_a_process_goes_from_stopped_over_starting_ready_and_draining_to_stopped(
    witness: type[Witness], install: Install
) -> None:
    install(url="witness://", shop=[])
    process = witness.process
    states = [process.state]

    await process.start()
    states.append(process.state)
    await process.drain()
    states.append(process.state)
    await process.stop()
    states.append(process.state)

    assert states == [State.STOPPED, State.READY, State.DRAINING, State.STOPPED]
    assert witness.seen == [("listen", State.STARTING), ("close", State.DRAINING)]


async def test_only_a_ready_process_takes_calls(witness: type[Witness]) -> None:
    ready = []
    for state in State:
        witness.process.state = state
        ready.append((state, witness.process.ready))

    assert [state for state, is_ready in ready if is_ready] == [State.READY]


async def test_doors_stay_closed_where_nobody_should_come_in(
    witness: type[Witness], install: Install, settings: Settings
) -> None:
    install(url="witness://", shop=[])
    change(settings, LISTEN=False)

    await witness.process.start()
    state = witness.process.state
    await witness.process.drain()
    await witness.process.stop()

    assert state is State.READY
    assert witness.seen == []


async def test_a_port_is_open_while_the_process_is_ready_and_no_longer(install: Install, free_port: int) -> None:
    install(url=f"tcp://127.0.0.1:{free_port}", shop=[])
    process = Lifecycle()

    await process.start()
    during = is_open(free_port)
    await process.drain()
    after = is_open(free_port)
    await process.stop()

    assert (during, after) == (True, False)


async def test_a_taken_port_is_named_and_the_process_is_not_ready(install: Install, taken_port: int) -> None:
    install(url=f"tcp://127.0.0.1:{taken_port}", shop=[])
    process = Lifecycle()

    with pytest.raises(ConfigurationError) as caught:
        await process.start()
    ready = process.ready
    await process.drain()
    await process.stop()

    assert str(caught.value).startswith(f"shop cannot listen on tcp://127.0.0.1:{taken_port}: ")
    assert "address already in use" in str(caught.value).lower()
    assert not ready
    assert get_microservice("shop").servers == []


async def test_a_process_that_drains_finishes_what_it_has_begun_and_takes_nothing_more(
    install: Install, free_port: int
) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    @message_pattern("work")
    async def work() -> str:
        begun.set()
        await may_end.wait()
        return "done"

    install(url=f"tcp://127.0.0.1:{free_port}", shop=[work])
    process = Lifecycle()
    await process.start()
    caller = Client("shop", lambda: TcpClient(parse(f"tcp://127.0.0.1:{free_port}"), "shop"))

    answer = asyncio.create_task(caller.send("work"))
    await begun.wait()
    drained = asyncio.create_task(process.drain())
    await until(lambda: not is_open(free_port))
    await turn()
    waits = not drained.done()
    may_end.set()
    await drained
    await process.stop()

    assert waits
    assert await answer == "done"
    await caller.close()


async def test_a_process_ends_when_the_work_of_callers_who_gave_up_has(
    install: Install, settings: Settings, gate: threading.Event
) -> None:
    started = threading.Event()

    @message_pattern("slow")
    def slow() -> None:
        started.set()
        gate.wait(10)

    install(shop=[slow])
    process = Lifecycle()
    await process.start()
    call = asyncio.create_task(clients["shop"].send("slow"))
    await asyncio.to_thread(started.wait, 10)
    call.cancel()
    await process.drain()
    stopping = asyncio.create_task(process.stop())
    await turn()
    waits = not stopping.done()
    gate.set()
    await stopping

    assert waits
    assert not get_executor().busy


async def test_a_handler_that_outlasts_the_drain_timeout_is_cancelled(
    install: Install, settings: Settings, free_port: int
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    @message_pattern("work")
    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    install(url=f"tcp://127.0.0.1:{free_port}", shop=[work])
    change(settings, DRAIN_TIMEOUT=0.05)
    process = Lifecycle()
    await process.start()
    caller = Client("shop", lambda: TcpClient(parse(f"tcp://127.0.0.1:{free_port}"), "shop"), timeout=60)

    answer = asyncio.create_task(caller.send("work"))
    await begun.wait()
    async with asyncio.timeout(10):
        await process.drain()
    await process.stop()

    assert ended.is_set()
    assert isinstance((await asyncio.gather(answer, return_exceptions=True))[0], Exception)
    await caller.close()


async def test_whoever_holds_a_connection_takes_its_leave_while_the_process_drains(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(shop=[])
    process = Lifecycle()
    states = []

    async def leave() -> None:
        states.append(process.state)

    async def stumble() -> None:
        raise RuntimeError("no way out")

    process.on_drain.update((stumble, leave))
    await process.start()
    await process.drain()
    await process.stop()

    assert states == [State.DRAINING]
    assert "no way out" in caplog.text


async def test_threads_call_on_the_loop_of_the_process_while_it_lives_and_elsewhere_after(install: Install) -> None:
    @message_pattern("where")
    async def where() -> int:
        return id(asyncio.get_running_loop())

    install(shop=[where])
    process = Lifecycle()
    here = id(asyncio.get_running_loop())

    await process.start()
    during = await asyncio.to_thread(clients["shop"].sync.send, "where")
    await process.stop()
    after = await asyncio.to_thread(clients["shop"].sync.send, "where")

    assert during == here
    assert after != here


async def test_the_uptime_grows() -> None:
    process = Lifecycle()

    first, second = process.uptime, process.uptime

    assert 0 <= first <= second < 10


# What it tells of itself


@pytest.fixture
def heard(install: Install, settings: Settings) -> list[tuple[str, str, str]]:
    """A process that hears its own beats: what came, of whom, in which state."""
    heard: list[tuple[str, str, str]] = []

    @event_pattern(["instance_up", "instance_draining", "instance_down"])
    async def note(data: Report, ctx: RpcContext) -> None:
        heard.append((ctx.pattern, data.service, data.state))

    install(shop=[note])
    change(settings, NAME="shop", HEARTBEAT=0.001)
    return heard


async def test_a_process_tells_that_it_is_up_that_it_drains_and_that_it_is_down(
    heard: list[tuple[str, str, str]],
) -> None:
    process = Lifecycle()

    await process.start()
    await until(lambda: len(heard) > 1)
    await process.drain()
    await process.stop()

    assert heard[:2] == [("instance_up", "shop", "up")] * 2
    assert ("instance_draining", "shop", "draining") in heard
    assert heard[-1] == ("instance_down", "shop", "down")


async def test_a_process_that_drains_is_still_alive(heard: list[tuple[str, str, str]]) -> None:
    process = Lifecycle()
    beats_while_draining: list[int] = []

    async def leave() -> None:
        await until(lambda: ("instance_up", "shop", "draining") in heard)
        beats_while_draining.append(len(heard))

    process.on_drain.add(leave)
    await process.start()
    await process.drain()
    await process.stop()

    assert beats_while_draining


async def test_a_process_that_has_stopped_leaves_no_beat_behind(heard: list[tuple[str, str, str]]) -> None:
    process = Lifecycle()
    before = asyncio.all_tasks()

    await process.start()
    beating = asyncio.all_tasks() - before
    await process.drain()
    await process.stop()

    assert beating
    assert asyncio.all_tasks() == before


async def test_a_process_without_a_heartbeat_tells_nothing(
    heard: list[tuple[str, str, str]], settings: Settings
) -> None:
    change(settings, HEARTBEAT=0)
    process = Lifecycle()

    await process.start()
    await turn()
    await process.drain()
    await process.stop()

    assert heard == []


async def test_a_process_that_opens_the_doors_of_some_services_tells_of_no_others(
    heard: list[tuple[str, str, str]],
) -> None:
    process = Lifecycle()

    await process.start({"elsewhere": []})
    await process.drain()
    await process.stop()

    assert heard == []


async def test_the_streams_of_beats_are_kept_short_and_other_options_stay(settings: Settings) -> None:
    change(settings, EVENTS_URL="redis-streams://127.0.0.1:1?max_length=5000&connect_timeout=7")

    bus: Any = _bus_for_beats(get_settings())._connect()

    assert (bus.options.max_length, bus.options.connect_timeout) == (1000, 7)
