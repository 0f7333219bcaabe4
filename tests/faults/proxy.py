"""A TCP proxy that does to connections what networks do to them."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

_CHUNK = 64 * 1024
_AHEAD = 64
"""How many chunks may be on their way in one direction; what is more stays with its sender."""
_END = struct.pack("ii", 1, 0)  # SO_LINGER: a close that is a reset


@dataclass
class Faults:
    """What happens to the connections of a proxy; it may be changed while they are open."""

    latency: float = 0.0
    """Seconds that each byte is on its way, in each direction."""
    bandwidth: float = 0.0
    """Bytes a second, in each direction of each connection; 0 for any number."""
    slice: int = 0
    """How many bytes arrive at a time; 0 for as many as came."""
    black_hole: bool = False
    """Everything is taken, and nothing arrives."""
    refuse: bool = False
    """New connections are reset at once."""
    cut_after: Callable[[], int] | None = None
    """After how many bytes, in both directions together, a new connection is reset."""


class FaultProxy:
    """Passes bytes on to `host:port` and back, with `faults`."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.faults = Faults()
        self.port = 0
        """Where it listens."""
        self.cuts = 0
        """How many connections it has reset."""
        self._target = host, port
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Take connections, on a port of its own."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=_CHUNK)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Take no more, and end those that are open."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    def reset(self) -> None:
        """Reset all connections that are open."""
        for link in list(self._links):
            link.cut()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self.faults.refuse:
                _reset(writer)
                return
            onward_reader, onward_writer = await asyncio.open_connection(*self._target, limit=_CHUNK)
            link = _Link(self, writer, onward_writer)
            self._links.add(link)
            try:
                await asyncio.gather(link.carry(reader, onward_writer), link.carry(onward_reader, writer))
            finally:
                self._links.discard(link)
                onward_writer.close()
        except (OSError, asyncio.CancelledError):
            pass  # one of the two is gone, or the proxy closes; asyncio's streams log a task that is cancelled
        finally:
            writer.close()
            self._tasks.discard(task)


class _Link:
    """One connection to the proxy, and its own to the target."""

    def __init__(self, proxy: FaultProxy, *writers: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._writers = writers
        cut_after = proxy.faults.cut_after
        self._left = cut_after() if cut_after else None

    def cut(self) -> None:
        self._proxy.cuts += 1
        for writer in self._writers:
            _reset(writer)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_AHEAD)

        async def take() -> None:
            while data := await reader.read(_CHUNK):
                await way.put((loop.time() + self._proxy.faults.latency, data))
            await way.put((loop.time() + self._proxy.faults.latency, b""))

        async def give() -> None:
            while True:
                due, data = await way.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    with suppress(OSError):
                        writer.write_eof()
                    return
                await self._pass(data, writer)

        halves = [asyncio.ensure_future(take()), asyncio.ensure_future(give())]
        try:
            await asyncio.gather(*halves)
        finally:
            for half in halves:
                half.cancel()

    async def _pass(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        faults = self._proxy.faults
        if faults.black_hole:
            return
        size = faults.slice or len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            if self._left is not None:
                piece = piece[: self._left]
                self._left -= len(piece)
            writer.write(piece)
            await writer.drain()
            if self._left == 0:
                self.cut()
                return
            await asyncio.sleep(len(piece) / faults.bandwidth if faults.bandwidth else 0)


def _reset(writer: asyncio.StreamWriter) -> None:
    native = writer.get_extra_info("socket")
    if native is not None and native.fileno() >= 0:
        native.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _END)
    writer.transport.abort()


@asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[FaultProxy]:
    """Put a proxy before a port of this host until the block ends."""
    proxy = FaultProxy(port)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.close()
