"""Services to strike, seeds that are told, and the table of what was measured."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from microservices.client import Client
from tests.faults.figures import Figures
from tests.faults.load import client_of
from tests.system.shop import ROOT, Process, free_ports

FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = Figures()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if found := config.stash[FIGURES]:
        terminalreporter.section("faults")
        terminalreporter.write_line(found.table())


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep callers from logging each call, which would cost more than the call."""
    monkeypatch.setattr(logging.getLogger("httpx"), "level", logging.WARNING)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Where a test notes what it has measured."""
    return request.config.stash[FIGURES]


@pytest.fixture
def chance() -> random.Random:
    """Chance, by a seed that is printed; FAULTS_SEED gives it again."""
    seed = int(os.environ.get("FAULTS_SEED") or random.SystemRandom().randrange(2**32))
    print(f"FAULTS_SEED={seed}")
    return random.Random(seed)


class Work(Process):
    """The service of service.py, in a process of its own."""

    def __init__(self, options: str = "", limit: int = 200, below: str = "", port: int = 0) -> None:
        self.port = port or free_ports(1)[0]
        self.url = f"tcp://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "tests.faults.service", self.url + options, str(limit), below]
        super().__init__(command, {"PYTHONPATH": str(ROOT / "apps")})
        self.until_says("ready")

    @property
    def memory(self) -> float:
        """Its resident memory, in MiB."""
        with open(f"/proc/{self.pid}/statm") as facts:
            return int(facts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2

    @property
    def files(self) -> int:
        """How many files and connections it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@pytest.fixture
def start() -> Iterator[Callable[..., Work]]:
    """Start `Work` with these arguments; it ends with the test."""
    started: list[Work] = []

    def starting(*args: Any, **named: Any) -> Work:
        started.append(Work(*args, **named))
        return started[-1]

    yield starting
    for process in started:
        process.stop()


@pytest.fixture
def work(start: Callable[..., Work]) -> Work:
    """One service."""
    return start()


@asynccontextmanager
async def calling(
    url: str, policies: dict[str, Any] | None = None, patterns: dict[str, dict[str, Any]] | None = None
) -> AsyncIterator[Client]:
    """Call the service at `url` with what `client_of` returns."""
    client = client_of(url, policies, patterns)
    try:
        yield client
    finally:
        await client.close()
