"""All that a transport is: a Server that listens and a ClientProxy that calls."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import Context
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec
from msgspec import UNSET, Raw

from ..codec import UNENCODABLE, Codec, encode, not_json
from ..context import NO_HEADERS, RpcContext
from ..deadlines import Deadlines, Within
from ..dispatcher import Dispatcher, Replier, Route
from ..exceptions import (
    ConfigurationError,
    ConnectionLost,
    DeadlineExceeded,
    RpcException,
    Unavailable,
)
from ..handlers import Delivery
from ..instruments import Bound, dropped
from ..packets import Event, Packet, Reply, Request, Response
from . import Address, Count, Seconds, fill, load_codec, read_options
from .answers import END, Call, Stream

logger = logging.getLogger("microservices.transports")

Encode = Callable[[Request | Event | Response], bytes]
T = TypeVar("T")


class Status(StrEnum):
    """Where a connection stands."""

    DISCONNECTED = "disconnected"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    CLOSED = "closed"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the URL of any transport may set; times in seconds. Each transport adds its own."""

    codec: str = ""
    """The dotted path of a Codec, in place of plain JSON."""
    connect_timeout: Seconds = 5
    max_in_flight: Count = 256
    """How many messages a server works on at a time."""
    max_retry_delay: Seconds = 2
    """The longest pause between two attempts to reach a broker that is away."""


class Peer(ABC):
    """One end of a transport: its address, its options, its state, and how its packets are written."""

    scheme: ClassVar[str]
    Options: ClassVar[type[Options]] = Options

    def __init__(self, address: Address) -> None:
        self.address = address
        self.options: Any = read_options(self.Options, address)
        self.status = Status.DISCONNECTED
        self.url = str(address)
        self._codec: Codec | None = load_codec(self.options.codec) if self.options.codec else None
        self.encode: Encode = encode if self._codec is None else _encoding(self._codec)
        """Returns what travels for a packet. Raises one of `codec.UNENCODABLE` for data without a JSON form."""
        self.decode: Callable[[bytes], bytes] = bytes if self._codec is None else _decoding(self._codec)
        """Returns the JSON of what has come; what the codec cannot read is left as it is, a foreign message."""

    def reader(self, read: Callable[[bytes], T]) -> Callable[[bytes], T]:
        """Return what does `decode` and then `read`; `read` itself where there is no codec."""
        decode = self.decode
        return read if self._codec is None else lambda body: read(decode(body))

    @abstractmethod
    def unwrap(self) -> Any:
        """Return the native object behind it."""


def _encoding(codec: Codec) -> Encode:
    return lambda packet: codec.encode(encode(packet))


def _decoding(codec: Codec) -> Callable[[bytes], bytes]:
    def decode(body: bytes) -> bytes:
        try:
            return codec.decode(body)
        except Exception as error:  # noqa: BLE001 - a peer's bytes, and a project's code
            logger.debug("the codec refused a message: %r", error)
            return body

    return decode


def _checking(encode: Encode) -> Encode:
    def checked(packet: Request | Event | Response) -> bytes:
        try:
            return encode(packet)
        except UNENCODABLE as error:
            raise not_json(error) from error

    return checked


