"""Users behind a gateway, as our service and as fast as one: `gateway_service.py '{"url": URL}'`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps"))

from microservices import transports
from microservices.dispatcher import Dispatcher
from microservices.executor import Executor
from microservices.handlers import Handler, message_pattern

ADA = {
    "id": "7",
    "name": "Ada Lovelace",
    "email": "ada@example.org",
    "role": "customer",
    "status": "active",
    "version": 1,
    "created_at": "2026-01-01T00:00:00Z",
}


@message_pattern({"cmd": "get_user"}, inline=True)
def get_user(data: dict[str, Any]) -> dict[str, Any]:
    """Return the same user whatever the id: NestJS's gateway asks by a number, ours by a text."""
    return ADA


async def main(url: str) -> None:
    address = transports.parse(url)
    server = transports.load(address, "server")(address, Dispatcher("users", [Handler(get_user)], Executor()))
    await server.listen()
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.close(1)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(msgspec.json.decode(sys.argv[1])["url"]))
