"""`clients["users"]`: the way to every service, local or remote, and to the event bus."""

from __future__ import annotations

import asyncio
import difflib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar, overload
from weakref import WeakKeyDictionary

from msgspec import Raw

from . import balanced, codec, conf, stubs, transports
from .conf import get_settings, load
from .context import RpcContext, current
from .dependencies import EVENTS, Declared
from .discovery.balancer import Balancer
from .exceptions import ConfigurationError, InvalidPayload, RpcException
from .executor import wait_for
from .instruments import Bound
from .microservice import get_microservice, services_here
from .middleware import Endpoint, Middleware, chain
from .packets import route
from .resilience.faults import Faults
from .resilience.policies import Guard, Plan
from .stubs import GrpcServices
from .transports.base import Caller, Status
from .transports.local import LocalClient, MemoryBus

T = TypeVar("T")
Loop = asyncio.AbstractEventLoop
Metadata = Mapping[str, str] | None
Options = Mapping[str, Any] | None

_MAX_KNOWN = 1024
_GRACE = 1.0


class _Bound(NamedTuple):
    """A client's connection on one event loop, with the middlewares folded around its verbs."""

    loop: Loop
    proxy: Caller
    guard: Guard | None
    ways: dict[str, _Way]
    stream: Endpoint
    emit: Endpoint


class _Way(NamedTuple):
    """How the requests of one pattern are made, and how many seconds they have."""

    send: Endpoint
    seconds: float


