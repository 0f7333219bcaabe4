"""One connection to Redis: commands out in batches, replies and pushed messages in (RESP3)."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

from ..exceptions import ConnectionLost, RpcException, Unavailable
from . import Address
from .base import ClientProxy
from .flow import FlowProtocol
from .tls import TlsOptions

Push = Callable[[list[Any]], None]

_NOTHING = object()
_MAX_UNSENT = 1024 * 1024
_PUSHED_REPLIES = (b"subscribe", b"unsubscribe", b"psubscribe", b"punsubscribe")
# A peer that has vanished without a word counts as lost after this many seconds.
_SILENCE = 15


class RedisError(RpcException):
    """Redis refused a command."""

    def __init__(self, message: str) -> None:
        super().__init__({"statusCode": 503, "code": "redis", "message": message})


Heard = Callable[[int | RedisError], None]
"""Told how many have got a message, or why nobody has."""


class _Reply:
    """The place of a command in the order of replies; `pushes` is how many messages answer it instead."""

    __slots__ = ("future", "heard", "pushes")

    def __init__(self, future: asyncio.Future[Any] | None, pushes: int = 0, heard: Heard | None = None) -> None:
        self.future = future
        self.pushes = pushes
        self.heard = heard


_UNHEARD = _Reply(None)


class RespConnection(FlowProtocol):
    """Speaks RESP3 with hiredis as the parser; replies come in the order of their commands."""

    def __init__(self, on_push: Push) -> None:
        super().__init__()
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self._on_push = on_push
        self._replies: deque[_Reply] = deque()
        self._channels = [0, 0]  # and patterns of them
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the connection is lost or closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_MAX_UNSENT)
        _notice_silence(transport.get_extra_info("socket"))

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)
        replies, self._replies = self._replies, deque()
        for reply in replies:
            self._fail(reply.future)
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        self.read_on()

    def read_on(self) -> None:
        try:
            while not self._held and (reply := self._reader.gets()) is not _NOTHING:
                if not isinstance(reply, hiredis.PushNotification):
                    self._settle(reply)
                elif reply[0] in _PUSHED_REPLIES:
                    self._count_down()
                else:
                    self._on_push(reply)
        except hiredis.ProtocolError:
            self.transport.abort()

    async def close(self) -> None:
        """Send what is left and disconnect."""
        self.flush()
        self.transport.close()
        # A Redis that takes nothing would keep the connection for ever.
        await asyncio.wait([self.ended], timeout=1)
        self.transport.abort()

    def publish(self, channel: bytes, message: bytes, heard: Heard | None = None) -> None:
        """Publish a message, with the commands of this turn of the loop; `heard` is not called where that is lost."""
        if self.ended.done():
            return
        self._replies.append(_UNHEARD if heard is None else _Reply(None, heard=heard))
        self.write(
            b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(channel), channel, len(message), message)
        )

    def command(self, *parts: bytes, pushes: int = 0) -> asyncio.Future[Any]:
        """Send a command; the future holds its reply, a RedisError or a ConnectionLost.

        `pushes` is how many pushed messages answer it in place of a reply.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        if self.ended.done():
            self._fail(future)
        else:
            self._send(parts, _Reply(future, pushes))
        return future

    def subscribe(self, *channels: bytes, patterns: bool = False) -> asyncio.Future[Any]:
        """Have the messages of some channels pushed, or of `patterns` of them; done when all of them are."""
        self._channels[patterns] += len(channels)
        return self.command(b"PSUBSCRIBE" if patterns else b"SUBSCRIBE", *channels, pushes=len(channels))

    def unsubscribe(self) -> asyncio.Future[Any]:
        """Have no more messages pushed; the future is done when the last one has been."""
        (channels, patterns), self._channels = self._channels, [0, 0]
        if patterns:
            self.command(b"PUNSUBSCRIBE", pushes=patterns)
        return self.command(b"UNSUBSCRIBE", pushes=max(channels, 1))

    def _send(self, parts: tuple[bytes, ...], reply: _Reply) -> None:
        self._replies.append(reply)
        self.write(b"*%d\r\n" % len(parts), *[b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])

    def _settle(self, reply: Any) -> None:
        waiting = self._replies.popleft() if self._replies else _UNHEARD
        if waiting is _UNHEARD:
            return
        error = RedisError(str(reply)) if isinstance(reply, hiredis.ReplyError) else None
        if waiting.heard is not None:
            waiting.heard(reply if error is None else error)
        elif waiting.future is not None and not waiting.future.done():
            if error is None:
                waiting.future.set_result(reply)
            else:
                waiting.future.set_exception(error)

    def _count_down(self) -> None:
        # Redis answers in order here, too, so these messages belong to the command at the head; an error
        # in their place is a plain reply.
        if self._replies and self._replies[0].pushes:
            self._replies[0].pushes -= 1
            if not self._replies[0].pushes:
                self._settle(None)

    @staticmethod
    def _fail(reply: asyncio.Future[Any] | None) -> None:
        if reply is not None and not reply.done():
            reply.set_exception(ConnectionLost("The connection to Redis was lost."))
            reply.exception()  # seen, even where nobody waits for it any more


