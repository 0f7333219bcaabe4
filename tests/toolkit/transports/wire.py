"""Both ends of a connection without the toolkit: bytes in, bytes out."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any


def framed(body: Any) -> bytes:
    """Return a frame as NestJS would send it; `body` is an object, or the text as it stands."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"{len(text.encode('utf-16-le')) // 2}#{text}".encode()


def asked(pattern: Any, data: Any = None, *, id: Any = "1", **more: Any) -> bytes:
    """Return the frame of a request."""
    return framed({"pattern": pattern, "data": data, **more, "id": id})


class Wire:
    """One end of a raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, *pieces: bytes) -> None:
        """Write pieces, each in a packet of its own as far as the kernel allows."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def hear(self) -> Any:
        """Return the next packet; None at the end of the connection, however it came."""
        try:
            length = int((await self.reader.readuntil(b"#"))[:-1])
            text = ""
            while (missing := length - len(text.encode("utf-16-le")) // 2) > 0:
                text += await self._characters(missing)
            return json.loads(text)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def hear_all(self, number: int) -> list[Any]:
        """Return the next `number` packets."""
        return [await self.hear() for _ in range(number)]

    def stop_reading(self) -> None:
        """Take nothing from the kernel from now on."""
        self.writer.transport.pause_reading()

    def go_on_reading(self) -> None:
        """Take what has gathered meanwhile, and what comes."""
        self.writer.transport.resume_reading()

    def reset(self) -> None:
        """Go without a farewell."""
        native = self.writer.get_extra_info("socket")
        native.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def _characters(self, missing: int) -> str:
        # A character takes at most twice as many units as a lead byte tells, so never read beyond the frame.
        read = await self.reader.readexactly((missing + 1) // 2)
        while True:
            try:
                return read.decode()
            except UnicodeDecodeError:
                read += await self.reader.readexactly(1)


@asynccontextmanager
async def connection(port: int, source: str = "127.0.0.1") -> AsyncIterator[Wire]:
    """Connect to a server on loopback, from an address of it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def listener(talk: Callable[[Wire], Awaitable[None]], port: int = 0) -> AsyncIterator[int]:
    """Be a server: run `talk` with each connection, then end it. Gives the port."""

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(Wire(reader, writer))
        finally:
            writer.close()

    server = await asyncio.start_server(served, "127.0.0.1", port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def until(condition: Callable[[], bool]) -> None:
    """Give the loop turns until a condition holds that nobody tells of."""
    while not condition():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0)