class Server(Peer):
    """Brings packets to a dispatcher and its answers back."""

    opens_port: ClassVar[bool] = True
    """Whether peers connect to it. A broker that is away never makes a process unready."""
    shared: ClassVar[bool] = False
    """Whether several services of a process can stand behind one door of it."""

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address)
        self.dispatcher = dispatcher
        self.hears_events = True
        """Whether events come this way, too."""
        self.tasks: set[asyncio.Task[Any]] = set()
        """What is worked on; closing waits for it."""
        self.cancelled = 0
        """How many of them were not waited for to the end."""
        self._space: asyncio.Future[None] | None = None

    @abstractmethod
    async def listen(self) -> None:
        """Bind or subscribe; return when ready. Raises OSError where that is impossible."""

    @abstractmethod
    async def close(self, grace: float) -> None:
        """Stop taking messages, let running ones finish for `grace` seconds, disconnect."""

    async def join(self, dispatcher: Dispatcher) -> None:
        """Let another service of this process stand behind this door, too; where `shared` says that it can."""
        raise ConfigurationError(f"{self.address} is the door of {self.dispatcher.service} alone.")

    async def announce(self, ready: bool) -> None:
        """Tell peers whether this process takes calls."""

    @property
    def routes(self) -> dict[str, Route]:
        """The routes that come this way."""
        routes = self.dispatcher.routes
        return routes if self.hears_events else {name: route for name, route in routes.items() if route.request}

    def handle(
        self,
        packet: Packet,
        reply: Replier,
        *,
        peer: str,
        channel: str | None = None,
        delivery: Delivery | None = None,
        route: Route | None = None,
        headers: Mapping[str, Any] = NO_HEADERS,
        native: Any = None,
    ) -> asyncio.Task[Any] | None:
        """Hand a packet to the dispatcher, as its `dispatch` tells; returns the task that works on it, if any."""
        task = self.dispatcher.dispatch(
            packet,
            reply,
            transport=self.scheme,
            peer=peer,
            channel=channel,
            delivery=delivery,
            route=route,
            headers=headers,
            native=native,
        )
        return self.keep(task)

    def keep(self, task: asyncio.Task[Any] | None) -> asyncio.Task[Any] | None:
        """Own a task until it ends: closing waits for it."""
        if task is not None:
            self.tasks.add(task)
            task.add_done_callback(self.ended)
        return task

    @property
    def bounds(self) -> list[Bound]:
        """What is worked on, and whatever else of this door has a bound."""
        return [Bound(self.scheme, len(self.tasks), self.options.max_in_flight)]

    @property
    def full(self) -> bool:
        """Whether as many messages are worked on as may be."""
        return bool(len(self.tasks) >= self.options.max_in_flight)

    async def room(self) -> None:
        """Wait until one more message may be worked on."""
        while self.full:
            if self._space is None:
                self._space = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._space)

    def ended(self, task: asyncio.Task[Any]) -> None:
        """Let go of a task; whoever has put it among `tasks` by hand calls it."""
        self.tasks.discard(task)
        if self._space is not None and not self.full:
            space, self._space = self._space, None
            space.set_result(None)

    async def finish(self, grace: float) -> int:
        """Wait for running handlers; cancel and count those that take longer than `grace` seconds.

        Whoever waits for one of those is told so.
        """
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=grace)
        late = list(self.tasks)
        self.cancelled += len(late)
        if late:
            self.dispatcher.draining = True
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=1)
        return len(late)


