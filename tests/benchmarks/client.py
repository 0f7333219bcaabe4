"""The client that is measured, in our words; it says what tests/benchmarks/nest/client.js says, and takes the same."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps"))

from microservices import transports
from microservices.client import Client

PATIENCE = 60


class Facts(msgspec.Struct, rename="camel"):
    """What the command line says."""

    url: str
    calls: int
    in_flight: int = 128
    warm_up: int = 0
    kind: Literal["send", "emit"] = "send"
    options: dict[str, Any] = {}
    """What the URL cannot say of the transport."""
    bus: str = ""
    """Where events go, if not to the URL."""


async def make(client: Client, bus: Client, calls: int, facts: Facts) -> list[float]:
    """Make so many calls, a number of them at a time; return what each took, in seconds."""
    left, took = calls, []
    call = _calling(client, bus, facts)

    async def send() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            number, started = left, time.perf_counter()
            if int(await call(number)) != number + 3:  # Kafka brings a number as its text
                raise RuntimeError("a wrong answer")
            took.append(time.perf_counter() - started)

    async with asyncio.TaskGroup() as group:
        for _ in range(facts.in_flight):
            group.create_task(send())
    return took


def _calling(client: Client, bus: Client, facts: Facts) -> Callable[[int], Awaitable[int]]:
    pattern = "sum" if facts.url.startswith("kafka") else {"cmd": "sum"}

    def send(number: int) -> Awaitable[int]:
        return client.send(pattern, [number, 1, 2], timeout=PATIENCE)

    async def emit(number: int) -> int:
        await bus.emit("noted", {"n": number})
        return number + 3

    async def call(number: int) -> int:
        trace = {"traceparent": f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"}
        answer = await client.send("Bench/Sum", {"numbers": [number, 1, 2]}, timeout=PATIENCE, metadata=trace)
        return answer["total"]  # type: ignore[no-any-return]

    return call if facts.url.startswith("grpc") else emit if facts.kind == "emit" else send


async def heard(client: Client, facts: Facts) -> int:
    """Return how many events the server has heard; 0 where none are sent."""
    return int(await client.send("count", None)) if facts.kind == "emit" else 0


async def until_heard(client: Client, facts: Facts, count: int) -> None:
    """Wait until the server has heard so many."""
    async with asyncio.timeout(PATIENCE):
        while facts.kind == "emit" and await heard(client, facts) < count:  # noqa: ASYNC110 - it is in another process
            await asyncio.sleep(0.01)


async def main(facts: Facts) -> dict[str, Any]:
    address = transports.parse(facts.url)
    address = address._replace(options={**address.options, **facts.options})
    client = bus = Client("bench", lambda: transports.load(address, "client")(address, "bench"))
    if facts.bus:
        place = transports.parse(facts.bus)
        bus = Client("events", lambda: transports.load(place, "bus")(place, "events"))
    before = await heard(client, facts) + facts.warm_up
    await make(client, bus, facts.warm_up, facts)
    await until_heard(client, facts, before)
    gc.freeze()
    cpu, started = time.process_time(), time.perf_counter()
    took = await make(client, bus, facts.calls, facts)
    await until_heard(client, facts, before + facts.calls)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    for each in {client, bus}:
        await each.close()
    took.sort()
    return {
        "calls": facts.calls,
        "made": facts.warm_up + facts.calls,
        "seconds": seconds,
        "rate": facts.calls / seconds,
        "cpu": cpu,
        "p50": took[len(took) // 2] * 1000,
        "p99": took[len(took) * 99 // 100] * 1000,
    }


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        done = runner.run(main(msgspec.json.decode(sys.argv[1], type=Facts)))
    done["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    sys.stdout.write(msgspec.json.encode(done).decode() + "\n")
