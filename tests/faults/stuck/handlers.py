"""What it answers."""

import asyncio
import time

from microservices import message_pattern


@message_pattern("echo")
async def echo(data: int) -> int:
    """Return what came."""
    return data


@message_pattern("hang")
async def hang() -> None:
    """Wait for nothing."""
    await asyncio.Event().wait()


@message_pattern("work")
async def work(seconds: float) -> float:
    """Take so long."""
    await asyncio.sleep(seconds)
    return seconds


@message_pattern("block")
async def block(seconds: float) -> float:
    """Hold the event loop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)  # noqa: ASYNC251 - the mistake that is to be found
    return seconds