async def open_connection(address: Address, options: RedisOptions, on_push: Push) -> RespConnection:
    """Connect, authenticate and select. Raises Unavailable, naming Redis and the reason.

    Of several hosts the first that answers is taken; if they are Sentinels, the master that they name.
    """
    failure = Unavailable(f"Redis cannot be reached at {address}.")
    patience = options.connect_timeout / len(address.hosts)
    for host, port in address.hosts:
        place = address._replace(host=host, port=port, others=())
        try:
            if options.sentinel:
                place = await _master(place, options, patience / 2)
            return await _open(place, options, on_push, patience / 2 if options.sentinel else patience)
        except Unavailable as error:
            failure = error
    raise failure


async def _open(address: Address, options: RedisOptions, on_push: Push, patience: float) -> RespConnection:
    context = options.client_context() if address.scheme.startswith("rediss") else None
    connection: RespConnection | None = None
    try:
        async with asyncio.timeout(patience):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: RespConnection(on_push),
                address.host,
                address.port,
                ssl=context,
                server_hostname=(options.server_name or address.host) if context else None,
            )
            auth = (b"AUTH", (address.username or "default").encode(), address.password.encode())
            await connection.command(b"HELLO", b"3", *(auth if address.password else ()))
            if address.path.strip("/"):
                await connection.command(b"SELECT", address.path.strip("/").encode())
    except BaseException as error:
        if connection is not None:
            connection.transport.abort()
        if isinstance(error, TimeoutError):
            raise Unavailable(f"Redis at {address} did not answer within {patience:g} s.") from None
        if isinstance(error, OSError | RpcException):
            reason = getattr(error, "strerror", None) or error
            raise Unavailable(f"Redis cannot be reached at {address}: {reason}.") from error
        raise
    return connection


async def _master(sentinel: Address, options: RedisOptions, patience: float) -> Address:
    # Sentinels have passwords of their own, if any, and no databases.
    connection = await _open(sentinel._replace(path="", username="", password=""), options, ignore, patience)
    try:
        async with asyncio.timeout(patience):
            found = await connection.command(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", options.sentinel.encode())
    except (TimeoutError, RpcException) as error:
        raise Unavailable(f"The Sentinel at {sentinel} did not tell where {options.sentinel} is: {error}") from error
    finally:
        await connection.close()
    if not found:
        raise Unavailable(f"The Sentinel at {sentinel} knows no {options.sentinel}.")
    return sentinel._replace(host=found[0].decode(), port=int(found[1]))


def ignore(push: list[Any]) -> None:
    """Take no notice of a pushed message."""


def _notice_silence(native: socket.socket) -> None:
    native.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": _SILENCE // 3, "TCP_KEEPINTVL": _SILENCE // 3, "TCP_KEEPCNT": 2}
    for name, value in (options | {"TCP_USER_TIMEOUT": _SILENCE * 1000}).items():
        if hasattr(socket, name):  # not every system has them all
            native.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class RedisOptions(TlsOptions, frozen=True, kw_only=True):
    """What the URL of a Redis may set beside TLS."""

    sentinel: str = ""
    """The name of the master, where the URL names Sentinels."""


class RedisProxy(ClientProxy):
    """A client with one connection to Redis, opened when first used and again after a loss."""

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._connection: RespConnection | None = None

    def congestion(self) -> asyncio.Future[None] | None:
        return None if self._connection is None else self._connection.congestion()

    async def open(self) -> None:
        connection = await open_connection(self.address, self.options, self.on_push)
        self._connection = connection
        connection.ended.add_done_callback(self._lost)

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def unwrap(self) -> RespConnection | None:
        return self._connection

    def on_push(self, push: list[Any]) -> None:
        """Take a pushed message."""

    def on_lost(self) -> None:
        """Forget what was known about a connection that is lost."""

    def live(self) -> RespConnection:
        """Return the connection. Raises Unavailable where it is gone."""
        if self._connection is None:
            raise Unavailable("Redis closed the connection before the message was sent.")
        return self._connection

    def _lost(self, _: asyncio.Future[None]) -> None:
        self._connection = None
        self.on_lost()
        self.lost("The connection to Redis was lost.")
