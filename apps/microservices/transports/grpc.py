"""gRPC: the services of .proto files, served and called without generated code (nest-wire.md section 13)."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import msgspec
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from msgspec import UNSET, Raw

from .. import codec
from ..context import RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import ConfigurationError, DeadlineExceeded, InvalidPayload, NoHandler, RpcException, Unavailable
from ..handlers import Colour, Handler
from ..packets import Event, Packet, Reply, Request, Response, pattern_name
from . import Address, Count, Seconds, protos, sockets
from .base import ClientProxy, Server, Status
from .local import LocalClient
from .protos import Method, Protos
from .statuses import from_metadata, from_status, to_metadata, to_status
from .tls import TlsOptions

_MIB = 1024 * 1024
# Over all addresses that answer; the first one that does would take all calls.
_IN_TURN = '{"loadBalancingConfig":[{"round_robin":{}}]}'


class Options(TlsOptions, frozen=True, kw_only=True):
    """What a URL may set beside TLS: sizes in bytes, times in seconds; `rpcs` names the RPC of each pattern."""

    proto_path: list[str] = []  # noqa: RUF012 - msgspec copies it
    cache: str = ""
    rpcs: dict[str, str] = {}  # noqa: RUF012
    max_message_length: Count = 4 * _MIB
    max_metadata_size: Count = 8192
    max_concurrent_streams: Count = 100
    max_in_flight: Count = 1000
    max_connections: Count = 1024
    handshake_timeout: Seconds = 10
    max_connection_age: Seconds = 1800
    max_connection_age_grace: Seconds = 30
    keepalive: Seconds | None = None
    reflection: bool = False

    def channel(self) -> list[tuple[str, int | str]]:
        return [
            ("grpc.max_receive_message_length", self.max_message_length),
            ("grpc.max_send_message_length", self.max_message_length),
            ("grpc.max_metadata_size", self.max_metadata_size),
            ("grpc.absolute_max_metadata_size", self.max_metadata_size),
        ]

    def pem(self, name: str) -> bytes | None:
        path = getattr(self, name)
        try:
            return Path(path).read_bytes() if path else None
        except OSError as error:
            raise ConfigurationError(f"{name} {path!r} cannot be read: {error.strerror}") from error


# Serving


class GrpcServer(Server):
    """Answers any gRPC client with the handlers that are marked `@grpc_method`."""

    scheme = "grpc"
    Options = Options
    shared = True

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self.port = 0
        """The port that it really listens on; 0 while it does not."""
        self._protos = protos.load(tuple(self.options.proto_path), self.options.cache)
        self._router = _Router()
        self._services: set[str] = set()
        self._held: socket.socket | None = None
        """What keeps the port for this process and its sisters."""
        self._server: grpc.aio.Server | None = None
        self._health = _Health()

    async def listen(self) -> None:
        await self.join(self.dispatcher)
        self._held = sockets.inherited(f"{self.dispatcher.service} {self.address}")
        server = grpc.aio.server(options=self._settings(), maximum_concurrent_rpcs=self.options.max_in_flight)
        try:
            server.add_generic_rpc_handlers((self._router,))
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            await self._bind(server)
            await self.announce(False)
            await server.start()
        except BaseException:
            await server.stop(None)
            raise
        self._server = server
        self.status = Status.CONNECTED

    async def join(self, dispatcher: Dispatcher) -> None:
        for name, route in dispatcher.methods.items():
            method = self._protos.method(name)
            if route.request is not None:
                check(route.request.handler, method)
            self._services.add(method.service)
            self._router.add(method, _Endpoint(self, dispatcher, route, method))

    async def announce(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)
        if ready and self.options.reflection:
            self._reflect()

    async def close(self, grace: float) -> None:
        self._health.part()
        if self._server is not None:
            await self._server.stop(grace)
        await self.finish(0)
        if self._held is not None:
            self._held.close()
        self.status = Status.CLOSED

    def unwrap(self) -> grpc.aio.Server | None:
        return self._server

    def _settings(self) -> list[tuple[str, int | str]]:
        options = self.options
        return [
            *options.channel(),
            # With it, a second server on the port shares it in silence: for workers alone.
            ("grpc.so_reuseport", int(self._held is not None)),
            ("grpc.max_concurrent_streams", options.max_concurrent_streams),
            ("grpc.max_allowed_incoming_connections", options.max_connections),
            ("grpc.server_handshake_timeout_ms", int(options.handshake_timeout * 1000)),
            # It counts streams that have ended a moment ago, and so refuses callers who keep to the limit.
            ("grpc.http.overload_protection", 0),
            ("grpc.max_connection_age_ms", int(options.max_connection_age * 1000)),
            ("grpc.max_connection_age_grace_ms", int(options.max_connection_age_grace * 1000)),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ]

    async def _bind(self, server: grpc.aio.Server) -> None:
        credentials = self._credentials() if self.address.scheme == "grpcs" else None
        host, port = self.address.host, self.address.port
        if self._held is not None:
            port = self._held.getsockname()[1]
        # One by one: asked for a name, grpc is content with any one of its addresses.
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        places = list(dict.fromkeys((family, str(place[0])) for family, *_, place in found))
        for family, ip in places:
            where = self.address._replace(host=ip, port=port).place
            try:
                self.port = (
                    server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
                )
            except RuntimeError as error:
                if family == socket.AF_INET6 and len(places) > 1:
                    continue  # a machine may know the name, and speak no IPv6
                reason = "the port is taken, the address is not of this machine, or the certificate cannot be used"
                raise OSError(errno.EADDRINUSE, reason) from error

    def _credentials(self) -> grpc.ServerCredentials:
        key, certificate, authority = (self.options.pem(name) for name in ("keyfile", "certfile", "cafile"))
        if key is None or certificate is None:
            raise ConfigurationError(f"{self.address}: grpcs:// needs a certfile and a keyfile.")
        return grpc.ssl_server_credentials([(key, certificate)], authority, authority is not None)

    def _reflect(self) -> None:
        from grpc_reflection.v1alpha import reflection, reflection_pb2

        # A pool of its own, in which a project's copy of health.proto may stand already.
        pool = descriptor_pool.DescriptorPool()
        for file in (*self._protos.files, health_pb2.DESCRIPTOR.serialized_pb, reflection_pb2.DESCRIPTOR.serialized_pb):
            with suppress(TypeError):
                pool.AddSerializedFile(file)
        names = [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        servicer = reflection.aio.ReflectionServicer(names, pool=pool)
        # By our own router: grpc takes its handlers before the start only, when not all services have joined.
        self._router.handlers[f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"] = (
            grpc.stream_stream_rpc_method_handler(
                servicer.ServerReflectionInfo,
                reflection_pb2.ServerReflectionRequest.FromString,
                reflection_pb2.ServerReflectionResponse.SerializeToString,
            )
        )


class _Health(health.aio.HealthServicer):
    """grpc's own health service, whose watchers do not hold up the end."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers: set[asyncio.Task[None]] = set()
        self._parting = False

    async def Watch(self, request: Any, context: Any) -> None:
        """Tell the state, and each change of it."""
        watching = asyncio.create_task(super().Watch(request, context))
        self._watchers.add(watching)
        try:
            await watching
        except asyncio.CancelledError:
            if not self._parting:
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, "This process ends.")
        finally:
            self._watchers.discard(watching)

    def part(self) -> None:
        """End all watching."""
        self._parting = True
        for watching in self._watchers:
            watching.cancel()


