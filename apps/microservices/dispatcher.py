"""From a packet to its handler and back to a response: the only way into a service."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import Context
from functools import partial
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from .context import NO_HEADERS, RpcContext, current, deadline_on_wire, given_up
from .deadlines import Deadlines
from .exceptions import INTERNAL, TRACEBACK, DeadlineExceeded, NoHandler, RpcException, Unavailable
from .executor import Executor, Lender, lender
from .handlers import Colour, Delivery, Door, Handler
from .instruments import dropped
from .middleware import Call, Endpoint, Middleware, chain, chain_in_place, standing
from .packets import Packet, Response, route_in_text, route_on_wire

logger = logging.getLogger("microservices.dispatcher")

Replier = Callable[[Response], Awaitable[None] | None]
"""Sends one packet of an answer; gives something to await while the peer reads too slowly."""

MAX_SPELLINGS = 4096
MAX_SPELLING = 256
_STREAM_TURN = 64
_MAX_TRACEBACK = 8192


# What a call is given in place of a context that nobody would look at.
_UNSEEN = RpcContext(service="", pattern="", transport="", side="server")


class Target(NamedTuple):
    """A handler as one door leads to it, its middlewares folded around it."""

    handler: Handler
    door: Door
    endpoint: Endpoint
    call: Call | None
    """The same without a task, where the handler is inline and no middleware may wait."""


class Route(NamedTuple):
    """What a pattern leads to: the handler that answers, and those that listen."""

    name: str
    request: Target | None
    events: tuple[Target, ...]
    unseen: bool = False
    """Whether nobody behind it looks at the context of a message."""

    def listeners(self, delivery: Delivery | None) -> tuple[Target, ...]:
        """Return the handlers that listen, or those that want an event delivered so."""
        if delivery is None:
            return self.events
        return tuple(target for target in self.events if target.door.delivery == delivery)


class Dispatcher:
    """Finds and runs the handlers of one service."""

    def __init__(
        self,
        service: str,
        handlers: Iterable[Handler],
        executor: Executor,
        middlewares: Sequence[Middleware] = (),
        *,
        tracebacks: bool = False,
    ) -> None:
        self.service = service
        self.interrupted: set[asyncio.Task[Any]] = set()
        """Work that is cancelled since the process ends, and whose caller is told so."""
        self._tracebacks = tracebacks
        self.handlers = tuple(handlers)
        self._executor = executor
        self._deadlines: Deadlines[asyncio.Task[Any] | None] | None = None
        self._routes: dict[str, Route] = {}
        # Apart, so that no other transport leads to them.
        self._methods: dict[str, Route] = {}
        self._compile(middlewares)
        # By the pattern's bytes as peers write them. Bounded in number and length: the peer chooses the spelling.
        self._spellings: dict[bytes, Route] = {}

    @property
    def routes(self) -> dict[str, Route]:
        """All routes of the service's patterns."""
        return self._routes

    @property
    def methods(self) -> dict[str, Route]:
        """The gRPC methods of the service: `UsersService/FindOne`, as they were declared."""
        return self._methods

    def hears(self, route: str, delivery: Delivery | None = None) -> bool:
        """Return whether some handler listens to this event, or one that wants it delivered so."""
        return route in self._routes and bool(self._routes[route].listeners(delivery))

    def find(self, pattern: Raw | UnsetType) -> Route | None:
        """Return the route that a packet's pattern leads to, if any."""
        if isinstance(pattern, UnsetType):
            return None
        spelling = bytes(pattern)
        route = self._spellings.get(spelling)
        if route is None:
            route = self._read(spelling)
            if route is not None and len(spelling) <= MAX_SPELLING and len(self._spellings) < MAX_SPELLINGS:
                self._spellings[spelling] = route
        return route

    def dispatch(
        self,
        packet: Packet,
        reply: Replier,
        *,
        transport: str,
        peer: str,
        channel: str | None = None,
        delivery: Delivery | None = None,
        route: Route | None = None,
        headers: Mapping[str, Any] = NO_HEADERS,
        native: Any = None,
    ) -> asyncio.Task[Any] | None:
        """Run what a packet asks for; returns the task that does, or None when it is done already.

        The task of an event ends with the list of what its handlers raised.

        Answers go to `reply`. `channel` is the name under which the message came, where the transport
        has such names: it decides instead of the packet's pattern. `route` is given where the transport
        has found that itself, by a wildcard. `delivery` narrows an event's handlers to those that want it
        so, where a bus tells them apart. `headers` and `native` are the transport's own. The caller owns
        the task: it keeps it, and cancels it when the peer is gone.
        """
        if route is None:
            if channel is not None:
                route = self._routes.get(channel)
            elif packet.pattern is not UNSET:
                route = self._spellings.get(bytes(packet.pattern)) or self.find(packet.pattern)
        is_event = packet.id is UNSET
        if route is None:
            if is_event:
                dropped.add(self.service, transport, "unknown-event")
            else:
                self._send(reply, Response(id=packet.id, status="error", err=NoHandler().to_wire()), "")
            return None
        metadata = packet.metadata
        if route.unseen and (metadata is UNSET or not given_up(metadata)):
            context = _UNSEEN
        else:
            context = RpcContext(
                service=self.service,
                pattern=route.name,
                transport=transport,
                side="server",
                peer=peer,
                metadata=_texts(metadata) if type(metadata) is dict else {},
                raw_id=None if is_event else packet.id,  # type: ignore[arg-type]
                deadline=None if metadata is UNSET else deadline_on_wire(metadata),
                channel=route.name if channel is None else channel,
                headers=headers,
                native=native,
            )
        if is_event:
            return self._dispatch_event(route, delivery, packet.data, context)
        target = route.request or route.events[0]
        call = target.call
        if call is None:
            return self._spawn(self._answer(target, packet.data, context, reply, packet.id), lender.get())
        try:
            if context.deadline is not None:
                context.check_deadline()
            reply(Response(call(packet.data, context), UNSET, True, packet.id))
        except Exception as error:  # noqa: BLE001 - logged and answered
            self._send(reply, self._failure(error, route.name, packet.id), route.name)
        return None

    # Requests

    async def _answer(self, target: Target, data: Any, context: RpcContext, reply: Replier, id: Any) -> None:
        current.set(context)
        if target.door.deadline is not None:
            context.cap_deadline(target.door.deadline)
        deadline, tick, task = context.deadline, None, None
        try:
            if deadline is not None:
                context.check_deadline()
                task = asyncio.current_task()
                tick = self._watch(deadline, task)
            result = await target.endpoint(data, context)
            if target.handler.colour is Colour.STREAM:
                await self._stream(result, context, reply, id)
                response = Response(is_disposed=True, id=id)
            else:
                response = Response(response=result, is_disposed=True, id=id)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if context.expired():
                response = self._failure(DeadlineExceeded(), context.pattern, id)
            elif task in self.interrupted:
                gone = Unavailable(f"{self.service} has ended before this was done.", code="interrupted")
                response = self._failure(gone, context.pattern, id)
            elif task is None or task.cancelling():
                raise
            else:  # what the handler awaited was cancelled, and its caller still waits
                response = self._failure(error, context.pattern, id)
        except Exception as error:  # noqa: BLE001 - logged and answered
            response = self._failure(error, context.pattern, id)
        finally:
            if tick is not None:
                tick.discard(task)
        self._send(reply, response, context.pattern)

    async def _stream(self, values: AsyncIterator[Any], context: RpcContext, reply: Replier, id: Any) -> None:
        sent = 0
        try:
            async for value in values:
                full = reply(Response(response=value, id=id))
                sent += 1
                if full is not None:
                    await full
                elif sent % _STREAM_TURN == 0:
                    await asyncio.sleep(0)  # a generator that never waits must not hold the loop
        finally:
            if hasattr(values, "aclose"):
                await values.aclose()

    def _send(self, reply: Replier, response: Response, pattern: str) -> None:
        try:
            reply(response)
        except Exception as error:  # noqa: BLE001 - no JSON form, or too large: logged and answered
            try:
                reply(self._failure(error, pattern, response.id))
            except Exception:  # as with an id that fills a packet: nothing can be told, and nobody else is to suffer
                logger.exception("%s %s could not be answered", self.service, pattern)
                dropped.add(self.service, "dispatcher", "no-answer")

    def _failure(self, error: BaseException, pattern: str, id: Any) -> Response:
        if isinstance(error, RpcException):
            return Response(err=error.to_wire(), is_disposed=True, id=id)
        logger.error("%s %s failed", self.service, pattern, exc_info=error)
        err = {"status": "error", "message": INTERNAL}
        if self._tracebacks:
            err[TRACEBACK] = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
        return Response(err=err, is_disposed=True, id=id)

    # Events

    def _dispatch_event(
        self, route: Route, delivery: Delivery | None, data: Any, context: RpcContext
    ) -> asyncio.Task[Any] | None:
        targets = route.listeners(delivery)
        if not targets and route.request is not None and not route.events:
            targets = (route.request,)
        for target in targets:
            if target.call is None:
                return self._spawn(self._hear(targets, data, context), None)
        failures: list[Exception] = []
        for target in targets:
            try:
                target.call(data, context)  # type: ignore[misc]  # each has one
            except Exception as error:  # noqa: BLE001 - reported
                self._report(target, route.name, error)
                failures.append(error)
        # Whoever must know of it, to have the event again, asks the task.
        return self._spawn(_ended_with(failures), None) if failures else None

    async def _hear(self, targets: Sequence[Target], data: Any, context: RpcContext) -> list[BaseException]:
        current.set(context)
        if len(targets) == 1:
            outcomes = [await self._outcome(targets[0], data, context)]
        else:
            outcomes = await asyncio.gather(*(self._outcome(target, data, context) for target in targets))
        for target, outcome in zip(targets, outcomes, strict=True):
            if outcome is not None:
                self._report(target, context.pattern, outcome)
        return [outcome for outcome in outcomes if outcome is not None]

    @staticmethod
    async def _outcome(target: Target, data: Any, context: RpcContext) -> BaseException | None:
        try:
            result = await target.endpoint(data, context)
            if target.handler.colour is Colour.STREAM:
                async for _ in result:  # nobody takes the values, but the work is done
                    pass
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return error  # of something that the handler awaited: it has failed, too
        except Exception as error:  # noqa: BLE001 - reported
            return error
        return None

    @staticmethod
    def _report(target: Target, pattern: str, error: BaseException) -> None:
        name = target.handler.name
        if isinstance(error, RpcException):
            logger.warning("%s refused %s: %s", name, pattern, error)
        else:
            logger.error("%s failed to handle %s", name, pattern, exc_info=error)

    # Start-up and bookkeeping

    def _compile(self, middlewares: Sequence[Middleware]) -> None:
        watched: set[str] = set()
        for handler in self.handlers:
            innermost = self._innermost(handler)
            for door in handler.doors:
                before = standing(middlewares, handler, door)
                if before:
                    watched.add(door.route)
                call = chain_in_place(handler.call, before) if handler.colour is Colour.INLINE else None
                target = Target(handler, door, chain(innermost, before), call)
                routes = self._methods if door.kind == "grpc" else self._routes
                route = routes.get(door.route) or Route(door.route, None, ())
                # As in NestJS, the last request handler of a pattern wins and all event handlers run.
                if door.kind == "event":
                    routes[door.route] = route._replace(events=(*route.events, target))
                else:
                    routes[door.route] = route._replace(request=target)
        for name, route in self._routes.items():
            targets = (*route.events, route.request)
            unseen = name not in watched and all(target is None or _unseen_by(target.handler) for target in targets)
            self._routes[name] = route._replace(unseen=unseen)

    def _innermost(self, handler: Handler) -> Endpoint:
        async def all_in_pool(data: Any, context: RpcContext) -> Any:
            return await self._executor.run(partial(handler.call, data, context), context)

        async def in_pool(data: Any, context: RpcContext) -> Any:
            payload = handler.convert(data)
            return await self._executor.run(partial(handler.invoke, payload, context), context)

        async def in_place(data: Any, context: RpcContext) -> Any:
            return handler.call(data, context)

        async def in_consumer(data: Any, context: RpcContext) -> Any:
            await handler.deliver(handler.convert(data), context)

        if handler.converts_in_thread:
            return all_in_pool
        # What an `async def` returns is awaited, or iterated, by whoever called: no coroutine around it.
        ways = {Colour.POOL: in_pool, Colour.TASK: handler.call, Colour.CONSUMER: in_consumer}
        return ways.get(handler.colour, in_place)

    def _read(self, spelling: bytes) -> Route | None:
        # A text is tried as it stands first, so that handlers named "null" or "1e3" can be reached.
        try:
            pattern = msgspec.json.decode(spelling)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if isinstance(pattern, str):
            if pattern in self._routes:
                return self._routes[pattern]
            text = route_in_text(pattern)
        else:
            text = route_on_wire(spelling)
        return None if text is None else self._routes.get(text)

    def _spawn(self, work: Any, waiting: Lender | None) -> asyncio.Task[Any]:
        # A fresh context for each message; only the thread that waits for its answer is handed on. Nobody
        # waits for an event: run in its emitter's thread, a handler would hold that up, inside its transaction.
        fresh = Context()
        if waiting is not None:
            fresh.run(lender.set, waiting)
        return asyncio.get_running_loop().create_task(work, context=fresh)

    def _watch(self, deadline: float, task: asyncio.Task[Any] | None) -> set[asyncio.Task[Any] | None]:
        loop = asyncio.get_running_loop()
        if self._deadlines is None or self._deadlines.loop is not loop:
            self._deadlines = Deadlines(loop, _cancel)
        return self._deadlines.add(deadline, task)


def _cancel(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()


def _unseen_by(handler: Handler) -> bool:
    return handler.colour is Colour.INLINE and not handler.takes_context


async def _ended_with(failures: list[Exception]) -> list[Exception]:
    return failures


def _texts(metadata: dict[Any, Any]) -> dict[str, str]:
    # A copy, since several services may hear one packet; and a peer may send anything there.
    return {key: value for key, value in metadata.items() if isinstance(value, str)}
