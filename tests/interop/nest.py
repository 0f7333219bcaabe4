"""NestJS in Node, as a server to call and as a client to drive; and a relay to put between two peers."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
NEWEST = "nest12"
VERSIONS = ("nest11", NEWEST)  # each a folder, with the packages of its own
OLDEST_NODE = 20
# Where systems do not take the ports of outgoing connections from.
PORTS = range(20_000, 32_768)

INSTALL_LIMIT = 120
START_LIMIT = 20
STOP_LIMIT = 5
ANSWER_LIMIT = 15
LONGEST_LINE = 4 * 1024 * 1024
PAUSE_AFTER_BYTE = 0.0005


def install() -> str:
    """Install the packages of all versions where they are missing or older; return why that cannot be, or ''."""
    if not (shutil.which("node") and shutil.which("npm")):
        return "node and npm are not installed"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=START_LIMIT).stdout
    if int(version.strip().lstrip("v").partition(".")[0] or 0) < OLDEST_NODE:
        return f"Node {OLDEST_NODE} or newer is needed, not {version.strip()}"
    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(install_version, VERSIONS)), "")


def install_version(version: str) -> str:
    """Install the packages of one package-lock.json where they are missing or older."""
    folder = HERE / version
    wanted, installed = folder / "package-lock.json", folder / "node_modules" / ".package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= wanted.stat().st_mtime:  # npm writes it last
        return ""
    try:
        command = ["npm", "ci", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_LIMIT)
    except subprocess.TimeoutExpired:
        return f"npm ci took longer than {INSTALL_LIMIT} s"
    return f"npm ci failed: {done.stderr.strip()[:500]}" if done.returncode else ""


def free_port() -> int:
    """Return a port on which nobody listens."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise OSError("No port is free.")


@asynccontextmanager
async def node(script: str, version: str, told: Mapping[str, Any]) -> AsyncIterator[Process]:
    """Run one of this folder's scripts with a version of NestJS until the block ends."""
    process = await asyncio.create_subprocess_exec(
        *("node", "--import", "./versions.js", script, json.dumps(told)),
        cwd=HERE,
        env={**os.environ, "NEST": version},
        stdin=PIPE,
        stdout=PIPE,
        limit=LONGEST_LINE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_LIMIT):
            line = await process.stdout.readline()
        assert line == b"ready\n", f"{script} did not start"
        yield process
    finally:
        process.stdin.close()  # which ends it
        try:
            async with asyncio.timeout(STOP_LIMIT):
                await process.stdout.read()
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


class Answer(NamedTuple):
    """All that an observable of NestJS's client gave."""

    values: list[Any]
    error: Any = None


class NestClient:
    """NestJS's ClientProxy, driven by lines of JSON."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._tags = itertools.count()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    async def send(self, pattern: Any, data: Any, **beside: Any) -> Answer:
        """Do what ClientProxy.send does and wait until its observable ends.

        `beside` the data: the `metadata` of the packet, or a `record` of what the transport itself carries.
        """
        return await self._perform(op="send", pattern=pattern, data=data, **beside)

    async def send_many(self, pattern: Any, count: int) -> Answer:
        """Send `count` requests side by side, each with its number and a text that is not ASCII."""
        return await self._perform(op="send-many", pattern=pattern, count=count)

    async def emit(self, pattern: Any, data: Any, **beside: Any) -> Answer:
        """Do what ClientProxy.emit does."""
        return await self._perform(op="emit", pattern=pattern, data=data, **beside)

    async def call(self, service: str, method: str, data: Any, **options: Any) -> Answer:
        """Call a gRPC method; `options`: `metadata`, a `deadline` in ms, how many of the `first` values to take."""
        return await self._perform(service=service, method=method, data=data, **options)

    async def call_with_stream(self, service: str, method: str, items: list[Any], **options: Any) -> Answer:
        """Call a gRPC method that takes a stream; `options`: also the `pause` in ms before each of the items."""
        return await self._perform(service=service, method=method, items=items, **options)

    async def listen(self) -> None:
        """Hand out the answers until the process ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            answer = json.loads(line)
            self._waiting.pop(answer["tag"]).set_result(Answer(answer.get("values", []), answer.get("error")))

    async def _perform(self, **command: Any) -> Answer:
        assert self._process.stdin is not None
        tag = next(self._tags)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[tag] = answer
        self._process.stdin.write(json.dumps({"tag": tag, **command}).encode() + b"\n")
        async with asyncio.timeout(ANSWER_LIMIT):
            await self._process.stdin.drain()
            return await answer


@asynccontextmanager
async def nest_server(
    url: str, /, *, version: str = NEWEST, name: str = "nest", share: str = "", **options: Any
) -> AsyncIterator[Process]:
    """Run NestJS's server; `url` is its own, or that of a broker, and `options` are those of its transport.

    It answers `who` by its `name`; servers of MQTT share what comes if their `share` is the same.
    """
    told = {"url": url, "name": name, "share": share, "options": options}
    async with node("grpc-server.js" if url.startswith("grpc:") else "server.js", version, told) as process:
        yield process


@asynccontextmanager
async def nest_client(
    url: str, /, *, version: str = NEWEST, replies: Iterable[str] = (), **options: Any
) -> AsyncIterator[NestClient]:
    """Run NestJS's client; `url` is the server's, or that of a broker, and `options` are those of its transport.

    Over Kafka it gets answers to the patterns in `replies` only.
    """
    told = {"url": url, "replies": list(replies), "options": options}
    async with node("grpc-client.js" if url.startswith("grpc:") else "client.js", version, told) as process:
        client = NestClient(process)
        listening = asyncio.create_task(client.listen())
        try:
            yield client
        finally:
            listening.cancel()
            await asyncio.wait([listening])


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close a connection and wait until it is."""
    writer.close()
    with suppress(ConnectionError):
        async with asyncio.timeout(STOP_LIMIT):
            await writer.wait_closed()


@asynccontextmanager
async def relay(port: int) -> AsyncIterator[int]:
    """Pass bytes on to `port` and back, one at a time, so that frames break at every place."""
    connections: set[asyncio.Task[None]] = set()

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1024):
                for byte in data:
                    target.write(bytes([byte]))
                    await target.drain()
                    # Not to wait for anything: so that the other side mostly reads single bytes.
                    await asyncio.sleep(PAUSE_AFTER_BYTE)
        except ConnectionError:
            pass  # one end is gone, and so is the other now
        finally:
            await hang_up(target)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(forward(reader, onward_writer), forward(onward_reader, writer))

    here = free_port()
    server = await asyncio.start_server(connected, "127.0.0.1", here)
    try:
        yield here
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        if connections:
            await asyncio.wait(connections, timeout=STOP_LIMIT)