class _Router(grpc.GenericRpcHandler):
    """Finds what answers a path; a service may join while the server runs."""

    def __init__(self) -> None:
        self.handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add(self, method: Method, endpoint: _Endpoint) -> None:
        kinds = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        if method.path in self.handlers:
            raise ConfigurationError(f"Two handlers answer {method.path}.")
        self.handlers[method.path] = kinds[method.client_streaming, method.server_streaming](endpoint.serve)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self.handlers.get(handler_call_details.method)


class _Endpoint:
    """Hands the calls of one method to its handler."""

    def __init__(self, server: GrpcServer, dispatcher: Dispatcher, route: Route, method: Method) -> None:
        self._server = server
        self._dispatcher = dispatcher
        self._route = route
        self._method = method

    async def serve(self, request: Any, native: grpc.aio.ServicerContext[Any, Any]) -> bytes | None:
        """Answer one call; `request` is a message's bytes, or an iterator of them."""
        answer = _Answer(self._method, partial(_put, native))
        try:
            data = requests(self._method, request)
        except RpcException as error:
            answer.error = error
        else:
            packet = Packet(data=data, metadata=_told(native), id=_id(native))
            task = self._server.keep(
                self._dispatcher.dispatch(
                    packet, answer.take, transport="grpc", peer=_peer(native), route=self._route, native=native
                )
            )
            if task is not None:
                await task  # cancelled with this call: by its peer, or at its deadline
        if isinstance(answer.error, _CallerLeft):
            return None
        if answer.error is not None:
            status, details, trailing = to_status(answer.error)
            await native.abort(status, details, (*(native.trailing_metadata() or ()), *trailing))
        if not self._method.server_streaming:
            return answer.bodies[0]
        for body in answer.bodies:
            await _put(native, body)
        return None


