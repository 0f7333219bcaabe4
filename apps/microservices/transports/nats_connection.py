"""One connection to NATS: nats-py's client, tamed.

Its own reconnecting is off: meanwhile it would keep messages that nobody has promised to deliver.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import Any, TypeVar, cast

from nats.aio.client import Client as Driver
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import BadHeaderError, Error, SecureConnWantedError, SlowConsumerError

from ..exceptions import ConnectionLost, RpcException, Unavailable
from . import Address, Count
from .tls import TlsOptions

T = TypeVar("T")
Message = Msg
Slow = Callable[[str], None]
"""Told the subject of a message that the driver had no room for."""

logger = logging.getLogger("microservices.nats")

_PING = 5  # seconds; a peer that has vanished without a word counts as lost after three of them
_FAREWELL = 1.0
_MAX_UNSENT = 1024 * 1024
_MAX_WAITING_BYTES = 64 * 1024 * 1024
_MAX_SUBJECT = 2048  # bytes: NATS ends a connection that sends a longer line than 4096
_MOST_DENIED = 4096
# What ends a word for NATS or for the driver, and half characters.
_BLANK = r" \t\r\n\f\v\ud800-\udfff"
_LITERAL = re.compile(rf"[^.{_BLANK}]+(\.[^.{_BLANK}]+)*")
_SUBJECT = re.compile(rf"((\*|[^.*>{_BLANK}]+)\.)*(\*|>|[^.*>{_BLANK}]+)")
_DENIED = re.compile(r'(?:publish|subscription) to "((?:[^"\\]|\\.)*)"')


class NatsOptions(TlsOptions, frozen=True, kw_only=True):
    """What any URL may set beside TLS, which one of its files or names asks for."""

    inbox_prefix: str = "_INBOX"
    max_waiting: Count = 10_000
    """How many messages of a route may wait here; more are dropped, and counted."""

    def __post_init__(self) -> None:
        if not is_literal(self.inbox_prefix) or set(self.inbox_prefix) & {"*", ">"}:
            raise ValueError(f"{self.inbox_prefix!r} cannot start the name of an inbox")
        if self.encrypts:
            self.client_context()  # which tells at once what is wrong with the files

    @property
    def encrypts(self) -> bool:
        """Whether TLS is asked for."""
        return bool(self.certfile or self.cafile or self.server_name)

    def inbox(self) -> str:
        """Return a subject that nobody else has."""
        return f"{self.inbox_prefix}.{os.urandom(11).hex()}"


class NatsConnection(Driver):
    """nats-py's client of one connection, which is not opened again."""

    ended: asyncio.Future[None]
    """Done when the connection is lost or closed."""

    def __init__(self, address: Address, on_slow: Slow, encrypts: bool) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self.where = f"NATS at {address}"
        self.denied: Counter[str] = Counter()
        """How often NATS refused a subject; it tells these in lower case."""
        self._on_slow = on_slow
        self._encrypts = encrypts
        self._connecting = True
        self._heard: list[Subscription] = []
        self._taking: asyncio.Task[None] | None = None

    async def open(self, place: str, **options: Any) -> None:
        """Connect once. Raises nats.errors.Error, OSError or TimeoutError."""
        work = self.connect(
            f"nats://{place}",
            error_cb=self._complain,
            allow_reconnect=False,
            ping_interval=_PING,
            pending_size=0,  # no bound of its own: who publishes waits earlier, where it can be cancelled
            skip_subject_validation=True,  # done already
            **options,
        )
        # In a task of its own, since the driver may swallow a cancellation, as `wait_for` of Python 3.11 does.
        connecting = self._loop.create_task(work, context=Context())
        try:
            await asyncio.wait([connecting])
            connecting.result()
        except BaseException:
            connecting.cancel()
            await asyncio.wait([connecting], timeout=_FAREWELL)
            self._connecting = False
            await self.end()
            raise
        self._connecting = False
        # It ends sooner than the driver tells, which waits for a peer that may have vanished.
        self.ended = cast("asyncio.Task[None]", self._reading_task)

    async def end(self) -> None:
        """Send what is left and disconnect, within a second."""
        if not self.is_connected:
            self._abort()
        closing = self._loop.create_task(self.close(), context=Context())
        await asyncio.wait([closing], timeout=_FAREWELL)
        self._abort()
        closing.cancel()
        await asyncio.wait([closing])
        for waiting in [*self._resp_map.values()]:
            waiting.cancel()  # no answer comes any more

    def _abort(self) -> None:
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def until_ended(self) -> str:
        """Return why, when the connection is lost or closed."""
        await asyncio.wait([self.ended])
        return f"the connection was lost{f': {_reason(self.last_error)}' if self.last_error else ''}"

    # Messages

    async def hear(
        self, subject: str, take: Callable[[Message], Awaitable[None]], limit: int, *, queue: str = ""
    ) -> None:
        """Have the messages of a subject taken one after another. Raises ConnectionLost."""
        with self._translated():
            heard = await self.subscribe(
                subject, queue, cb=take, pending_msgs_limit=limit, pending_bytes_limit=_MAX_WAITING_BYTES
            )
        self._heard.append(heard)

    async def hear_no_more(self) -> None:
        """Have no new messages come; return when those that are here are taken."""
        draining = [self._loop.create_task(each._drain()) for each in self._heard]
        try:
            if draining:
                await asyncio.wait(draining)
        finally:
            for task in draining:
                task.cancel()
            await asyncio.gather(*draining, return_exceptions=True)

    async def put(self, subject: str, body: bytes, reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Publish a message, with the others of this turn of the loop. Raises RpcException."""
        self.check_size(body, headers)
        with self._translated():
            await self.publish(subject, body, reply, headers or None)

    def post(self, subject: str, body: bytes) -> asyncio.Future[None] | None:
        """Publish a message whose fate nobody asks for; gives what to await while NATS takes too little.

        Raises ValueError for one that is too large.
        """
        if len(body) > self.max_payload:
            raise ValueError(f"a message of {len(body)} bytes, where NATS takes {self.max_payload}")
        # A coroutine that does not wait; and where the connection is lost, there is nobody to tell.
        with suppress(StopIteration, Error):
            self.publish(subject, body).send(None)
        return self.congestion()

    def congestion(self) -> asyncio.Future[None] | None:
        """What to await while NATS takes too little."""
        if self.pending_data_size <= _MAX_UNSENT or self.ended.done():
            return None
        if self._taking is None or self._taking.done():
            self._taking = self._loop.create_task(self._until_taken(), context=Context())
        return asyncio.shield(self._taking)

    async def taken(self) -> None:
        """Return when NATS has taken all that was published before. Raises ConnectionLost."""
        await self._answered(await self.ping())

    async def ping(self) -> asyncio.Future[Any]:
        """Return what is done when NATS has taken all that was published before, unless the connection is lost."""
        pong: asyncio.Future[Any] = self._loop.create_future()
        await self._send_ping(pong)
        return pong

    async def _until_taken(self) -> None:
        with suppress(ConnectionLost):
            await self.taken()

    async def _answered(self, waiting: asyncio.Future[T]) -> T:
        either: list[asyncio.Future[Any]] = [waiting, self.ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ConnectionLost("The connection to NATS was lost.")
        return waiting.result()

    def check_size(self, body: bytes, headers: Mapping[str, str] | None) -> None:
        """Raise RpcException for a message that is too large."""
        size = len(body) + size_of(headers or {})
        if size > self.max_payload:
            # NATS would end the connection under all other calls.
            too_large = f"The message has {size} bytes; this NATS takes {self.max_payload}."
            raise RpcException({"statusCode": 413, "code": "too-large", "message": too_large})

    async def ask(self, work: Coroutine[Any, Any, T], failed: str = "") -> T:
        """Await something of the driver's that needs an answer. Raises Unavailable, which says what has failed."""
        task = self._loop.create_task(work)
        task.add_done_callback(_seen)
        try:
            with self._translated(failed):
                return await self._answered(task)
        finally:
            task.cancel()

    # The driver's ways

    @contextmanager
    def _translated(self, failed: str = "") -> Iterator[None]:
        try:
            yield
        except (BadHeaderError, UnicodeEncodeError) as error:
            raise RpcException({"statusCode": 400, "code": "bad-header", "message": f"{error}."}) from error
        except Error as error:
            kind = ConnectionLost if self.ended.done() else Unavailable
            raise kind(f"{failed or self.where}: {_reason(error)}.") from error

    async def _complain(self, error: Exception) -> None:
        if self._connecting:
            raise error  # else the driver would go round its servers
        if isinstance(error, SlowConsumerError):
            self._on_slow(error.subject)
        elif (denied := _DENIED.search(str(error))) is not None:
            subject = re.sub(r"\\(.)", r"\1", denied[1])
            if len(self.denied) < _MOST_DENIED:  # peers choose where they want their answers
                self.denied[subject] += 1
                if self.denied[subject] == 1:
                    logger.error("NATS does not allow it: %s", _reason(error))
        elif not isinstance(error, OSError | Error):
            logger.error("a message from NATS was stumbled over", exc_info=error)

    # What follows overrides the driver's own, which has no doors for it.

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        # In its turn: the driver's own overtakes what waits to be written, and so would tell nothing of it.
        self._pongs.append(future or self._loop.create_future())
        await self._send_command(b"PING\r\n")
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():  # who asked has gone, over which the driver stumbles
            self._pongs[0] = self._loop.create_future()
        await super()._process_pong()

    def _connect_command(self) -> bytes:
        # Credentials come next. The driver encrypts only if the other side says that it must.
        if self._encrypts and not self._server_info.get("tls_required"):
            raise SecureConnWantedError
        return super()._connect_command()

    def _build_message(self, *facts: Any) -> Msg | None:
        message: Msg | None = None
        with suppress(UnicodeDecodeError):  # raised in the driver, it would end its reading for good
            message = super()._build_message(*facts)
        return message


async def open_connection(address: Address, options: NatsOptions, name: str, on_slow: Slow) -> NatsConnection:
    """Connect to the first host that answers. Raises Unavailable, naming NATS and the reason."""
    user, password = address.username, address.password
    told: dict[str, Any] = {"user": user, "password": password} if password else {"token": user or None}
    if options.encrypts:
        told |= {"tls": options.client_context(), "tls_hostname": options.server_name or None}
    timeout = options.connect_timeout / len(address.hosts)
    failure = ""
    for host, port in address.hosts:
        place = address._replace(host=host, port=port).place
        connection = NatsConnection(address, on_slow, options.encrypts)
        try:
            async with asyncio.timeout(timeout):
                await connection.open(
                    place, name=name, connect_timeout=timeout, inbox_prefix=options.inbox_prefix, **told
                )
        except TimeoutError:
            failure = f"no connection within {timeout:g} s"
        except (Error, OSError) as error:
            failure = _reason(error)
        else:
            return connection
    raise Unavailable(f"NATS cannot be reached at {address}: {failure}.")


def is_literal(text: str) -> bool:
    """Return whether a message can be published to it."""
    return bool(_LITERAL.fullmatch(text)) and len(text.encode()) <= _MAX_SUBJECT


def is_subject(text: str) -> bool:
    """Return whether NATS can be subscribed to it: `*` and `>` only as whole words."""
    return bool(_SUBJECT.fullmatch(text)) and is_literal(text)


def size_of(headers: Mapping[str, str]) -> int:
    """Return how many bytes these headers take."""
    lines = sum(len(name) + len(value.encode("utf-8", "replace")) + 4 for name, value in headers.items())
    return lines + 14 if headers else 0


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # also where nobody waits for it any more


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or getattr(error, "description", None) or str(error) or repr(error)
    return text.removeprefix("nats: ").strip("'").rstrip(".")
