"""What stands before a broker: TLS, or a broker that takes nothing for a while."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit


class Front:
    """Passes on all that peers and the broker at `url` say, what peers say only while `taking` is set."""

    def __init__(self, url: str) -> None:
        self._broker = urlsplit(url)
        self.port = 0
        self.taking = asyncio.Event()
        self.taking.set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection(self._broker.hostname, self._broker.port)
        await asyncio.gather(self._pass_on(reader, onward[1], self.taking), self._pass_on(onward[0], writer))

    async def _pass_on(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, taking: asyncio.Event | None = None
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if taking is not None:
                    await taking.wait()
                target.write(data)
                await target.drain()
        target.close()


@asynccontextmanager
async def front(url: str, context: ssl.SSLContext | None = None) -> AsyncIterator[Front]:
    """Stand before a broker, on a port of its own."""
    passing = Front(url)
    server = await asyncio.start_server(passing.connected, "127.0.0.1", 0, ssl=context)
    passing.port = server.sockets[0].getsockname()[1]
    try:
        yield passing
    finally:
        passing.taking.set()
        server.close()