class BrokerServer(Server):
    """A server that hears from a broker, and goes on trying for as long as that is away."""

    opens_port = False

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self.connected = asyncio.Event()
        """Set while messages come."""
        self._keeping: asyncio.Task[None] | None = None
        self._closing = False

    # What a transport does

    @abstractmethod
    async def subscribe(self) -> None:
        """Connect and subscribe once. Raises RpcException, OSError or TimeoutError where that cannot be."""

    @abstractmethod
    async def until_lost(self) -> str:
        """Return why, when no messages come any more."""

    @abstractmethod
    async def unsubscribe(self) -> None:
        """Take no new messages; those that the broker has handed over are still worked on."""

    @abstractmethod
    async def disconnect(self) -> None:
        """Let go of the connection, whatever became of it."""

    # What it is given

    async def listen(self) -> None:
        """Subscribe; where the broker is away, go on trying in the background."""
        self._keep()
        with suppress(TimeoutError):  # told already, with the reason
            async with asyncio.timeout(self.options.connect_timeout):
                await self.connected.wait()

    async def close(self, grace: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        self._closing = True
        while self._keeping is not None and not self._keeping.done():
            # More than once: a driver may make something else of a cancellation.
            self._keeping.cancel()
            await asyncio.wait([self._keeping], timeout=1)
        if self.connected.is_set():
            with suppress(RpcException, OSError, TimeoutError):
                async with asyncio.timeout(max(grace, 0.1)):
                    await self.unsubscribe()
        await self.finish(end - loop.time())
        await self.disconnect()
        self.connected.clear()
        self.status = Status.CLOSED

    def _keep(self) -> None:
        self._keeping = asyncio.get_running_loop().create_task(self._keep_subscribed(), context=Context())
        self._keeping.add_done_callback(self._kept)

    def _kept(self, task: asyncio.Task[None]) -> None:
        # Only closing may end it. What else does, as a driver that cancels whoever uses it, leaves a service that
        # looks well and hears nothing.
        if self._closing or task.get_loop().is_closed():
            return
        logger.error("%s hears %s no more; it begins again", self.dispatcher.service, self.address)
        self.connected.clear()
        self.status = Status.RECONNECTING
        task.get_loop().call_later(self.options.max_retry_delay, self._begin_again)

    def _begin_again(self) -> None:
        if not self._closing:
            self._keep()

    async def _keep_subscribed(self) -> None:
        self.status = Status.CONNECTING
        delay, told = 0.05, ""
        while not self._closing:
            try:
                await self.subscribe()
                self.status = Status.CONNECTED
                self.connected.set()
                delay, told = 0.05, ""
                reason = await self.until_lost()
            except (RpcException, ConfigurationError, OSError, TimeoutError) as error:
                reason = str(error) or "the broker did not answer in time"
            except Exception as error:
                # It goes on: a server that has ended would be a dead part of a healthy process.
                logger.exception("%s stumbled over %s", self.dispatcher.service, self.address)
                reason = repr(error)
            if self.connected.is_set():
                self.connected.clear()
                self.status = Status.RECONNECTING
            if reason != told:  # once, not with every attempt
                logger.warning("%s does not hear %s: %s", self.dispatcher.service, self.address, reason)
                told = reason
            await self.disconnect()
            await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 - only to spread reconnects
            delay = min(delay * 2, self.options.max_retry_delay)


class Caller(Protocol):
    """What a client needs of whatever calls its service: one transport, or a choice among several instances."""

    service: str
    url: str

    @property
    def scheme(self) -> str: ...
    @property
    def status(self) -> Status: ...
    @property
    def bounds(self) -> list[Bound]: ...
    def read_record(self, options: Mapping[str, Any]) -> Any: ...
    async def send(self, data: Any, context: RpcContext) -> Raw | None: ...
    def stream(self, data: Any, context: RpcContext) -> AsyncGenerator[Raw]: ...
    async def emit(self, data: Any, context: RpcContext) -> None: ...
    async def close(self) -> None: ...
    def unwrap(self) -> Any: ...


class ClientProxy(Peer):
    """Calls one service: keeps the calls that wait for an answer, by id."""

    Record: ClassVar[type[msgspec.Struct] | None] = None
    """What this transport can be told beside a single message: NestJS's record builders."""
    max_pending = 10_000
    max_buffered_values = 1024
    id_bytes = 6

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address)
        self.service = service
        # Here it is the caller's data, and RpcException what he is told.
        self.encode = _checking(self.encode)
        self._opening: asyncio.Task[None] | None = None
        self._failure = ""
        self._was_connected = False
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(self._loop, self._expire)
        self._handing_over = Deadlines(self._loop, Within.expire)
        self._pending: dict[str, Call | Stream] = {}
        self._waiting = 0
        # Unique across processes, so that one id finds a call in the logs of both sides.
        self._prefix = os.urandom(self.id_bytes).hex()
        self._count = 0

    # What a transport does

    async def open(self) -> None:
        """Connect once. Raises Unavailable, OSError or TimeoutError."""

    @abstractmethod
    def publish(self, request: Request, context: RpcContext) -> Awaitable[None] | None:
        """Hand over a request to `context.pattern`, as `context.record` tells. Its answers come by `receive`.

        Gives what to wait for where that takes its time; most are an `async def`.
        """

    @abstractmethod
    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        """Hand over an event; return when that is done, raise Unavailable where it is not."""

    async def disconnect(self) -> None:
        """Let go of the connection, if there is one."""

    def abandon(self, id: str) -> None:
        """Called when nobody waits for this request any more; the protocol has no word for it."""

    def ready(self) -> bool:
        """Return whether a message can be handed over at once, without `connect`."""
        return self.status is Status.CONNECTED and self.congestion() is None

    def congestion(self) -> Awaitable[None] | None:
        """Return what to wait for while the peer takes nothing more; None while it does."""
        return None

    # What every transport is given

    async def connect(self) -> None:
        """Return when a message can be handed over; all who wait share one attempt. Raises Unavailable."""
        if self.status is not Status.CONNECTED:
            if self._opening is None:
                # It belongs to none of those who wait: neither their context nor their cancellation is its own.
                self._opening = self._loop.create_task(self._connect(), context=Context())
            await asyncio.wait([self._opening])
            self._check_connected()
        congestion = self.congestion()
        if congestion is not None:
            await asyncio.shield(congestion)

    def lost(self, reason: str) -> None:
        """Fail all pending calls at once: the connection is gone. The next call connects again."""
        if self.status is not Status.CLOSED:
            self.status = Status.DISCONNECTED
        self.fail_pending(ConnectionLost(reason))

    async def close(self) -> None:
        """Disconnect and fail all pending calls."""
        self.status = Status.CLOSED
        self.fail_pending(Unavailable(f"The client of {self.service} is closed.", code="closed"))
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await self.disconnect()

    def read_record(self, options: Mapping[str, Any]) -> Any:
        """Return the `Record` of one message. Raises ConfigurationError for what this transport has not."""
        if self.Record is None:
            raise ConfigurationError(f"{self.scheme}:// can be told nothing beside a message: {', '.join(options)}.")
        return fill(self.Record, options, f"{self.scheme}://")

    def _check_connected(self) -> None:
        if self.status is Status.CLOSED:
            raise Unavailable(f"The client of {self.service} is closed.", code="closed")
        if self.status is not Status.CONNECTED:
            raise Unavailable(self._failure)

    async def _connect(self) -> None:
        self.status = Status.RECONNECTING if self._was_connected else Status.CONNECTING
        where = f"{self.service} cannot be reached at {self.address}"
        try:
            async with asyncio.timeout(self.options.connect_timeout):
                await self.open()
            self.status = Status.CONNECTED
            self._was_connected = True
        except Unavailable as error:
            self._failure = error.message
        except ConfigurationError as error:
            self._failure = f"{where}: {error}"
        except TimeoutError:
            self._failure = f"{where}: no connection within {self.options.connect_timeout:g} s."
        except (OSError, UnicodeError) as error:  # no name, or one that cannot be a host's
            self._failure = f"{where}: {getattr(error, 'strerror', None) or error}."
        finally:
            if self.status in (Status.CONNECTING, Status.RECONNECTING):
                self.status = Status.DISCONNECTED
            self._opening = None

    async def send(self, data: Any, context: RpcContext) -> Raw | None:
        """Make the request that `context` names and return its first value as JSON; None where there is none.

        Raises RpcException: the handler's error, NoHandler, Unavailable or DeadlineExceeded.
        """
        if not self._usable(context):
            await self._until_ready(context)
        call = Call(self._loop.create_future())
        context.id = id = self._enter(call)
        tick = None if context.deadline is None else self._deadlines.add(context.deadline, call)
        try:
            handing_over = self.publish(self._request(data, context, id), context)
            if handing_over is not None:
                await handing_over
            return await call.future
        except (asyncio.CancelledError, DeadlineExceeded):
            self.abandon(id)
            raise
        finally:
            if tick is not None:
                tick.discard(call)
            self._pending.pop(id, None)

    async def stream(self, data: Any, context: RpcContext) -> AsyncGenerator[Raw]:
        """Make a request and yield its values as JSON until it completes.

        Raises as `send`, also when the values are taken too slowly for the bounded buffer.
        """
        if not self._usable(context):
            await self._until_ready(context)
        inbox = Stream(self.max_buffered_values)
        context.id = id = self._enter(inbox)
        try:
            handing_over = self.publish(self._request(data, context, id), context)
            if handing_over is not None:
                await handing_over
            while True:
                wait = min((w for w in (context.patience, context.remaining()) if w is not None), default=None)
                try:
                    async with asyncio.timeout(wait):
                        value = await inbox.get()
                except TimeoutError:
                    raise DeadlineExceeded() from None
                if value is END:
                    return
                yield value
        finally:
            inbox.open()
            if self._pending.pop(id, None) is not None:
                self.abandon(id)

    async def emit(self, data: Any, context: RpcContext) -> None:
        """Hand over an event. Raises Unavailable or DeadlineExceeded when it was not handed over."""
        if not self._usable(context):
            await self._until_ready(context)
        event = Event(context.raw_pattern, data, context.metadata or UNSET)
        if context.deadline is None:
            await self.dispatch_event(event, context)
        else:
            with Within(self._handing_over, context.deadline):
                await self.dispatch_event(event, context)

    def receive(self, reply: Reply) -> asyncio.Future[None] | None:
        """Take one packet of an answer; an unknown id is somebody who gave up, and is ignored.

        Gives something to wait for where the caller takes its values too slowly: a transport
        that can hold the sender back should, since a stream that overflows fails.
        """
        waiting = self._pending.get(reply.id) if isinstance(reply.id, str) else None
        if waiting is None:
            return None
        if reply.err:
            self._pending.pop(reply.id, None)
            waiting.fail(RpcException.from_wire(reply.err))
            return None
        full = waiting.take(reply.response) if isinstance(reply.response, Raw) else None
        if reply.is_disposed:
            self._pending.pop(reply.id, None)
            waiting.end()
        return full

    def fail(self, id: str, error: RpcException) -> None:
        """Fail one call that waits for an answer."""
        waiting = self._pending.pop(id, None)
        if waiting is not None:
            waiting.fail(error)

    def fail_pending(self, error: RpcException) -> None:
        """Fail every call that waits for an answer."""
        waiting, self._pending = self._pending, {}
        for call in waiting.values():
            call.fail(error)

    @property
    def bounds(self) -> list[Bound]:
        """The calls that wait for an answer, and those that wait to be handed over."""
        return [
            Bound("pending", len(self._pending), self.max_pending),
            Bound("connecting", self._waiting, self.max_pending),
        ]

    def _usable(self, context: RpcContext) -> bool:
        """Return whether a call can be handed over at once. Raises RpcException where it cannot be at all."""
        context.check_deadline()
        if len(self._pending) >= self.max_pending:
            raise self._overloaded()
        if self.ready():
            return True
        if self.status is Status.CLOSED:
            raise Unavailable(f"The client of {self.service} is closed.", code="closed")
        return False

    async def _until_ready(self, context: RpcContext) -> None:
        if self._waiting >= self.max_pending:
            raise self._overloaded()
        self._waiting += 1
        try:
            async with asyncio.timeout(context.remaining()):
                await self.connect()
        except TimeoutError:
            raise DeadlineExceeded(f"{self.service} did not take the call in time.") from None
        finally:
            self._waiting -= 1
        if len(self._pending) >= self.max_pending:  # others have waited, too
            raise self._overloaded()

    def _overloaded(self) -> Unavailable:
        dropped.add(self.service, "pending", "overloaded")
        return Unavailable(f"Too many calls to {self.service} wait.", code="overloaded")

    def _enter(self, waiting: Call | Stream) -> str:
        self._count += 1
        id = f"{self._prefix}{self._count:x}"
        self._pending[id] = waiting
        return id

    def _request(self, data: Any, context: RpcContext, id: str) -> Request:
        metadata = context.metadata
        if context.deadline is not None:
            left = max(0.0, context.deadline - time.monotonic())
            metadata = {**metadata, "deadline": str(int(left * 1000))}
        return Request(context.raw_pattern, data, metadata or UNSET, id)

    def _expire(self, call: Call) -> None:
        call.fail(DeadlineExceeded(f"{self.service} did not answer in time."))
