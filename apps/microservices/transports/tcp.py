"""NestJS's TCP transport (nest-wire.md section 7): one connection a client, answers in any order."""

from __future__ import annotations

import asyncio
import logging
import random
import select
import socket
import ssl
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Set
from contextlib import aclosing, suppress
from contextvars import Context
from functools import partial
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Raw

from .. import codec
from ..context import RpcContext
from ..dispatcher import Dispatcher, Replier
from ..exceptions import ConnectionLost, Draining, FrameError, PacketError, Unavailable
from ..instruments import Bound, dropped
from ..packets import Event, Packet, Request, Response
from . import Address, Count, Seconds, sockets
from .base import ClientProxy, Server, Status
from .frames import FramedConnection
from .tls import TlsOptions

logger = logging.getLogger("microservices.tcp")

_LIMIT = 1024 * 1024
_LOOK = 1.0
"""Seconds from one look to the next whether an aged connection has answered all that it owes."""
_PARTING = 0.1
"""Seconds for which a door that closes still tells those who ask that it does."""
_RDHUP = getattr(select, "POLLRDHUP", 0)


class Options(TlsOptions, frozen=True, kw_only=True):
    """What a URL may set beside TLS: sizes in UTF-16 units or bytes, times in seconds."""

    max_buffer_size: Count = _LIMIT
    max_send_buffer_size: Count = _LIMIT
    incomplete_message_timeout: Seconds = 10
    idle_timeout: Seconds = 300
    max_connections: Count = 1024
    max_connections_per_peer: Count = 512
    """How many of them may come from one address, so that it leaves room for others."""
    max_in_flight: Count = 256
    """How many messages of one connection are worked on at a time."""
    retry_attempts: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How often a server tries again to listen where the port is taken, as NestJS's `retryAttempts`."""
    retry_delay: Seconds = 1
    max_age: Annotated[float, msgspec.Meta(ge=0)] = 600
    """After how long a client takes a new connection, so that calls come to new instances, too; 0 for never."""


