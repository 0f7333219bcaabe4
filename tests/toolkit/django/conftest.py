"""Services of plain functions in place of the shop's, and databases that no other test sees."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from django.db import ConnectionHandler, connections
from pytest_django import DjangoDbBlocker, Settings

from microservices.handlers import Handler, registry
from microservices.microservice import get_executor

Function = Callable[..., Any]
Install = Callable[..., None]
Scratch = Callable[..., str]
Package = Callable[..., str]


def is_open(port: int) -> bool:
    """Return whether somebody listens on a port, without going there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until a condition holds."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - of sockets and states that set no event
            await asyncio.sleep(0)


async def turn(times: int = 20) -> None:
    """Let the event loop turn, so that whatever does not wait for something has gone on."""
    for _ in range(times):
        await asyncio.sleep(0)


@pytest.fixture
def install(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make services of decorated functions live in this process: `install(shop=[get_item])`.

    Their doors stay closed unless they are given a `url`.
    """

    def install(url: str = "", events_url: str = "memory://", **services: list[Function]) -> None:
        # The registry is frozen and these functions are no app's: the one place that goes around it.
        # Without what hears the fleet: it would write each process of these tests into a database.
        others = {name: handlers for name, handlers in registry._handlers.items() if name != "registry"}
        ours = {name: tuple(Handler(function) for function in functions) for name, functions in services.items()}
        monkeypatch.setattr(registry, "_handlers", others | ours)
        places = {name: {"url": url or "tcp://127.0.0.1:1"} for name in services}
        settings.MICROSERVICES = {
            **settings.MICROSERVICES,
            "CLIENTS": places,
            "SERVERS": places,
            "LISTEN": bool(url),
            "EVENTS_URL": events_url,
            "HEARTBEAT": 0,
            "UNITS_OF_WORK": [],  # these functions use no database
            "SERVER_MIDDLEWARE": [],
            "CLIENT_MIDDLEWARE": [],  # no log that is still written when the test has ended
        }

    return install


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        yield owner.getsockname()[1]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, django_db_blocker: DjangoDbBlocker) -> Iterator[Scratch]:
    """Declare a database in a file, `scratch(CONN_MAX_AGE=0)`, and return its alias; real, without a transaction."""

    def scratch(**config: Any) -> str:
        file = {"ENGINE": "django.db.backends.sqlite3", "NAME": tmp_path / "scratch.sqlite3", "CONN_MAX_AGE": 600}
        complete = ConnectionHandler({"default": {}, "scratch": file | config}).settings["scratch"]
        monkeypatch.setitem(connections.settings, "scratch", complete)
        get_executor.cache_clear()  # the pool's threads may know another database by this alias
        return "scratch"

    with django_db_blocker.unblock():
        yield scratch
        if "scratch" in connections.settings:
            connections["scratch"].close()
            del connections["scratch"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Write an app, `package(handlers="...")`, onto the import path and return its name."""
    names: list[str] = []

    def package(**modules: str) -> str:
        name = f"shop{len(names)}"
        names.append(name)
        folder = tmp_path / name
        folder.mkdir()
        for module, source in {"__init__": "", **modules}.items():
            (folder / f"{module}.py").write_text(dedent(source), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return name

    yield package
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        del sys.modules[module]
