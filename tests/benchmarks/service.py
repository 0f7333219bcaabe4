"""The service that is measured: what tests/interop/server.js does, in our words. Usage: service.py '{"url": URL}'"""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path

import msgspec
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps"))

from microservices.dispatcher import Dispatcher
from microservices.executor import Executor
from microservices.handlers import Handler, message_pattern
from microservices.transports import parse
from microservices.transports.tcp import TcpServer


@message_pattern({"cmd": "sum"}, inline=True)
def add(data: list[int]) -> int:
    return sum(data)


@message_pattern({"cmd": "sum_in_task"})
async def add_in_task(data: list[int]) -> int:
    return sum(data)


async def main(url: str) -> None:
    dispatcher = Dispatcher("bench", [Handler(add), Handler(add_in_task)], Executor())
    server = TcpServer(parse(url), dispatcher)
    await server.listen()
    gc.freeze()
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.close(1)
    print(msgspec.__version__, file=sys.stderr)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(msgspec.json.decode(sys.argv[1])["url"]))