class Client:
    """Calls one service, from an event loop (`await client.send`) or a thread (`client.sync.send`)."""

    def __init__(
        self,
        service: str,
        connect: Callable[[], Caller],
        *,
        source: str = "",
        timeout: float = 5.0,
        middlewares: Sequence[Middleware] = (),
        plan: Plan | None = None,
        faults: Faults | None = None,
        load: Callable[[str], Any] = load,
        run: Callable[[Coroutine[Any, Any, Any]], Future[Any]] | None = None,
    ) -> None:
        self.service = service
        self.timeout = timeout
        self.sync = SyncClient(self, run or _background.run)
        self._connect = connect
        self._source = source
        self._middlewares = middlewares
        self._plan = plan
        self._faults = faults
        self._load = load
        self._per_loop: WeakKeyDictionary[Loop, _Bound] = WeakKeyDictionary()
        self._latest: _Bound | None = None
        # Routes by the pattern's JSON. Bounded: a caller may build patterns from data.
        self._routes: dict[bytes, str] = {}
        self._decoders: dict[Any, codec.Decoder] = {}

    @overload
    async def send(
        self,
        pattern: Any,
        data: Any = ...,
        *,
        timeout: float | None = ...,
        metadata: Metadata = ...,
        options: Options = ...,
    ) -> Any: ...
    @overload
    async def send(
        self,
        pattern: Any,
        data: Any = ...,
        *,
        returns: type[T],
        timeout: float | None = ...,
        metadata: Metadata = ...,
        options: Options = ...,
    ) -> T: ...
    async def send(
        self,
        pattern: Any,
        data: Any = None,
        *,
        returns: Any = None,
        timeout: float | None = None,
        metadata: Metadata = None,
        options: Options = None,
    ) -> Any:
        """Make a request and return its first value; None where the answer is empty.

        `pattern` and `data` are as in NestJS's `send`; `returns` is a type to decode into (plain
        objects without it); `timeout` is in seconds, capped by what is left of the caller's own
        deadline; `metadata` holds strings that travel beside the data; `options` tell the transport
        what to do with this one message, as NestJS's record builders: headers, qos, priority, key.
        Raises RpcException: the handler's error, NoHandler, Unavailable, ConnectionLost or
        DeadlineExceeded; ConfigurationError for options that the transport has not.
        """
        bound = self._bound()
        decode = self._decoder(returns)
        context = self._context(bound.proxy, pattern, metadata, options)
        way = bound.ways.get(context.pattern) or self._way(bound, context.pattern)
        context.cap_deadline(way.seconds if timeout is None else timeout)
        result = await way.send(data, context)
        return None if result is None else decode(result)

    async def stream(
        self,
        pattern: Any,
        data: Any = None,
        *,
        returns: Any = None,
        timeout: float | None = None,
        metadata: Metadata = None,
        options: Options = None,
    ) -> AsyncGenerator[Any]:
        """Make a request and yield its values until it completes.

        `timeout` is how many seconds to wait for each next value. Raises as `send`.
        """
        bound = self._bound()
        decode = self._decoder(returns)
        context = self._context(bound.proxy, pattern, metadata, options)
        context.patience = self.seconds(timeout)
        async with aclosing(await bound.stream(data, context)) as values:
            async for value in values:
                yield decode(value)

    async def emit(
        self,
        pattern: Any,
        data: Any = None,
        *,
        timeout: float | None = None,
        metadata: Metadata = None,
        options: Options = None,
    ) -> None:
        """Hand over an event. Raises Unavailable or DeadlineExceeded when it was not handed over."""
        bound = self._bound()
        context = self._context(bound.proxy, pattern, metadata, options)
        context.cap_deadline(self.seconds(timeout))
        await bound.emit(data, context)

    def seconds(self, timeout: float | None, pattern: Any = None) -> float:
        """Return how many seconds a call with this `timeout` may take, or a request of this pattern."""
        if timeout is not None:
            return timeout
        if pattern is None or self._plan is None:
            return self.timeout
        written = codec.encode(pattern)
        return self._deadline(self._routes.get(written) or self._route(pattern, written))

    @property
    def guard(self) -> Guard | None:
        """The policies at work on the running loop."""
        return self._bound().guard

    @property
    def balancer(self) -> Balancer | None:
        """What chooses among the instances, on the running loop; None where there is one address."""
        proxy = self._bound().proxy
        return proxy.balancer if isinstance(proxy, balanced.Balanced) else None

    @property
    def bounds(self) -> list[Bound]:
        """How full is what stands between callers on the running loop and the service."""
        bound = self._bound()
        bulkhead = None if bound.guard is None else bound.guard.bulkhead
        return [*bound.proxy.bounds, *(() if bulkhead is None else bulkhead.bounds)]

    @property
    def status(self) -> Status:
        """Where the connection of the running loop stands."""
        return self._bound().proxy.status

    async def close(self) -> None:
        """Close the connection of the running loop."""
        bound = self._per_loop.pop(asyncio.get_running_loop(), None)
        self._latest = None
        if bound is not None:
            await bound.proxy.close()

    def unwrap(self) -> Any:
        """Return the native object behind the connection of the running loop."""
        return self._bound().proxy.unwrap()

    def _bound(self) -> _Bound:
        loop = asyncio.get_running_loop()
        bound = self._latest
        if bound is not None and bound.loop is loop:
            return bound
        bound = self._per_loop.get(loop)
        if bound is None:
            proxy = self._connect()

            async def stream(data: Any, context: RpcContext) -> AsyncIterator[Raw]:
                return proxy.stream(data, context)

            stream_ = chain(stream, self._middlewares)
            emit = chain(proxy.emit if self._faults is None else self._faults.event(proxy.emit), self._middlewares)
            # One for each loop: its queues hold futures.
            guard = None if self._plan is None else Guard(self._plan, source=self._source, load=self._load)
            bound = self._per_loop[loop] = _Bound(loop, proxy, guard, {}, stream_, emit)
        self._latest = bound
        return bound

    def _way(self, bound: _Bound, route: str) -> _Way:
        policies = [] if bound.guard is None else bound.guard.chain(route)
        faults = [] if self._faults is None else [self._faults.request]
        send = chain(bound.proxy.send, [*self._middlewares, *policies, *faults])
        way = _Way(send, self._deadline(route))
        if len(bound.ways) < _MAX_KNOWN:
            bound.ways[route] = way
        return way

    def _deadline(self, route: str) -> float:
        return (self._plan.of(route).deadline if self._plan else 0) or self.timeout

    def _context(self, proxy: Caller, pattern: Any, metadata: Metadata, options: Options) -> RpcContext:
        written = codec.encode(pattern)
        text = self._routes.get(written) or self._route(pattern, written)
        context = RpcContext(
            service=self.service,
            pattern=text,
            channel=text,
            raw_pattern=Raw(written),
            transport=proxy.scheme,
            side="client",
            peer=proxy.url,
            record=proxy.read_record(options) if options else None,
        )
        caller = current.get()
        if caller is not None:
            context.metadata = caller.inherited()
            context.deadline = caller.deadline
        if self._source:
            context.metadata["source"] = self._source
        if metadata:
            context.metadata.update(metadata)
        return context

    def _route(self, pattern: Any, written: bytes) -> str:
        text = route(pattern)
        if text is None:
            raise ConfigurationError(f"{pattern!r} can never match: use a string, a number, a mapping or a list.")
        if len(self._routes) < _MAX_KNOWN:
            self._routes[written] = text
        return text

    def _decoder(self, returns: Any) -> codec.Decoder:
        decode = self._decoders.get(returns)
        if decode is None:
            kind = codec.kind_of(returns)
            if kind is not None and kind.blocking:
                raise ConfigurationError(
                    f"returns={returns!r} may ask the database: that is for a `def` handler alone."
                )
            typed = codec.decoder(Any if returns is None else returns)

            def decode(raw: bytes | Raw) -> Any:
                try:
                    return typed(raw)
                except InvalidPayload as error:
                    where = "".join(field["pointer"] for field in error.errors[:1])
                    message = f"{self.service} answered in another shape than expected: {error} at {where or '/'}"
                    raise RpcException({"statusCode": 502, "code": "bad-answer", "message": message}) from error

            self._decoders[returns] = decode
        return decode