class _ServerConnection(FramedConnection):
    """A peer of the server, with the work that it has asked for."""

    def __init__(self, server: TcpServer) -> None:
        options = server.options
        super().__init__(options.max_buffer_size, options.max_send_buffer_size, server.encode)
        self._server = server
        self._options = options
        self._max_in_flight = options.max_in_flight
        self._read = server.reader(codec.decode_packet)
        self._dispatch: Callable[..., asyncio.Task[Any] | None] = server.dispatcher.dispatch
        self._running = 0
        self._awaited: set[asyncio.Task[None]] = set()
        self._half_frame: asyncio.TimerHandle | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._active_at = self._loop.time()
        self._no_more = False
        self.host = self.peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        host, port = (transport.get_extra_info("peername") or ("", 0))[:2]
        self.host, self.peer = str(host), f"{host}:{port}"
        if not self._server.admit(self):
            dropped.add(self._server.dispatcher.service, "tcp", "too-many-connections")
            self.transport.abort()
            return
        self._watch_idleness()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._server.forget(self)
        for timer in (self._half_frame, self._idle):
            if timer is not None:
                timer.cancel()
        for task in list(self._awaited):
            task.cancel()  # nobody is left to answer; an event goes on

    def pause_writing(self) -> None:
        super().pause_writing()
        self.busy = True  # who does not take its answers asks nothing more; a client reads on, or both would wait

    def eof_received(self) -> bool:
        # A peer that only closed its writing side still gets what it asked for.
        self._no_more = self.busy = True
        return bool(self._awaited)

    def data_received(self, data: bytes) -> None:
        self._active_at = self._loop.time()
        super().data_received(data)

    def pump(self) -> None:
        super().pump()
        waiting = self._frames.partial and not self.busy and not self._held
        if not waiting and self._half_frame is not None:
            self._half_frame.cancel()
            self._half_frame = None
        elif waiting and self._half_frame is None and not self.transport.is_closing():
            seconds = self._options.incomplete_message_timeout
            self._half_frame = self._loop.call_later(seconds, self._half_frame_is_late)

    def take(self, body: bytes) -> None:
        if self._half_frame is not None:  # its time counts from the frame's first byte
            self._half_frame.cancel()
            self._half_frame = None
        try:
            packet = self._read(body)
        except PacketError:
            dropped.add(self._server.dispatcher.service, "tcp", "no-packet")
            return
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FrameError(f"Could not parse JSON: {error}") from error
        task = self._dispatch(packet, self.put, transport="tcp", peer=self.peer, native=self.transport)
        if task is not None:
            self._server.tasks.add(task)
            self._running += 1
            if self._running >= self._max_in_flight:
                self.busy = True
            if packet.id is not UNSET:
                self._awaited.add(task)
            task.add_done_callback(self._done)

    def refuse(self, error: Exception) -> None:
        logger.warning("Invalid message from tcp peer %s: %s", self.peer, error)
        dropped.add(self._server.dispatcher.service, "tcp", "bad-frame")
        self.flush()
        self.transport.close()

    def resume_writing(self) -> None:
        self._active_at = self._loop.time()
        super().resume_writing()

    def turn_away(self) -> None:
        """Begin nothing more: whoever asks is told so, and may ask elsewhere. What runs is still answered."""
        self._dispatch = self._refuse

    def _refuse(self, packet: Packet, reply: Replier, **facts: Any) -> asyncio.Task[Any] | None:
        if packet.id is UNSET:
            return self._server.dispatcher.dispatch(packet, reply, **facts)  # an event's sender hears nothing
        dropped.add(self._server.dispatcher.service, "tcp", "draining")
        reply(Response(err=Draining(self._server.dispatcher.service).to_wire(), is_disposed=True, id=packet.id))
        return None

    def is_busy(self) -> bool:
        return self._no_more or self._writable is not None or self._running >= self._max_in_flight

    def _done(self, task: asyncio.Task[None]) -> None:
        self._server.ended(task)
        self._running -= 1
        self.busy = self.is_busy()
        self._awaited.discard(task)
        self._active_at = self._loop.time()
        if self._no_more and not self._awaited:
            self.flush()
            if not self._server.closing:
                self.transport.close()
        elif self._held:
            self.pump()

    def _half_frame_is_late(self) -> None:
        self.refuse(FrameError("The rest of a packet did not come in time."))

    def _watch_idleness(self) -> None:
        idle_for = self._loop.time() - self._active_at
        left = self._options.idle_timeout - idle_for
        # Work keeps a connection, but not for a peer that takes none of its answers.
        if left > 0 or (self._running and self._writable is None):
            self._idle = self._loop.call_later(max(left, 1), self._watch_idleness)
        else:
            self.transport.abort()  # closed, it would wait for a peer that does not take what is left