class _CallerLeft(RpcException):
    """499: nobody is there to take the answer."""

    def __init__(self) -> None:
        super().__init__({"statusCode": 499, "code": "caller-left", "message": "The caller has left."})


async def _put(native: grpc.aio.ServicerContext[Any, Any], body: bytes) -> None:
    try:
        await native.write(body)
    except grpc.aio.InternalError as error:  # the peer has left, and grpc has not told yet
        raise _CallerLeft() from error


class _Answer:
    """What a handler answers, packet by packet; `put` hands on one value of a stream."""

    def __init__(self, method: Method, put: Callable[[bytes], Awaitable[None] | None]) -> None:
        self._method = method
        self._put = put
        self.bodies: list[bytes] = []
        """What is left to hand on when the handler is done: one value, or the list that a `def` gives to a stream."""
        self.error: RpcException | None = None

    def take(self, response: Response) -> Awaitable[None] | None:
        """Take one packet; gives the handing on to wait for. Raises TypeError for an answer that does not fit."""
        if response.err is not UNSET:
            self.error = RpcException.from_wire(response.err)
        elif response.response is not UNSET:
            values = plain(response.response)
            if self._method.server_streaming and response.is_disposed is not True:
                return self._put(self._written(values))
            together = self._method.server_streaming and isinstance(values, list | tuple)
            self.bodies = [self._written(value) for value in (values if together else [values])]
        return None

    def _written(self, value: Any) -> bytes:
        try:
            return self._method.response.encode(value)
        except InvalidPayload as error:  # the handler's fault, not the caller's
            where = "".join(field["pointer"] for field in error.errors)
            raise TypeError(f"The answer to {self._method.path} does not fit at {where or '/'}: {error}") from error


def check(handler: Handler, method: Method) -> None:
    """Raise ConfigurationError where a handler and an RPC do not stream alike."""
    if handler.takes_stream is not method.client_streaming:
        what = "a stream of requests" if method.client_streaming else "one request"
        raise ConfigurationError(f"{method.path} sends {what}; {handler.name} is not annotated so.")
    if handler.colour is Colour.STREAM and not method.server_streaming:
        raise ConfigurationError(f"{method.path} has one answer; {handler.name} yields many.")


def requests(method: Method, request: Any) -> Any:
    """Return what a peer sent as JSON: a value, or an iterator of values. Raises InvalidPayload."""
    if not method.client_streaming:
        return Raw(codec.encode(method.request.decode(request)))
    return _each(method, request)


async def _each(method: Method, bodies: AsyncIterable[bytes]) -> AsyncIterator[Raw]:
    async for body in bodies:
        yield Raw(codec.encode(method.request.decode(body)))


def plain(value: Any) -> Any:
    """Return a value as dicts, lists and scalars. Raises TypeError for one that has no such form."""
    return (
        codec.decode(value)
        if isinstance(value, Raw)
        else msgspec.to_builtins(value, builtin_types=(bytes,), enc_hook=codec.plain)
    )


