"""A transport of one's own: NestJS's packets as lines of JSON, one connection a client."""

import asyncio
from contextlib import suppress

from microservices import codec
from microservices.transports.base import ClientProxy, Server, Status


class LinesServer(Server):
    scheme = "lines"

    async def listen(self):
        self._writers = set()
        self._server = await asyncio.start_server(self._serve, *self.address.hosts[0], limit=2**20)
        self.status = Status.CONNECTED

    async def close(self, grace):
        self._server.close()
        await self.finish(grace)
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)
        self.status = Status.CLOSED

    def unwrap(self):
        return self._server

    async def _serve(self, reader, writer):
        self._writers.add(writer)
        with suppress(ConnectionError):
            while line := await reader.readline():
                await self.room()
                packet = codec.decode_packet(self.decode(line))
                self.handle(packet, lambda response: writer.write(self.encode(response) + b"\n"), peer="lines")
        writer.close()
        self._writers.discard(writer)


class LinesClient(ClientProxy):
    scheme = "lines"
    _writer = None

    async def open(self):
        reader, self._writer = await asyncio.open_connection(*self.address.hosts[0], limit=2**20)
        self._reading = asyncio.create_task(self._read(reader))

    async def publish(self, request, context):
        self._writer.write(self.encode(request) + b"\n")

    async def dispatch_event(self, event, context):
        self._writer.write(self.encode(event) + b"\n")
        await self._writer.drain()

    async def disconnect(self):
        if self._writer is not None:
            self._writer.close()
            await asyncio.wait([self._reading])

    def unwrap(self):
        return self._writer

    async def _read(self, reader):
        with suppress(ConnectionError):
            while line := await reader.readline():
                self.receive(codec.decode_reply(self.decode(line)))
        self.lost("The connection was lost.")