class TcpServer(Server):
    """Listens for NestJS clients and our own."""

    scheme = "tcp"
    Options = Options

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self.closing = False
        self._server: asyncio.Server | None = None
        self._connections: set[_ServerConnection] = set()
        self._by_host: Counter[str] = Counter()
        self._empty = asyncio.Event()

    async def listen(self) -> None:
        context = self.options.server_context() if self.address.scheme == "tcps" else None
        self.status = Status.CONNECTING
        for attempts_left in reversed(range(self.options.retry_attempts + 1)):
            try:
                await self._bind(context)
                return
            except OSError:
                if not attempts_left:
                    self.status = Status.DISCONNECTED
                    raise
                await asyncio.sleep(self.options.retry_delay)

    async def close(self, grace: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        self.closing = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.turn_away()
        await self.finish(grace)
        if self._connections and grace:
            # For those who ask in this moment: a connection that ends under a request leaves its fate unknown.
            await asyncio.sleep(min(_PARTING, end - loop.time()))
        for connection in list(self._connections):
            connection.flush()
            connection.transport.close()  # when it has sent what it holds
        with suppress(TimeoutError):
            async with asyncio.timeout_at(max(end, loop.time() + 0.1)):
                while self._connections:
                    self._empty.clear()
                    await self._empty.wait()
        for connection in list(self._connections):
            connection.transport.abort()
        self.status = Status.CLOSED

    def unwrap(self) -> asyncio.Server | None:
        return self._server

    async def _bind(self, context: ssl.SSLContext | None) -> None:
        held = sockets.inherited(f"{self.dispatcher.service} {self.address}")
        where: dict[str, Any] = {"sock": held} if held else {"host": self.address.host, "port": self.address.port}
        self._server = await asyncio.get_running_loop().create_server(
            partial(_ServerConnection, self),
            **where,
            backlog=1024,
            ssl=context,
            ssl_handshake_timeout=self.options.incomplete_message_timeout if context else None,
        )
        self.status = Status.CONNECTED

    @property
    def bounds(self) -> list[Bound]:
        options, connections = self.options, len(self._connections)
        return [
            # In all: each connection has its own.
            Bound("tcp", len(self.tasks), options.max_in_flight * max(1, connections)),
            Bound("tcp-connections", connections, options.max_connections),
        ]

    @property
    def port(self) -> int:
        """The port that it really listens on; 0 while it does not."""
        sockets = self._server.sockets if self._server is not None else ()
        return int(sockets[0].getsockname()[1]) if sockets else 0

    def admit(self, connection: _ServerConnection) -> bool:
        """Count a connection in, if there is room for it."""
        host, options = connection.host, self.options
        if len(self._connections) >= options.max_connections or self._by_host[host] >= options.max_connections_per_peer:
            return False
        self._connections.add(connection)
        self._by_host[host] += 1
        return True

    def forget(self, connection: _ServerConnection) -> None:
        """Count a connection out."""
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self._by_host[connection.host] -= 1
        if not self._by_host[connection.host]:
            del self._by_host[connection.host]
        self._empty.set()


class _ClientConnection(FramedConnection):
    """The client's connection to its server."""

    def __init__(self, client: TcpClient) -> None:
        super().__init__(client.options.max_buffer_size, client.options.max_send_buffer_size, client.encode)
        self._client = client
        self._read = client.reader(codec.decode_reply)
        self._why: Exception | None = None
        self._ends: select.poll | None = None
        self._age: asyncio.TimerHandle | None = None
        self.owed: set[str] = set()
        """The calls that an aged connection still has to answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        native = transport.get_extra_info("socket")
        if _RDHUP and native is not None:
            self._ends = select.poll()
            self._ends.register(native.fileno(), _RDHUP)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._ends = None
        if self._age is not None:
            self._age.cancel()
        self._client.ended(self, self._why or error)

    @property
    def gone(self) -> bool:
        """Whether the peer has hung up, even where the loop has had no time yet to tell."""
        return self._ends is not None and bool(self._ends.poll(0))

    def grow_old(self, seconds: float) -> None:
        """Let the client take a new connection after so many seconds, more or less: not all at once."""
        seconds *= random.uniform(0.8, 1.2)  # noqa: S311 - only to spread them
        self._age = self._loop.call_later(seconds, self._client.renew, self)

    def retire(self, owed: set[str]) -> None:
        """Close as soon as these calls have ended."""
        self.owed = owed
        self._see_to_end()

    def _see_to_end(self) -> None:
        self.owed &= self._client.waiting
        if self.owed:
            self._age = self._loop.call_later(_LOOK, self._see_to_end)
        else:
            self.transport.close()

    def take(self, body: bytes) -> None:
        try:
            reply = self._read(body)
        except (PacketError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FrameError(f"Could not parse JSON: {error}") from error
        full = self._client.receive(reply)
        if reply.err:
            self._client.heard(reply.err, self)
        if full is not None and not self.busy:
            self.busy = True
            full.add_done_callback(self._has_room)

    def refuse(self, error: Exception) -> None:
        self._why = error
        self.transport.abort()

    def _has_room(self, _: asyncio.Future[None]) -> None:
        self.busy = False
        self.pump()


class TcpClient(ClientProxy):
    """Calls a NestJS service or one of ours; connects when first used, again after a loss, and anew in time."""

    scheme = "tcp"
    Options = Options
    ages: ClassVar[bool] = True

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._connection: _ClientConnection | None = None
        self._aged: set[_ClientConnection] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._streams: set[_StreamClient] = set()

    def ready(self) -> bool:
        connection = self._connection
        if connection is None:
            return False
        # With answers to come, it would have told; only what has been idle may have ended unseen.
        if not self._pending and connection.gone:
            connection.transport.abort()
            self.ended(connection, None)
            return False
        return self.status is Status.CONNECTED and connection.congestion() is None

    def congestion(self) -> asyncio.Future[None] | None:
        return None if self._connection is None else self._connection.congestion()

    async def open(self) -> None:
        self._connection = await self._new_connection()

    async def disconnect(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        for connection in (*self._aged, *([self._connection] if self._connection else [])):
            connection.flush()
            connection.transport.close()

    async def _new_connection(self) -> _ClientConnection:
        context = self.options.client_context() if self.address.scheme == "tcps" else None
        _, connection = await asyncio.get_running_loop().create_connection(
            partial(_ClientConnection, self),
            self.address.host,
            self.address.port,
            ssl=context,
            server_hostname=(self.options.server_name or self.address.host) if context else None,
        )
        if self.ages and self.options.max_age:
            connection.grow_old(self.options.max_age)
        return connection

    def renew(self, connection: _ClientConnection) -> None:
        """Take a new connection in place of one that is old."""
        if connection is self._connection and (self._renewing is None or self._renewing.done()):
            self._renewing = self._loop.create_task(self._replace(connection), context=Context())

    async def _replace(self, old: _ClientConnection) -> None:
        try:
            async with asyncio.timeout(self.options.connect_timeout):
                new = await self._new_connection()
        except (OSError, TimeoutError) as error:
            logger.info("%s keeps its connection to %s: %s", self.service, self.address, error or "no answer in time")
            old.grow_old(self.options.connect_timeout)
            return
        if self._connection is not old:  # it was lost meanwhile, and whoever called has taken another
            new.transport.abort()
            return
        self._connection = new
        self._aged.add(old)
        old.retire(set(self._pending))

    @property
    def waiting(self) -> Set[str]:
        """The ids of the calls that wait for an answer."""
        return self._pending.keys()

    def publish(self, request: Request, context: RpcContext) -> None:
        self._hand_over(request)

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        # NestJS sends an event's pattern as its route.
        connection = self._hand_over(Event(context.pattern, event.data, event.metadata))
        connection.flush()
        congestion = connection.congestion()
        if congestion is not None:
            await asyncio.shield(congestion)
        if connection is not self._connection:
            raise ConnectionLost()

    async def stream(self, data: Any, context: RpcContext) -> AsyncGenerator[Raw]:
        # A connection of its own: a slow reader holds up nobody else, and closing it is the only
        # way to tell a NestJS server that nobody reads any more.
        if self.status is Status.CLOSED:
            raise Unavailable(f"The client of {self.service} is closed.", code="closed")
        private = _StreamClient(self.address, self.service)
        self._streams.add(private)
        try:
            async with aclosing(ClientProxy.stream(private, data, context)) as values:
                async for value in values:
                    yield value
        finally:
            self._streams.discard(private)
            await private.close()

    async def close(self) -> None:
        await super().close()
        for private in list(self._streams):
            await private.close()

    def unwrap(self) -> asyncio.Transport | None:
        return self._connection.transport if self._connection is not None else None

    def heard(self, err: Any, connection: _ClientConnection) -> None:
        """Ask nothing more of a peer that is about to end: the next call takes a new connection."""
        if connection is self._connection and isinstance(err, dict) and err.get("code") == "draining":
            self._connection = None
            self.status = Status.DISCONNECTED
            self._aged.add(connection)
            connection.retire(set(self._pending))

    def ended(self, connection: _ClientConnection, error: Exception | None) -> None:
        """Take note that a connection is gone."""
        reason = f"Connection closed: {error}" if error else "Connection closed"
        if connection is self._connection:
            self._connection = None
            owed = {id: call for aged in self._aged for id in aged.owed if (call := self._pending.pop(id, None))}
            self.lost(reason)
            self._pending |= owed
        elif connection in self._aged:
            self._aged.discard(connection)
            for id in connection.owed:
                self.fail(id, ConnectionLost(reason))

    def _hand_over(self, packet: Request | Event) -> _ClientConnection:
        connection = self._connection
        if connection is None or connection.transport.is_closing():
            raise Unavailable(f"{self.service} closed the connection before the call was sent.")
        connection.put(packet)
        return connection


class _StreamClient(TcpClient):
    """The connection of one stream."""

    ages = False

    def abandon(self, id: str) -> None:
        # A plain end is what a peer sends that still wants its answers; a reset stops the work.
        if self._connection is not None:
            transport = self._connection.transport
            native = transport.get_extra_info("socket")
            native.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()

    async def close(self) -> None:
        for id in self._pending:
            self.abandon(id)
        await super().close()