def _told(native: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    told = from_metadata(native.invocation_metadata() or ())
    remaining = native.time_remaining()
    if remaining is not None:
        told["deadline"] = str(int(remaining * 1000))
    return told


def _id(native: grpc.aio.ServicerContext[Any, Any]) -> Raw:
    ids = [value for key, value in native.invocation_metadata() or () if key == "id"]
    return Raw(codec.encode(ids[0] if ids and isinstance(ids[0], str) else ""))


def _peer(native: grpc.aio.ServicerContext[Any, Any]) -> str:
    return unquote(str(native.peer()).partition(":")[2])


# Calling


class _Running:
    """A call of ours; closing the client ends it with a reason."""

    def __init__(self) -> None:
        self.call: Any = None
        self.error: Exception | None = None
        self._reading: asyncio.Task[Any] | None = None

    def fail(self, error: RpcException) -> None:
        self.error = error
        self.call.cancel()

    async def noting(self, bodies: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass on what is to be sent; grpc itself only cancels a call whose requests fail."""
        self._reading = asyncio.current_task()
        try:
            async for body in bodies:
                yield body
        except Exception as error:
            self.error = error
            raise

    def end(self) -> None:
        """Leave the call. grpc goes on taking requests of one that is answered already."""
        self.call.cancel()
        if self._reading is not None:
            self._reading.cancel()


def rpc(files: Protos, rpcs: Mapping[str, str], route: str, service: str) -> Method:
    """Return the RPC of a pattern: the one that `rpcs` maps it to, or the one that it names itself.

    Raises RpcException 501 for a pattern that is neither.
    """
    name = pattern_name(route)
    path = rpcs.get(name) or rpcs.get(route) or name
    if "/" in path:
        with suppress(ConfigurationError):
            return files.method(path)
    message = f"{name} is no RPC of {service}: its `rpcs` map {', '.join(rpcs) or 'nothing'}."
    raise RpcException({"statusCode": 501, "code": "not-mapped", "message": message})


class GrpcClient(ClientProxy):
    """Calls any gRPC server: patterns that are mapped to RPCs, and RPCs by name."""

    scheme = "grpc"
    Options = Options

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._protos = protos.load(tuple(self.options.proto_path), self.options.cache)
        for path in self.options.rpcs.values():
            self._protos.method(path)
        self._channel: grpc.aio.Channel | None = None
        self._methods: dict[str, Method] = {}
        self._starters: dict[str, Any] = {}

    async def open(self) -> None:
        if self._channel is None:
            self._channel = self._new_channel(await self._target())
        while (state := self._channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise Unavailable(f"{self.service} cannot be reached at {self.address}.")
            await self._channel.wait_for_state_change(state)

    async def disconnect(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def send(self, data: Any, context: RpcContext) -> Raw | None:
        method = self._method(context.pattern)
        if not self._usable(context):
            await self._until_ready(context)
        running = self._begin(method, data, context)
        with self._watching(running, context):
            if method.server_streaming:
                body = await running.call.read()
                return None if body is grpc.aio.EOF else _json(method, body)
            return _json(method, await running.call)

    async def stream(self, data: Any, context: RpcContext) -> AsyncGenerator[Raw]:
        method = self._method(context.pattern)
        if not method.server_streaming:
            if context.patience is not None:
                context.cap_deadline(context.patience)
            value = await self.send(data, context)
            if value is not None:
                yield value
            return
        if not self._usable(context):
            await self._until_ready(context)
        running = self._begin(method, data, context)
        with self._watching(running, context):
            while True:
                wait = min((w for w in (context.patience, context.remaining()) if w is not None), default=None)
                try:
                    async with asyncio.timeout(wait):
                        body = await running.call.read()
                except TimeoutError:
                    raise DeadlineExceeded() from None
                if body is grpc.aio.EOF:
                    return
                yield _json(method, body)

    async def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("gRPC has calls of its own.")

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        message = "gRPC carries no events: emit them on the bus."
        raise RpcException({"statusCode": 501, "code": "no-events", "message": message})

    async def emit(self, data: Any, context: RpcContext) -> None:
        try:
            plain(data)
        except codec.UNENCODABLE as error:
            raise codec.not_json(error) from error
        if self.status is Status.CLOSED:
            raise Unavailable(f"The client of {self.service} is closed.", code="closed")
        await self.dispatch_event(Event(context.raw_pattern, data), context)

    def unwrap(self) -> grpc.aio.Channel | None:
        return self._channel

    async def _target(self) -> str:
        if not self.address.others:
            return self.address.place  # all addresses of a name are found by grpc itself, and found anew
        # Only bare addresses may stand side by side in a target.
        ask = asyncio.get_running_loop().getaddrinfo
        four, six = [], []
        for host, port in self.address.hosts:
            for family, *_, place in await ask(host, port, type=socket.SOCK_STREAM):
                if family == socket.AF_INET:
                    four.append(f"{place[0]}:{port}")
                else:
                    six.append(f"[{place[0]}]:{port}")
        return f"ipv4:{','.join(four)}" if four else f"ipv6:{','.join(six)}"

    def _new_channel(self, where: str) -> grpc.aio.Channel:
        options = self.options
        settings: list[tuple[str, int | str]] = [
            *options.channel(),
            ("grpc.use_local_subchannel_pool", 1),  # closing it ends its connection, whoever else calls that address
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.service_config", _IN_TURN),
        ]
        if options.keepalive is not None:
            settings += [("grpc.keepalive_time_ms", int(options.keepalive * 1000)), ("grpc.keepalive_timeout_ms", 5000)]
        if self.address.scheme != "grpcs":
            return grpc.aio.insecure_channel(where, settings)
        if options.server_name or self.address.others:
            settings.append(("grpc.ssl_target_name_override", options.server_name or self.address.host))
        key, certificate, authority = (options.pem(name) for name in ("keyfile", "certfile", "cafile"))
        return grpc.aio.secure_channel(where, grpc.ssl_channel_credentials(authority, key, certificate), settings)

    def _method(self, route: str) -> Method:
        known = self._methods.get(route)
        if known is None:
            known = self._methods[route] = rpc(self._protos, self.options.rpcs, route, self.service)
        return known

    def _starter(self, method: Method) -> Any:
        start = self._starters.get(method.path)
        if start is None:
            if self._channel is None:
                raise Unavailable(f"The client of {self.service} is closed.", code="closed")
            kinds = {
                (False, False): self._channel.unary_unary,
                (False, True): self._channel.unary_stream,
                (True, False): self._channel.stream_unary,
                (True, True): self._channel.stream_stream,
            }
            kind = kinds[method.client_streaming, method.server_streaming]
            start = self._starters[method.path] = kind(method.path)
        return start

    def _begin(self, method: Method, data: Any, context: RpcContext) -> _Running:
        start = self._starter(method)
        self._count += 1
        context.id = id = f"{self._prefix}{self._count:x}"
        running = _Running()
        body = running.noting(_bodies(method, data)) if method.client_streaming else _body(method, data)
        running.call = start(body, timeout=context.remaining(), metadata=to_metadata(context.metadata, id))
        self._pending[id] = running  # type: ignore[assignment]
        return running

    @contextmanager
    def _watching(self, running: _Running, context: RpcContext) -> Iterator[None]:
        """End a call when its caller leaves it, and say why it ended in our own words."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from error
        except asyncio.CancelledError:
            if running.error is not None:
                raise running.error from None
            raise
        finally:
            self._pending.pop(context.id or "", None)
            running.end()

    def _failed(self, error: grpc.aio.AioRpcError) -> RpcException:
        if error.code() is grpc.StatusCode.UNAVAILABLE and self.status is Status.CONNECTED:
            self.status = Status.DISCONNECTED
        return from_status(error, self.service)


class LocalGrpcClient(LocalClient):
    """Calls the gRPC methods of a service that lives in this process, through the same message types."""

    def __init__(self, dispatcher: Dispatcher, files: Protos) -> None:
        super().__init__(dispatcher)
        self._protos = files
        self._routes = {files.method(name).path: route for name, route in dispatcher.methods.items()}
        self._methods: dict[str, Method] = {}

    async def publish(self, request: Request, context: RpcContext) -> None:
        method = rpc(self._protos, {}, context.pattern, self.service)
        if method.path not in self._routes:
            raise NoHandler()
        data: Any = requests(
            method, _bodies(method, request.data) if method.client_streaming else _body(method, request.data)
        )
        metadata = {} if request.metadata is UNSET else request.metadata
        packet = Packet(data=data, metadata=dict(metadata), id=Raw(codec.encode(request.id)))
        receive = partial(self._receive, method, request.id)
        answer = _Answer(method, receive)
        task = self._dispatcher.dispatch(
            packet, answer.take, transport=self.scheme, peer="", route=self._routes[method.path]
        )
        working = asyncio.get_running_loop().create_task(self._finish(request.id, task, answer, receive))
        self._requests[request.id] = working
        working.add_done_callback(lambda _: self._requests.pop(request.id, None))

    def _receive(self, method: Method, id: str, body: bytes) -> asyncio.Future[None] | None:
        return self.receive(Reply(id=id, response=_json(method, body)))

    async def _finish(
        self,
        id: str,
        task: asyncio.Task[Any] | None,
        answer: _Answer,
        receive: Callable[[bytes], asyncio.Future[None] | None],
    ) -> None:
        if task is not None:
            await task
        if answer.error is not None:
            err = codec.decode(codec.encode(answer.error.to_wire()))
            self.receive(Reply(id=id, err=err, is_disposed=True))
            return
        for body in answer.bodies:
            full = receive(body)
            if full is not None:
                await full
        self.receive(Reply(id=id, is_disposed=True))


def _body(method: Method, data: Any) -> bytes:
    try:
        value = plain(data)
    except codec.UNENCODABLE as error:
        raise codec.not_json(error) from error
    return method.request.encode(value, strict=True)


async def _bodies(method: Method, values: Any) -> AsyncIterator[bytes]:
    if not isinstance(values, AsyncIterable):
        raise RpcException({"statusCode": 400, "code": "no-stream", "message": f"{method.path} takes a stream."})
    async for value in values:
        yield _body(method, value)


def _json(method: Method, body: bytes) -> Raw:
    try:
        return Raw(codec.encode(method.response.decode(body, nulls=True)))
    except InvalidPayload as error:
        raise RpcException({"statusCode": 502, "code": "bad-answer", "message": f"{method.path}: {error}"}) from error
