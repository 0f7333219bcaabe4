"""One connection to NATS: lines of text, messages out in batches, messages in from one buffer."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from ..context import NO_HEADERS
from ..exceptions import ConnectionLost, RpcException, Unavailable
from .flow import FlowProtocol

logger = logging.getLogger("microservices.nats")

_PING, _PONG = b"PING\r\n", b"PONG\r\n"
_END = b"\r\n"
_HEADER = "NATS/1.0"
_EVERY = 5  # seconds between two pings; a peer that has vanished without a word counts as lost after three of them
_FAREWELL = 1.0
_MAX_UNSENT = 1024 * 1024
_MAX_LINE = 64 * 1024
_MAX_MESSAGE = 64 * 1024 * 1024  # more than NATS lets anybody configure
_LARGE = 64 * 1024
_MOST_DENIED = 4096
_DENIED = re.compile(r'(?:Publish|Subscription) to "((?:[^"\\]|\\.)*)"')
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BREAKS = str.maketrans("\r\n", "  ")


class Info(msgspec.Struct):
    """What NATS tells of itself."""

    max_payload: int = 1024 * 1024
    headers: bool = False
    tls_required: bool = False
    tls_available: bool = False


class Message(msgspec.Struct, eq=False, gc=False):
    """What was published to a subject; `reply` is where an answer is awaited, if one is."""

    subject: str
    reply: str
    data: bytes
    head: bytes = b""
    """The headers as they have come."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, of which there are seldom any."""
        return read_headers(self.head) if self.head else NO_HEADERS

    @property
    def status(self) -> str:
        """What NATS itself has to say, as `503` where nobody listens; empty in messages of others."""
        return self.head[len(_HEADER) : self.head.find(_END)].decode("utf-8", "replace").strip()


Take = Callable[[Message], None]


