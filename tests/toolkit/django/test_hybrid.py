"""The ASGI application around HTTP and the message servers, under servers with lifespan and under daphne."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from pytest_django import Settings

from microservices.hybrid import HybridApplication
from microservices.lifecycle import Lifecycle, State, exit_now
from tests.toolkit.django.conftest import is_open, turn, until

Install = Callable[..., None]
Message = dict[str, Any]

pytestmark = pytest.mark.asyncio


class Broken:
    """A middleware that cannot even be made."""

    def __init__(self) -> None:
        raise RuntimeError("no such thing")


class Http:
    """A project's own application: notes what it is asked, and may be made to wait."""

    def __init__(self) -> None:
        self.scopes: list[Message] = []
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.ended: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        await send({"type": "http.response.start"})
        self.ended.append("answered")


async def lifespan(application: Any, *kinds: str) -> list[Message]:
    """Play a server that sends these messages; return what it is told."""
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    for kind in kinds:
        incoming.put_nowait({"type": f"lifespan.{kind}"})
    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    await application({"type": "lifespan"}, incoming.get, send)
    return told


async def nothing(*_: Any) -> Any:
    """Stands for `receive` and `send` of nobody."""


# Servers that speak lifespan


async def test_a_lifespan_starts_and_stops_the_microservices(install: Install, free_port: int) -> None:
    install(url=f"tcp://127.0.0.1:{free_port}", shop=[])
    process, http = Lifecycle(), Http()
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    told: list[tuple[str, State, bool]] = []

    async def send(message: Message) -> None:
        told.append((message["type"], process.state, is_open(free_port)))
        incoming.put_nowait({"type": "lifespan.shutdown"})

    incoming.put_nowait({"type": "lifespan.startup"})
    await HybridApplication(http, process)({"type": "lifespan"}, incoming.get, send)

    assert told == [
        ("lifespan.startup.complete", State.READY, True),
        ("lifespan.shutdown.complete", State.STOPPED, False),
    ]
    assert http.scopes == []


async def test_a_start_that_fails_is_told_with_its_reason_and_leaves_no_door_open(
    install: Install, settings: Settings, free_port: int, taken_port: int
) -> None:
    install(url="tcp://named.below:1", shop=[], stock=[])
    places = {
        "shop": {"url": f"tcp://127.0.0.1:{free_port}"},
        "stock": {"url": f"tcp://127.0.0.1:{taken_port}"},
    }
    settings.MICROSERVICES = {**settings.MICROSERVICES, "SERVERS": places}
    process = Lifecycle()

    told = await lifespan(HybridApplication(nothing, process), "startup")

    assert [message["type"] for message in told] == ["lifespan.startup.failed"]
    assert told[0]["message"].startswith(f"stock cannot listen on tcp://127.0.0.1:{taken_port}: ")
    assert not is_open(free_port)
    assert process.state is State.STOPPED


async def test_a_start_that_fails_unexpectedly_is_no_server_without_microservices(
    install: Install, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    # uvicorn takes an exception for an application that speaks no lifespan, and serves on.
    install(shop=[])
    settings.MICROSERVICES = {**settings.MICROSERVICES, "SERVER_MIDDLEWARE": [f"{__name__}.Broken"]}

    with caplog.at_level(logging.ERROR, "microservices"):
        told = await lifespan(HybridApplication(nothing, Lifecycle()), "startup")

    assert told == [{"type": "lifespan.startup.failed", "message": "RuntimeError: no such thing"}]
    assert "Traceback" in caplog.text


async def test_everything_but_lifespan_is_the_projects_own() -> None:
    http = Http()
    http.may_end.set()
    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    scopes: list[Message] = [{"type": "http", "path": "/", "headers": []}, {"type": "websocket", "path": "/"}]
    for scope in scopes:
        await HybridApplication(http, Lifecycle())(scope, nothing, send)

    assert http.scopes == scopes
    assert len(told) == 2


# daphne, whose reactor is followed instead


class Reactor:
    """Twisted's reactor as far as daphne's start and stop go."""

    def __init__(self) -> None:
        self.stopped = False
        self._at_start: list[Callable[[], Any]] = []
        self._before_stop: list[Callable[[], Any]] = []
        self.after_stop: list[partial[Any]] = []

    def callWhenRunning(self, call: Callable[[], Any]) -> None:
        self._at_start.append(call)

    def addSystemEventTrigger(self, phase: str, event: str, call: Callable[..., Any], *args: Any) -> None:
        assert event == "shutdown"
        (self._before_stop if phase == "before" else self.after_stop).append(partial(call, *args))

    def callLater(self, delay: float, call: Callable[[], Any]) -> None:
        asyncio.get_running_loop().call_later(delay, call)

    def stop(self) -> None:
        self.stopped = True

    def run(self) -> None:
        for call in self._at_start:
            call()

    def shut_down(self) -> list[asyncio.Future[Any]]:
        """Begin to stop; returns what the reactor waits for."""
        return [call().asFuture(asyncio.get_running_loop()) for call in self._before_stop]


@pytest.fixture
def reactor(monkeypatch: pytest.MonkeyPatch) -> Reactor:
    reactor = Reactor()
    monkeypatch.setitem(sys.modules, "twisted.internet.reactor", reactor)
    return reactor


async def test_the_microservices_live_as_long_as_the_reactor(
    reactor: Reactor, install: Install, free_port: int
) -> None:
    install(url=f"tcp://127.0.0.1:{free_port}", shop=[])
    process = Lifecycle()
    HybridApplication(nothing, process)
    before = process.state

    reactor.run()
    await until(lambda: process.ready)
    during = is_open(free_port)
    await asyncio.gather(*reactor.shut_down())

    assert before is State.STOPPED
    assert during
    assert not is_open(free_port)
    assert process.state is State.STOPPED


async def test_a_start_that_fails_stops_the_reactor_and_says_why(
    reactor: Reactor, install: Install, taken_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    install(url=f"tcp://127.0.0.1:{taken_port}", shop=[])
    HybridApplication(nothing, Lifecycle())

    reactor.run()
    await until(lambda: reactor.stopped)
    await asyncio.gather(*reactor.shut_down())

    assert f"could not start: shop cannot listen on tcp://127.0.0.1:{taken_port}" in caplog.text
    assert [(call.func, call.args) for call in reactor.after_stop] == [(exit_now, (1,))]


async def test_a_request_that_daphne_cancels_while_it_stops_is_answered_first(
    reactor: Reactor, install: Install
) -> None:
    install(shop=[])
    process, http = Lifecycle(), Http()
    application = HybridApplication(http, process)
    process.microservices = ()
    reactor.run()
    request = asyncio.create_task(application({"type": "http", "path": "/", "headers": []}, nothing, nothing))
    await http.begun.wait()

    waiting = reactor.shut_down()
    request.cancel()
    await turn()
    state = process.state
    http.may_end.set()
    await asyncio.gather(*waiting)

    assert state is State.DRAINING
    assert http.ended == ["answered"]
    assert process.state is State.STOPPED
    assert (await asyncio.gather(request, return_exceptions=True)) == [None]


async def test_a_request_whose_client_goes_away_is_cancelled(reactor: Reactor, install: Install) -> None:
    install(shop=[])
    http = Http()
    application = HybridApplication(http, Lifecycle())
    reactor.run()
    request = asyncio.create_task(application({"type": "http", "path": "/", "headers": []}, nothing, nothing))
    await http.begun.wait()

    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await until(lambda: bool(http.ended))
    await asyncio.gather(*reactor.shut_down())

    assert request.cancelled()
    assert http.ended == ["cancelled"]