class SyncClient:
    """The face of a client for code without an event loop: views, `def` handlers, commands, a shell."""

    def __init__(self, client: Client, run: Callable[[Coroutine[Any, Any, Any]], Future[Any]]) -> None:
        self._client = client
        self._run = run

    def send(self, pattern: Any, data: Any = None, *, timeout: float | None = None, **options: Any) -> Any:
        """Do what `Client.send` does and wait for it."""
        seconds = self._client.seconds(timeout, pattern)
        return self._wait(self._client.send(pattern, data, timeout=seconds, **options), seconds)

    def stream(self, pattern: Any, data: Any = None, *, timeout: float | None = None, **options: Any) -> Iterator[Any]:
        """Do what `Client.stream` does, one value at a time."""
        seconds = self._client.seconds(timeout)
        values = self._client.stream(pattern, data, timeout=seconds, **options)
        try:
            while True:
                try:
                    value = self._wait(anext(values), seconds)
                except StopAsyncIteration:
                    return
                yield value
        finally:
            self._wait(values.aclose(), seconds)

    def emit(self, pattern: Any, data: Any = None, *, timeout: float | None = None, **options: Any) -> None:
        """Do what `Client.emit` does and wait for it."""
        seconds = self._client.seconds(timeout)
        self._wait(self._client.emit(pattern, data, timeout=seconds, **options), seconds)

    def _wait(self, work: Any, seconds: float) -> Any:
        # The call keeps its own deadline; this one only guards against a loop that has stopped.
        return wait_for(lambda: self._run(work), seconds + _GRACE)