class NatsConnection(FlowProtocol):
    """Speaks NATS; it is not opened again."""

    def __init__(self, where: str, inbox: str) -> None:
        super().__init__()
        self.where = where
        self.info = Info()
        self.reason = ""
        """Why it has ended, where that is known."""
        self.denied: Counter[str] = Counter()
        """How often NATS refused a subject."""
        self.greeted: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the connection is lost or closed."""
        self._unread: list[bytes] = []
        self._missing = 0
        self._takes: dict[str, Take] = {}
        self._asked: asyncio.Future[None] | None = None
        self._pongs: deque[asyncio.Future[None]] = deque()
        self._inbox = inbox
        self._requests: dict[str, asyncio.Future[Message]] = {}
        self._count = 0
        self._heard = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_MAX_UNSENT)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.reason = self.reason or str(error or "")
        self.ended.set_result(None)
        waiting = [self.greeted, self._asked, *self._pongs, *self._requests.values()]
        for future in waiting:
            self._fail(future)
        self._pongs.clear()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._missing -= len(data)
        if self._unread or self._held:
            self._unread.append(data)
            if self._missing <= 0:
                self.read_on()
        else:
            self._read(data)

    def read_on(self) -> None:
        if not self._held:
            data = b"".join(self._unread)
            self._unread.clear()
            self._read(data)

    def flush(self) -> None:
        if self._asked is not None:
            self._pongs.append(self._asked)
            self._asked = None
            self._out.append(_PING)
        super().flush()

    # Coming and going

    async def encrypt(self, context: ssl.SSLContext, name: str) -> None:
        """Go on under TLS. Raises OSError where the other side is not who it should be."""
        self._unread.clear()  # whoever said more in the clear was not asked
        transport = await self._loop.start_tls(self.transport, self, context, server_hostname=name)
        if transport is None:
            raise ConnectionLost(self.gone)
        self.transport = transport
        self.transport.set_write_buffer_limits(high=_MAX_UNSENT)

    async def introduce(self, **facts: Any) -> None:
        """Tell who we are; return when NATS takes messages. Raises ConnectionLost where it refuses."""
        told = {"verbose": False, "pedantic": False, "lang": "python", "version": "1", "protocol": 1, "echo": True}
        told |= {"headers": self.info.headers, "no_responders": self.info.headers, **facts}
        self.write(b"CONNECT %b\r\n" % msgspec.json.encode(told))
        self._timer = self._loop.call_later(_EVERY, self._beat)
        await self.taken()

    async def close(self) -> None:
        """Send what is left and disconnect, within a second."""
        self.flush()
        self.transport.close()
        # A NATS that takes nothing would keep the connection for ever.
        await asyncio.wait([self.ended], timeout=_FAREWELL)
        self.transport.abort()

    def fail(self, reason: str) -> None:
        """End it at once, for a reason."""
        self.reason = self.reason or reason
        self.transport.abort()

    async def until_ended(self) -> str:
        """Return why, when the connection is lost or closed."""
        await asyncio.wait([self.ended])
        return f"the connection was lost{f': {self.reason}' if self.reason else ''}"

    # Messages

    def hear(self, subject: str, take: Take, *, queue: str = "") -> None:
        """Have the messages of a subject taken, those of a queue group together with its others."""
        self._count += 1
        id = str(self._count)
        self._takes[id] = take
        self.write(f"SUB {subject} {f'{queue} ' if queue else ''}{id}\r\n".encode())

    async def hear_no_more(self) -> None:
        """Have no new messages come; return when those that are on their way are taken. Raises ConnectionLost."""
        heard = [id for id, take in self._takes.items() if take != self._answered]
        self.write(*(f"UNSUB {id}\r\n".encode() for id in heard))
        try:
            await self.taken()
        finally:
            for id in heard:
                self._takes.pop(id, None)

    def put(self, subject: str, body: bytes, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Publish a message, with the others of this turn of the loop. Raises RpcException."""
        head = write_headers(headers) if headers else b""
        size = len(head) + len(body)
        if size > self.info.max_payload:
            # NATS would end the connection under all other calls.
            too_large = f"The message has {size} bytes; this NATS takes {self.info.max_payload}."
            raise RpcException({"statusCode": 413, "code": "too-large", "message": too_large})
        if self.ended.done():
            raise ConnectionLost(self.gone)
        target = (f"{subject} {reply}" if reply else subject).encode()
        if not head:
            self.write(b"PUB %b %d\r\n%b\r\n" % (target, size, body))
        elif self.info.headers:
            self.write(b"HPUB %b %d %d\r\n%b%b\r\n" % (target, len(head), size, head, body))
        else:
            raise _bad_header("this NATS takes none")
        if size > _LARGE:
            self.flush()  # so that who comes next sees how much waits

    def post(self, subject: str, body: bytes) -> asyncio.Future[None] | None:
        """Publish a message whose fate nobody asks for; gives what to await while NATS takes too little.

        Raises ValueError for one that is too large.
        """
        size = len(body)
        if size > self.info.max_payload:
            raise ValueError(f"a message of {size} bytes, where NATS takes {self.info.max_payload}")
        if not self.ended.done():
            self.write(b"PUB %b %d\r\n%b\r\n" % (subject.encode(), size, body))
            if size > _LARGE:
                self.flush()
        return None if self._writable is None else asyncio.shield(self._writable)

    async def request(
        self, subject: str, body: bytes, patience: float, headers: Mapping[str, str] | None = None
    ) -> Message:
        """Return the answer to a message. Raises RpcException: Unavailable after `patience` seconds without one."""
        if self._answered not in self._takes.values():
            self.hear(f"{self._inbox}.*", self._answered)
        self._count += 1
        reply = f"{self._inbox}.{self._count}"
        answer: asyncio.Future[Message] = self._loop.create_future()
        self._requests[reply] = answer
        try:
            self.put(subject, body, reply, headers)
            async with asyncio.timeout(patience):
                return await answer
        except TimeoutError:
            raise Unavailable(f"{self.where} gave no answer within {patience:g} s.") from None
        finally:
            del self._requests[reply]

    async def taken(self) -> None:
        """Return when NATS has taken all that was published before. Raises ConnectionLost."""
        await asyncio.shield(self.ping())

    def ping(self) -> asyncio.Future[None]:
        """Return what is done when NATS has taken all that was published before; all who ask in a turn share it."""
        if self._asked is None:
            asked: asyncio.Future[None] = self._loop.create_future()
            if self.ended.done():
                self._fail(asked)
                return asked
            self._asked = asked
            self.write()
        return self._asked

    # Inside

    def _read(self, data: bytes) -> None:
        # One loop, and no calls of our own in it: what each message costs is spent here.
        position, size, line = 0, len(data), b""
        find, takes = data.find, self._takes
        self._missing = 0
        try:
            while not self._held and (end := find(_END, position)) >= 0:
                line, start = data[position:end], end + 2
                try:
                    words = line.decode().split(" ")
                except UnicodeDecodeError:  # a foreign name
                    words = line.decode("utf-8", "replace").split(" ")
                kind, middle = words[0], 0
                if kind == "HMSG":
                    middle = int(words.pop(-2))
                elif kind != "MSG":
                    position = start
                    self._control(kind, line)
                    continue
                if len(words) == 5:
                    _, subject, id, reply, told = words
                else:
                    (_, subject, id, told), reply = words, ""
                length = int(told)
                if not 0 <= middle <= length <= _MAX_MESSAGE:
                    raise ValueError("no size")
                stop = start + length
                if stop + 2 > size:
                    self._missing = stop + 2 - size
                    break
                if not data.startswith(_END, stop):
                    raise ValueError("no end")
                position = stop + 2
                if (take := takes.get(id)) is None:
                    continue
                head = data[start : start + middle] if middle else b""
                try:
                    take(Message(subject, reply, data[start + middle : stop], head))
                except Exception:
                    logger.exception("a message from NATS was stumbled over")
            if size - position > _MAX_LINE and not self._missing and not self._held:
                raise ValueError("no line")
        except (ValueError, IndexError, msgspec.MsgspecError):
            self.fail(f"it said what is no word of NATS: {line[:100]!r}")
            return
        if position < size:
            self._unread.append(data[position:])

    def _control(self, kind: str, line: bytes) -> None:
        match kind:
            case "PING":
                self.write(_PONG)
            case "PONG":
                if self._pongs and not (pong := self._pongs.popleft()).done():
                    pong.set_result(None)
            case "INFO":
                self.info = msgspec.json.decode(line[5:], type=Info)
                if not self.greeted.done():
                    self.greeted.set_result(None)
            case "-ERR":
                self._refused(line[5:].decode("utf-8", "replace").strip("'"))
            case "+OK":
                pass
            case _:
                raise ValueError("no word")

    def _refused(self, reason: str) -> None:
        denied = _DENIED.search(reason) if reason.startswith("Permissions Violation") else None
        if denied is None:
            self.fail(reason or "NATS refused something")
            return
        subject = re.sub(r"\\(.)", r"\1", denied[1])
        if subject in self.denied or len(self.denied) < _MOST_DENIED:  # peers choose where they want their answers
            self.denied[subject] += 1
            if self.denied[subject] == 1:
                logger.error("NATS does not allow it: %s", reason)

    def _answered(self, message: Message) -> None:
        answer = self._requests.get(message.subject)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _beat(self) -> None:
        if self._loop.time() - self._heard > 3 * _EVERY:
            self.fail("NATS fell silent")
            return
        self.ping()
        self._timer = self._loop.call_later(_EVERY, self._beat)

    @property
    def gone(self) -> str:
        """What those are told who wait for it when it has ended."""
        return f"The connection to NATS was lost{f': {self.reason}' if self.reason else ''}."

    def _fail(self, future: asyncio.Future[Any] | None) -> None:
        if future is not None and not future.done():
            future.set_exception(ConnectionLost(self.gone))
            future.exception()  # seen, even where nobody waits for it any more


def read_headers(head: bytes) -> dict[str, str]:
    """Return the headers of a message, without what has no name; of several of one name the last."""
    headers = {}
    for line in head.decode("utf-8", "replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon and _NAME.fullmatch(name.strip()):
            headers[name.strip()] = value.strip()
    return headers


def write_headers(headers: Mapping[str, str]) -> bytes:
    """Return what travels for headers, line breaks as blanks. Raises RpcException for what can be none."""
    for name in headers:
        if not _NAME.fullmatch(name):
            raise _bad_header(f"{name!r} cannot name one")
    lines = (f"{name}: {value.strip().translate(_BREAKS)}\r\n" for name, value in headers.items())
    try:
        return f"{_HEADER}\r\n{''.join(lines)}\r\n".encode()
    except UnicodeEncodeError as error:
        raise _bad_header(str(error)) from error


def _bad_header(why: str) -> RpcException:
    return RpcException({"statusCode": 400, "code": "bad-header", "message": f"Headers of NATS: {why}."})
