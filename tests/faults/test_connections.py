"""What networks do to connections on their way."""

from __future__ import annotations

import asyncio
import random

import pytest

from microservices.client import Client
from microservices.transports.base import ClientProxy
from tests.faults.conftest import Work, calling
from tests.faults.figures import Figures
from tests.faults.load import Failed, crowd
from tests.faults.proxy import FaultProxy, proxy_to
from tests.faults.tier import seconds

pytestmark = [pytest.mark.slow, pytest.mark.asyncio, pytest.mark.timeout(180)]
DEADLINE = 1.0
LATE = 0.05
"""How much later than its deadline a call may end."""
SAFE = {"echo": {"retry": "safe"}}


async def echo(client: Client, chance: random.Random, number: int) -> None:
    """Ask for what nobody else asks for."""
    data = {"number": number, "text": "é" * chance.randrange(2000)}
    if await client.send("echo", data, timeout=DEADLINE) != data:
        raise Failed("somebody else's answer")


def pending(client: Client) -> int:
    """Return how many answers a client waits for."""
    proxy = client._bound().proxy
    assert isinstance(proxy, ClientProxy)
    return len(proxy._pending)


async def test_cuts_at_any_byte_give_nobody_the_wrong_answer(
    work: Work, figures: Figures, chance: random.Random
) -> None:
    async with (
        proxy_to(work.port) as proxy,
        calling(f"tcp://127.0.0.1:{proxy.port}", {"breaker": False}, SAFE) as client,
    ):
        proxy.faults.cut_after = lambda: chance.randrange(1, 200_000)
        results = await crowd(lambda number: echo(client, chance, number), 20, seconds(3, 30))
        left = pending(client)

    print(proxy.cuts, "cuts", results.failures)
    figures.at_least("cuts at random bytes", "cuts", proxy.cuts, 20)
    figures.at_most("cuts at random bytes", "wrong answers", results.failures["somebody else's answer"], 0)
    figures.at_most("cuts at random bytes", "calls that never ended", left, 0)
    figures.at_most("cuts at random bytes", "slowest call, of 1 s", results.slowest, DEADLINE + LATE, "s")
    figures.at_least(
        "cuts at random bytes", "calls that succeeded", len(results.succeeded) / len(results) * 100, 80, "%"
    )


async def test_resets_are_survived_by_what_may_be_repeated(work: Work, figures: Figures) -> None:
    async with proxy_to(work.port) as proxy, calling(f"tcp://127.0.0.1:{proxy.port}", {}, SAFE) as client:

        async def reset() -> None:
            while True:
                await asyncio.sleep(0.5)
                proxy.reset()

        resets = asyncio.create_task(reset())
        results = await crowd(lambda number: client.send("echo", number, timeout=DEADLINE), 10, seconds(2, 20))
        resets.cancel()

    print(results.failures)
    figures.at_least("a reset each 0.5 s", "resets", proxy.cuts, 3)
    figures.at_most("a reset each 0.5 s", "safe calls that failed", sum(results.failures.values()), 0)


@pytest.mark.parametrize("kind", ["black hole", "latency 2 s", "1 byte a second"])
async def test_every_call_ends_within_its_deadline(work: Work, figures: Figures, kind: str) -> None:
    async with proxy_to(work.port) as proxy, calling(f"tcp://127.0.0.1:{proxy.port}", {}, SAFE) as client:
        await client.send("echo", "first")
        strike(proxy, kind)
        results = await crowd(lambda number: client.send("echo", number, timeout=DEADLINE), 20, seconds(1.5, 10))

    print(results.failures)
    figures.at_most(kind, "calls that were answered", len(results.succeeded), 0)
    figures.at_most(kind, "slowest call, of 1 s", results.slowest, DEADLINE + LATE, "s")


def strike(proxy: FaultProxy, kind: str) -> None:
    faults = proxy.faults
    if kind == "black hole":
        faults.black_hole = True
    elif kind == "latency 2 s":
        faults.latency = 2
    else:
        faults.bandwidth, faults.slice = 1, 1


async def test_latency_is_all_that_latency_costs(work: Work, figures: Figures) -> None:
    async with proxy_to(work.port) as proxy, calling(f"tcp://127.0.0.1:{proxy.port}", {}, SAFE) as client:
        await client.send("echo", "first")
        proxy.faults.latency = 0.1
        results = await crowd(lambda number: client.send("echo", number, timeout=DEADLINE), 20, seconds(1, 10))

    figures.at_most("latency 0.1 s each way", "calls that failed", sum(results.failures.values()), 0)
    figures.at_most("latency 0.1 s each way", "p99", results.percentile(99) * 1000, 300, "ms")


async def test_a_connection_that_cannot_be_made_is_told_soon(work: Work, figures: Figures) -> None:
    async with proxy_to(work.port) as proxy, calling(f"tcp://127.0.0.1:{proxy.port}", {}, SAFE) as client:
        proxy.faults.refuse = True
        refused = await crowd(lambda number: client.send("echo", number, timeout=DEADLINE), 5, seconds(1, 5))
        proxy.faults.refuse = False
        async with asyncio.timeout(10):
            while (await crowd(lambda number: client.send("echo", number, timeout=DEADLINE), 1, 0.1)).failures:
                pass

    figures.at_most("connections refused", "calls that were answered", len(refused.succeeded), 0)
    figures.at_most("connections refused", "slowest call, of 1 s", refused.slowest, DEADLINE + LATE, "s")
