"""A service for faults to strike: `python -m tests.faults.service URL [LIMIT [URL OF ANOTHER]]`.

What it does takes 20 ms, for 16 callers at a time, whoever else waits: 800 a second.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import Any

import uvloop

from microservices import event_pattern, message_pattern
from microservices.client import Client
from microservices.dispatcher import Dispatcher
from microservices.exceptions import RpcException
from microservices.executor import Executor
from microservices.handlers import Handler
from microservices.microservice import Microservice
from microservices.middleware import Middleware
from microservices.resilience.limiter import Gradient, Limiter
from tests.faults.load import client_of

PLACES = 16
SECONDS = 0.02
CAPACITY = PLACES / SECONDS


class Work:
    """The handlers, and what they share."""

    def __init__(self, below: Client | None) -> None:
        self.places = asyncio.Semaphore(PLACES)
        self.below = below
        self.begun = 0

    def handlers(self) -> list[Handler]:
        @message_pattern("echo", inline=True)
        def echo(data: Any) -> Any:
            return data

        @message_pattern("work")
        async def work(data: Any) -> Any:
            self.begun += 1
            async with self.places:
                await asyncio.sleep(SECONDS)
            return data

        @message_pattern("wait")
        async def wait(data: float) -> float:
            self.begun += 1
            await asyncio.sleep(data)
            return data

        @message_pattern("compute")
        def compute(data: float) -> float:
            end = time.thread_time() + data
            while time.thread_time() < end:
                pass
            return data

        @message_pattern("refuse")
        async def refuse(data: Any) -> Any:
            self.begun += 1
            if self.below is not None:
                return await self.below.send("refuse", data)
            raise RpcException({"statusCode": 503, "message": "Not now."})

        @message_pattern("begun", inline=True)
        def begun(data: Any) -> int:
            return self.begun

        @event_pattern("noted")
        async def note(data: Any) -> None:
            self.begun += 1

        return [Handler(each) for each in (echo, work, wait, compute, refuse, begun, note)]


async def main(url: str, limit: str = "200", below: str = "") -> None:
    limiter = Limiter("work", Gradient(most=int(limit))) if int(limit) else None
    # As impatient as a client can be: all is safe, and no breaker ends a storm.
    client = client_of(below, {"retry": "safe", "breaker": False, "retry_floor": 0}) if below else None
    middlewares: list[Middleware] = [limiter] if limiter else []
    dispatcher = Dispatcher("work", Work(client).handlers(), Executor(), middlewares)
    service = Microservice(dispatcher, [url], limiter=limiter)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await service.listen()
    print("ready", flush=True)
    await ended.wait()
    await service.close(5)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