class Clients:
    """All services that can be called, by name; `clients.events` is the bus."""

    def __init__(self) -> None:
        self._clients: dict[str, Client] = {}
        self._grpc: dict[str, GrpcServices] = {}
        self._faults: dict[str, Faults] = {}
        self._home: Loop | None = None

    def __getitem__(self, service: str) -> Client:
        client = self._clients.get(service)
        return self._make(service) if client is None else client

    def __iter__(self) -> Iterator[str]:
        return iter(get_settings().clients)

    def grpc(self, service: str) -> GrpcServices:
        """Return the gRPC services of a service: `clients.grpc("users").service("UsersService")`.

        Raises ConfigurationError for one that is not known, or has no gRPC address.
        """
        found = self._grpc.get(service)
        if found is None:
            self._known(service)
            client = self._client(service, lambda: stubs.connect(service))
            found = self._grpc[service] = GrpcServices(client, stubs.proto_files())
        return found

    @property
    def events(self) -> Client:
        """The event bus: an event goes to every service that hears it."""
        return self[EVENTS]

    @property
    def used(self) -> dict[str, Client]:
        """The clients that have been asked for, by a name of their own: "users", "users-grpc"."""
        grpc = {f"{service}-grpc": services.client for service, services in self._grpc.items()}
        return {**self._clients, **grpc}

    @property
    def faults(self) -> list[str]:
        """The patterns that have faults on purpose in this process, as "users/get_user"."""
        faulty = ((service, self._faults_of(service)) for service in get_settings().faults)
        return [f"{service}/{pattern}" for service, faults in faulty if faults for pattern in faults.active]

    def settle(self, loop: Loop | None) -> None:
        """Make `loop` the one that threads submit their calls to; None for one in the background."""
        self._home = loop

    async def close(self) -> None:
        """Close all connections of the running loop."""
        for client in self.used.values():
            await client.close()

    def reset(self) -> None:
        """Forget all clients: the settings have changed."""
        self._clients.clear()
        self._grpc.clear()
        self._faults.clear()

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the application's loop, or in the background where there is none."""
        home = self._home
        if home is None or not home.is_running():
            return _background.run(work)
        return _submit(work, home)

    def _make(self, service: str) -> Client:
        if service != EVENTS:
            self._known(service)
        client = self._clients[service] = self._client(service, lambda: _connect(service))
        return client

    def _known(self, service: str) -> None:
        known = get_settings().clients
        if service not in known:
            near = difflib.get_close_matches(service, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}."
            raise ConfigurationError(f"No service {service!r} in MICROSERVICES['CLIENTS']: {hint}")

    def _faults_of(self, service: str) -> Faults | None:
        given = get_settings().faults.get(service)
        if not given or not conf.debug():
            return None
        return self._faults.setdefault(service, Faults(service, given))  # one for a service's gRPC, too

    def _client(self, service: str, connect: Callable[[], Caller]) -> Client:
        settings = get_settings()
        for_development: list[Middleware] = [Declared()] if conf.debug() else []
        return Client(
            service,
            connect,
            source=settings.name,
            timeout=settings.call_timeout,
            middlewares=[*for_development, *(load(path) for path in settings.client_middleware)],
            plan=None if service == EVENTS else conf.plan(service),
            faults=self._faults_of(service),
            run=self.run,
        )


def _connect(service: str) -> Caller:
    settings = get_settings()
    if service == EVENTS:
        address = conf.events_address()
        if address.scheme == MemoryBus.scheme:
            return MemoryBus(address, [get_microservice(name).dispatcher for name in services_here()])
        return transports.load(address, "bus")(address, service)  # type: ignore[no-any-return]
    if service in settings.servers:
        return LocalClient(get_microservice(service).dispatcher)
    place = settings.clients[service]
    return balanced.connect(service, conf.addresses(place.url, place.options, rpcs=place.rpcs))


class _Background:
    """One event loop in a thread, for callers that have none; started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: Loop | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="microservices-loop", daemon=True).start()
        return _submit(work, self._loop)


def _submit(work: Coroutine[Any, Any, T], loop: Loop) -> Future[T]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run_coroutine_threadsafe(work, loop)
    work.close()
    raise RuntimeError("This thread runs an event loop: `await client.send(...)` instead of `client.sync`.")


_background = _Background()
clients = Clients()
