"""How processes begin and end, and what ends those that cannot by themselves."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from microservices.client import Client
from microservices.exceptions import RpcException
from tests.faults.conftest import calling
from tests.faults.figures import Figures
from tests.faults.fleet import Fleet, Shopper
from tests.system.shop import MANAGE, Process, Shop, free_ports, until

pytestmark = [pytest.mark.slow, pytest.mark.asyncio, pytest.mark.timeout(120)]


class Stuck(Process):
    """The service of `stuck`, in a process of its own."""

    def __init__(self, **env: str) -> None:
        port, self.health = free_ports(2)
        self.url = f"tcp://127.0.0.1:{port}"
        told = {
            "DJANGO_SETTINGS_MODULE": "tests.faults.stuck.settings",
            "STUCK_URL": self.url,
            "STUCK_HEALTH_PORT": str(self.health),
            "DEBUG": "1",
            "LOG_FORMAT": "text",
            "SERVICES": "users",
            "PYTHONUNBUFFERED": "1",
        }
        super().__init__([*MANAGE, "runmicroservice", "stuck"], {**told, **env})
        self.until_says(" ready")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.health}{path}", timeout=10)


@pytest.fixture
def start() -> Iterator[Callable[..., Stuck]]:
    """Start it with this environment; it ends with the test."""
    started: list[Stuck] = []

    def starting(**env: str) -> Stuck:
        started.append(Stuck(**env))
        return started[-1]

    yield starting
    for process in started:
        if process.running:
            process.signal(signal.SIGKILL)
        process.wait()


@asynccontextmanager
async def asking(process: Stuck, pattern: str, data: object) -> AsyncIterator[tuple[Client, asyncio.Task[object]]]:
    """Have a call under way."""
    async with calling(process.url) as client:
        await client.send("echo", 1)
        call = asyncio.create_task(client.send(pattern, data, timeout=60))
        await asyncio.sleep(0.1)  # it has left, and begun
        yield client, call
        call.cancel()
        await asyncio.wait([call])


async def test_a_handler_that_blocks_the_loop_is_named_and_measured(
    start: Callable[..., Stuck], figures: Figures
) -> None:
    process = start()
    async with asking(process, "block", 2.0) as (_, call):
        await call
    until(lambda: "has stood still" in process.output, "the blocking handler told")

    line = next(line for line in process.output.splitlines() if "has stood still" in line)
    assert "in block (" in line
    assert "tests/faults/stuck/handlers.py" in line
    metrics = process.get("/metrics").text
    total = next(
        float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith('microservices_event_loop_lag_seconds_sum{service="stuck"}')
    )
    figures.at_least("handler that blocks for 2 s", "measured as lag of the loop", total, 1.5, "s")


async def test_a_process_that_is_stuck_is_ended_with_its_stacks(start: Callable[..., Stuck], figures: Figures) -> None:
    process = start(WATCHDOG="2")
    began = time.monotonic()
    async with asking(process, "block", 600.0):
        code = await asyncio.to_thread(process.wait)

    figures.at_most("loop stuck, WATCHDOG=2", "until the process has ended", time.monotonic() - began, 5, "s")
    assert code == 1
    assert "most recent call first" in process.output
    assert "handlers.py" in process.output


async def test_a_second_signal_ends_a_stuck_process_at_once(start: Callable[..., Stuck], figures: Figures) -> None:
    process = start()
    async with asking(process, "block", 600.0):
        process.signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert process.running
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait)

    figures.at_most("second signal, loop stuck", "until the process has ended", time.monotonic() - began, 1, "s")
    assert code == 128 + signal.SIGTERM


async def test_what_outlasts_the_drain_is_cancelled_and_told_so(start: Callable[..., Stuck], figures: Figures) -> None:
    process = start(DRAIN_TIMEOUT="2")
    async with asking(process, "hang", None) as (_, call):
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        with pytest.raises(RpcException) as told:
            await call
        code = await asyncio.to_thread(process.wait)

    figures.at_most(
        "handler that hangs, DRAIN_TIMEOUT=2", "until the process has ended", time.monotonic() - began, 3, "s"
    )
    assert (told.value.status_code, told.value.code) == (503, "interrupted")
    assert code == 1


async def test_calls_are_taken_while_routers_learn_that_it_ends(start: Callable[..., Stuck]) -> None:
    process = start(DRAIN_PAUSE="2")
    async with asking(process, "work", 1.0) as (client, call):
        process.signal(signal.SIGTERM)
        until(lambda: process.get("/readyz").status_code == 503, "not ready any more")
        alive = process.get("/livez")
        late = await client.send("echo", 2)
        assert await call == 1.0
        code = await asyncio.to_thread(process.wait)

    assert (alive.status_code, alive.headers["connection"]) == (200, "close")
    assert late == 2
    assert code == 0


# Start


async def test_a_database_that_is_behind_is_refused_and_the_command_named(shop: Shop) -> None:
    with sqlite3.connect(shop.databases / "users.sqlite3") as file:
        file.execute("DELETE FROM django_migrations WHERE app = 'users'")
    file.close()

    users = shop.start("runmicroservice", "users")

    assert users.wait() == 1
    assert "manage.py migrate --database users" in users.output


async def test_a_database_that_is_away_is_waited_for(shop: Shop) -> None:
    home = shop.databases / "users.sqlite3"
    away = shop.databases / "away.sqlite3"
    home.rename(away)
    home.mkdir()  # what cannot be opened
    users = shop.start("runmicroservice", "users")
    users.until_says("waiting for the database users")
    async with httpx.AsyncClient() as http:
        starting = await http.get(f"http://127.0.0.1:{shop.health_port}/readyz")
    assert (starting.status_code, starting.json()["details"]["process"]["message"]) == (503, "Unavailable: starting")

    home.rmdir()
    away.rename(home)

    shop.until_ready(users, shop.health_port)


async def test_a_process_that_waits_for_its_database_ends_when_it_is_told(shop: Shop) -> None:
    home = shop.databases / "users.sqlite3"
    home.unlink()
    home.mkdir()
    users = shop.start("runmicroservice", "users")
    users.until_says("waiting for the database users")

    assert users.stop() == 0


async def test_in_whatever_order_they_start_all_are_there_in_the_end(
    shop: Shop, figures: Figures, chance: random.Random
) -> None:
    fleet = Fleet(shop, services=("users", "orders", "payments"))
    (port,) = free_ports(1)
    shop.env["REDIS_URL"] = f"redis://127.0.0.1:{port}"  # nobody is there yet
    instances = list(fleet)
    chance.shuffle(instances)
    print("order:", [instance.service for instance in instances])
    began = time.monotonic()
    for instance in instances:
        instance.start()
        await asyncio.sleep(chance.uniform(0, 0.5))
    await asyncio.gather(*(instance.until_ready() for instance in instances))
    figures.at_most("start in any order, the bus away", "until all are ready", time.monotonic() - began, 30, "s")

    async with Shopper(fleet) as shopper, httpx.AsyncClient() as http:
        await shopper.read(0)
        await shopper.read(1)
        health = await http.get(f"{fleet.gateway}/health")
    # The bus that is away is told of, and makes nobody unready.
    assert health.status_code == 200
    assert "redis-streams" in health.json()["details"]["brokers"]["message"]
