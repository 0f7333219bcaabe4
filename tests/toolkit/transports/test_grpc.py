"""gRPC: the contract, each pattern mapped to an RPC of JSON values, and what only gRPC has."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from microservices.client import Client
from microservices.context import RpcContext
from microservices.dispatcher import Dispatcher
from microservices.exceptions import ConfigurationError, ConnectionLost, NoHandler, RpcException, Unavailable
from microservices.handlers import _DOORS, Colour, Handler, doors_of, grpc_method
from microservices.stubs import GrpcServices
from microservices.transports import Address, load, parse, protos
from microservices.transports.base import ClientProxy, Status
from microservices.transports.grpc import GrpcClient, GrpcServer, LocalGrpcClient
from microservices.transports.statuses import from_metadata, from_status, to_status
from tests.toolkit.conftest import service
from tests.toolkit.transports.certificates import Authority
from tests.toolkit.transports.contract import PATIENCE, RequestContract

PROTO = """
syntax = "proto3";
package shop.v1;
import "google/protobuf/struct.proto";
service Shop {
%s
}
"""
NUMBERS = """
syntax = "proto3";
package numbers;
service Numbers {
  rpc Square (Number) returns (Number) {}
  rpc Sum (stream Number) returns (Number) {}
  rpc Count (Number) returns (stream Number) {}
  rpc Doubled (stream Number) returns (stream Number) {}
  rpc Unserved (Number) returns (Number) {}
}
message Number { int64 value = 1; }
"""


TEXTS = """
syntax = "proto3";
package texts;
service Texts { rpc Flood (Text) returns (stream Text) {} }
message Text { string text = 1; }
"""


def doors_opened(functions: Sequence[Callable[..., Any]], folder: Path) -> dict[str, str]:
    """Give each handler of a pattern an RPC of its own; return the RPC of each pattern."""
    rpcs, lines = {}, []
    for number, function in enumerate(functions):
        routes = [door.route for door in doors_of(function) if door.kind != "grpc"]
        stream = "stream " if Handler(function).colour is Colour.STREAM else ""
        lines.append(f"  rpc M{number} (google.protobuf.Value) returns ({stream}google.protobuf.Value) {{}}")
        function.__dict__[_DOORS] = [door for door in doors_of(function) if door.kind != "grpc"]
        grpc_method("Shop", f"M{number}")(function)
        rpcs |= dict.fromkeys(routes, f"Shop/M{number}")
    (folder / "shop.proto").write_text(PROTO % "\n".join(lines), encoding="utf-8")
    return rpcs


class TestGrpc(RequestContract):
    nobody = RpcException  # 501: a pattern that is mapped to no RPC never leaves the caller
    bounded = False  # it refuses those that are too many
    most_ahead = 8000  # the windows of HTTP/2 and the kernel's buffers hold some megabytes

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    @asynccontextmanager
    async def talk(self, *functions: Callable[..., Any], **options: Any) -> AsyncIterator[Client]:
        self.rpcs = doors_opened(functions, self.folder)
        async with super().talk(*functions, **options) as client:
            yield client

    async def serve(self, dispatcher: Dispatcher) -> GrpcServer:
        server = GrpcServer(address(0, self.folder), dispatcher)
        await server.listen()
        return server

    def proxy(self, dispatcher: Dispatcher, server: GrpcServer) -> ClientProxy:
        return GrpcClient(address(server.port, self.folder, rpcs=self.rpcs), "shop")

    def served_as(self, pattern: str) -> str:
        return self.rpcs[pattern]


def address(port: int, protos: Path, **options: Any) -> Address:
    """Return an address on loopback, with .proto files."""
    return Address("grpc", "127.0.0.1", port, {"proto_path": [str(protos)], **options})


# The handlers of numbers.proto


class Number(msgspec.Struct):
    value: int


@grpc_method("Numbers")
def square(data: Number) -> Number:
    return Number(data.value**2)


@grpc_method("Numbers", "Sum")
async def add(data: AsyncIterator[Number]) -> Number:
    return Number(sum([number.value async for number in data]))


@grpc_method("Numbers")
def count(data: Number) -> list[Number]:
    return [Number(number) for number in range(data.value)]


@grpc_method("Numbers")
async def doubled(data: AsyncIterator[Number]) -> AsyncIterator[Number]:
    async for number in data:
        yield Number(number.value * 2)


async def stream_of(*numbers: Any) -> AsyncIterator[dict[str, Any]]:
    for number in numbers:
        yield {"value": number}


@pytest.fixture
def numbers_proto(tmp_path: Path) -> Path:
    """A folder with numbers.proto."""
    (tmp_path / "numbers.proto").write_text(NUMBERS, encoding="utf-8")
    return tmp_path


@asynccontextmanager
async def serving(folder: Path, *functions: Callable[..., Any], **options: Any) -> AsyncIterator[GrpcServer]:
    """Serve handlers of numbers.proto."""
    server = GrpcServer(address(0, folder, **options), service(*functions, name="numbers"))
    await server.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            yield server
    finally:
        await server.close(0)


@asynccontextmanager
async def calling(make: Callable[[], ClientProxy], folder: Path) -> AsyncIterator[Any]:
    """Give the service of numbers.proto as an object."""
    client = Client("numbers", make)
    try:
        async with asyncio.timeout(PATIENCE):
            yield GrpcServices(client, protos.load((str(folder),))).service("Numbers")
    finally:
        await client.close()


async def everything(numbers: Any) -> None:
    """Call each kind of RPC."""
    assert await numbers.Square({"value": 7}) == {"value": 49}
    assert await numbers.square({"value": 7}, returns=Number) == Number(49)
    assert await numbers.Sum(stream_of(1, 2, 3)) == {"value": 6}
    assert [answer["value"] async for answer in numbers.Count({"value": 3})] == [0, 1, 2]
    assert [answer["value"] async for answer in numbers.doubled(stream_of(1, 2))] == [2, 4]
    with pytest.raises(NoHandler):
        await numbers.Unserved({"value": 1})
    with pytest.raises(RpcException) as caught:
        await numbers.Square({"valeu": 1})
    assert [error["pointer"] for error in caught.value.errors] == ["/valeu"]
    with pytest.raises(RpcException, match="str does not fit"):
        await numbers.Sum(stream_of(1, "two"))
    with pytest.raises(RpcException, match="takes a stream"):
        await numbers.Sum({"value": 1})


@pytest.mark.asyncio
async def test_all_kinds_of_calls_reach_a_server(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square, add, count, doubled) as server,
        calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
    ):
        await everything(numbers)


@pytest.mark.asyncio
async def test_all_kinds_of_calls_reach_a_service_of_this_process(numbers_proto: Path) -> None:
    here = service(square, add, count, doubled, name="numbers")
    files = protos.load((str(numbers_proto),))

    async with calling(lambda: LocalGrpcClient(here, files), numbers_proto) as numbers:
        await everything(numbers)


@pytest.mark.asyncio
async def test_a_stream_of_requests_is_answered_while_it_goes_on(numbers_proto: Path) -> None:
    heard: asyncio.Queue[int] = asyncio.Queue()
    heard.put_nowait(1)

    async def questions() -> AsyncIterator[dict[str, int]]:
        while (number := await heard.get()) < 10:
            yield {"value": number}

    async with (
        serving(numbers_proto, doubled) as server,
        calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
    ):
        answers = []
        async for answer in numbers.Doubled(questions()):
            answers.append(answer["value"])
            heard.put_nowait(answer["value"] * 2)

    assert answers == [2, 8]


@pytest.mark.asyncio
async def test_a_request_that_is_no_message_is_refused_alone(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = channel.unary_unary("/numbers.Numbers/Square")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff\xff\xff")
        answer = await call(b"\x08\x03")

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert answer == b"\x08\x09"


@pytest.mark.asyncio
async def test_a_message_over_the_limit_is_refused_alone(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square, max_message_length=100) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = channel.unary_unary("/numbers.Numbers/Square")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x12" + b"\x64" + b"x" * 100)
        answer = await call(b"\x08\x03")

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert answer == b"\x08\x09"


@pytest.mark.asyncio
async def test_health_follows_what_is_announced(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        said = []
        for ready in (None, True, False):
            if ready is not None:
                await server.announce(ready)
            for name in ("", "numbers.Numbers"):
                said.append((await stub.Check(health_pb2.HealthCheckRequest(service=name))).status)

    assert said == [2, 2, 1, 1, 2, 2]


@pytest.mark.asyncio
async def test_several_services_of_a_process_share_a_port(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square) as server,
        calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
    ):
        await server.join(service(add, name="more"))

        assert await numbers.Square({"value": 2}) == {"value": 4}
        assert await numbers.Sum(stream_of(1, 2)) == {"value": 3}


@pytest.mark.asyncio
async def test_a_taken_port_is_an_error(numbers_proto: Path) -> None:
    async with serving(numbers_proto, square) as server:
        second = GrpcServer(address(server.port, numbers_proto), service(square))

        with pytest.raises(OSError, match="taken"):
            await second.listen()


@pytest.mark.asyncio
async def test_a_server_that_goes_fails_its_calls_and_is_found_again(numbers_proto: Path) -> None:
    started = asyncio.Event()

    @grpc_method("Numbers", "Square")
    async def never(data: Number) -> Number:
        started.set()
        await asyncio.Event().wait()
        return data

    async with serving(numbers_proto, never) as server:
        port = server.port
        proxy = GrpcClient(address(port, numbers_proto), "numbers")
        client = Client("numbers", lambda: proxy)
        waiting = asyncio.create_task(client.send("Numbers/Square", {"value": 1}))
        await started.wait()
    with pytest.raises(RpcException) as lost:
        await waiting
    with pytest.raises(RpcException) as gone:
        await client.send("Numbers/Square", {"value": 1})
    assert proxy.status is Status.DISCONNECTED
    server = GrpcServer(address(port, numbers_proto), service(square, name="numbers"))
    await server.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            answer = None
            while answer is None:
                try:
                    answer = await client.send("Numbers/Square", {"value": 3})
                except RpcException as error:
                    assert error.status_code == 503  # noqa: PT017 - until its next attempt to connect
                    await asyncio.sleep(0.02)
    finally:
        await client.close()
        await server.close(0)

    assert isinstance(lost.value, ConnectionLost) or lost.value.status_code in (499, 503)
    assert gone.value.status_code == 503
    assert answer == {"value": 9}


@pytest.mark.asyncio
async def test_what_is_no_ascii_travels_in_metadata_both_ways_known_to_grpc(numbers_proto: Path) -> None:
    seen: dict[str, str] = {}

    @grpc_method("Numbers", "Square")
    async def tell(data: Number, ctx: RpcContext) -> Number:
        seen.update(ctx.metadata)
        ctx.native.set_trailing_metadata((("cost", "7"),))
        return data

    async with serving(numbers_proto, tell) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary("/numbers.Numbers/Square")(
            b"\x08\x03", metadata=(("trace-id", "a"), ("name-bin", "é".encode()), ("odd-bin", b"\xff"))
        )
        await call
        trailing = dict(await call.trailing_metadata())

    assert seen == {"trace-id": "a", "name": "é"}
    assert trailing["cost"] == "7"


@pytest.mark.asyncio
async def test_a_name_that_metadata_cannot_have_fails_its_caller(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square) as server,
        calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
    ):
        with pytest.raises(RpcException, match="no name"):
            await numbers.Square({"value": 1}, metadata={"tr ace": "1"})
        assert await numbers.Square({"value": 1}, metadata={"Trace-Id": "1"}) == {"value": 1}


@pytest.mark.asyncio
async def test_the_deadline_of_any_client_reaches_the_handler(numbers_proto: Path) -> None:
    left: list[float | None] = []
    cancelled = asyncio.Event()

    @grpc_method("Numbers", "Square")
    async def slow(data: Number, ctx: RpcContext) -> Number:
        left.append(ctx.remaining())
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return data

    async with serving(numbers_proto, slow) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/numbers.Numbers/Square")(b"", timeout=0.1)
        await cancelled.wait()

    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert left[0] is not None
    assert 0 < left[0] <= 0.1


@pytest.mark.asyncio
async def test_a_caller_who_cancels_ends_the_handler(numbers_proto: Path) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    @grpc_method("Numbers", "Square")
    async def slow(data: Number) -> Number:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return data

    async with (
        serving(numbers_proto, slow) as server,
        calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
    ):
        call = asyncio.create_task(numbers.Square({"value": 1}))
        await started.wait()
        call.cancel()
        await cancelled.wait()


@pytest.mark.asyncio
async def test_a_pattern_without_an_rpc_is_told_what_there_is(numbers_proto: Path) -> None:
    proxy = GrpcClient(address(1, numbers_proto, rpcs={"square": "Numbers/Square"}), "numbers")
    client = Client("numbers", lambda: proxy)

    with pytest.raises(RpcException, match="get_cube is no RPC of numbers: its `rpcs` map square") as caught:
        await client.send({"cmd": "get_cube"}, 3)
    await client.close()

    assert caught.value.status_code == 501


@pytest.mark.asyncio
async def test_tls_is_spoken_with_those_whom_the_authority_knows(numbers_proto: Path, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path.parent)
    server_side = {**authority.issue("numbers")._asdict(), "cafile": authority.cafile}
    friend = {**authority.issue("caller")._asdict(), "cafile": authority.cafile}
    server = GrpcServer(address(0, numbers_proto, **server_side)._replace(scheme="grpcs"), service(square))
    await server.listen()
    outcomes = []
    try:
        async with asyncio.timeout(PATIENCE):
            for options in (
                friend,
                {**friend, "server_name": "numbers"},
                {"cafile": authority.cafile},
                {**friend, "cafile": stranger.cafile},
            ):
                secure = address(server.port, numbers_proto, **options)._replace(scheme="grpcs")
                async with calling(lambda secure=secure: GrpcClient(secure, "numbers"), numbers_proto) as numbers:
                    try:
                        outcomes.append((await numbers.Square({"value": 3}))["value"])
                    except RpcException as error:
                        outcomes.append(error.status_code)
    finally:
        await server.close(0)

    assert outcomes == [9, 9, 503, 503]


def test_grpcs_without_a_certificate_is_refused(numbers_proto: Path) -> None:
    server = GrpcServer(address(0, numbers_proto)._replace(scheme="grpcs"), service(square))
    unreadable = GrpcServer(
        address(0, numbers_proto, certfile="no", keyfile="no")._replace(scheme="grpcs"), service(square)
    )

    with pytest.raises(ConfigurationError, match="needs a certfile and a keyfile"):
        asyncio.run(server.listen())
    with pytest.raises(ConfigurationError, match="keyfile 'no' cannot be read"):
        asyncio.run(unreadable.listen())


def test_handlers_and_rpcs_that_stream_differently_are_refused(numbers_proto: Path) -> None:
    @grpc_method("Numbers", "Sum")
    def one(data: Number) -> Number:
        return data

    @grpc_method("Numbers", "Square")
    async def many(data: Number) -> AsyncIterator[Number]:
        yield data

    for function, complaint in ((one, "a stream of requests"), (many, "has one answer")):
        server = GrpcServer(address(0, numbers_proto), service(function))
        with pytest.raises(ConfigurationError, match=complaint):
            asyncio.run(server.join(server.dispatcher))


def test_a_method_that_no_file_declares_is_refused(numbers_proto: Path) -> None:
    @grpc_method("Numbers", "Cube")
    def cube(data: Number) -> Number:
        return data

    server = GrpcServer(address(0, numbers_proto), service(cube))

    with pytest.raises(ConfigurationError, match="no RPC 'Cube'; it has Square, Sum"):
        asyncio.run(server.join(server.dispatcher))


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        ("boom", grpc.StatusCode.UNKNOWN, "boom"),
        ({"code": 5, "message": "nf"}, grpc.StatusCode.NOT_FOUND, "nf"),
        ({"code": 3, "message": "m", "details": "d"}, grpc.StatusCode.INVALID_ARGUMENT, "d"),
        ({"statusCode": 402, "code": "declined", "message": "no"}, grpc.StatusCode.FAILED_PRECONDITION, "no"),
        ({"statusCode": 409, "code": "email-taken", "message": "no"}, grpc.StatusCode.ALREADY_EXISTS, "no"),
        ({"statusCode": 404, "code": "x", "message": "é"}, grpc.StatusCode.NOT_FOUND, "é"),
        ({"statusCode": 503, "code": "x", "message": "m"}, grpc.StatusCode.UNAVAILABLE, "m"),
        ({"statusCode": 418, "code": "x", "message": "m"}, grpc.StatusCode.FAILED_PRECONDITION, "m"),
        ("Internal server error", grpc.StatusCode.INTERNAL, "Internal server error"),
    ],
)
def test_an_error_has_a_status_and_comes_back_whole(error: Any, code: grpc.StatusCode, details: str) -> None:
    status, told, trailing = to_status(RpcException(error))
    back = from_status(failed(status, told, trailing), "shop")

    assert (status, told) == (code, details)
    numeric = isinstance(error, dict) and isinstance(error["code"], int)
    assert back.error == (error | {"statusCode": back.status_code} if numeric else error)
    assert not numeric or back.status_code in (400, 404)


def test_an_error_too_large_for_metadata_keeps_its_status_and_its_word() -> None:
    error = {"statusCode": 409, "code": "odd", "message": "m", "errors": [{"pointer": "/x", "message": "y" * 5000}]}

    status, told, trailing = to_status(RpcException(error))
    back = from_status(failed(status, told, trailing), "shop")

    assert back.error == {"statusCode": 409, "code": "odd", "message": "m"}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 400),
        (grpc.StatusCode.NOT_FOUND, 404),
        (grpc.StatusCode.ABORTED, 409),
        (grpc.StatusCode.UNIMPLEMENTED, 502),
        (grpc.StatusCode.UNAVAILABLE, 503),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
        (grpc.StatusCode.CANCELLED, 499),
        (grpc.StatusCode.UNKNOWN, 500),
        (grpc.StatusCode.DATA_LOSS, 500),
    ],
)
def test_a_foreign_status_has_a_status_code(code: grpc.StatusCode, status: int) -> None:
    assert from_status(failed(code, "text", ()), "shop").status_code == status


def failed(code: grpc.StatusCode, details: str, trailing: Any) -> grpc.aio.AioRpcError:
    """Return what a client is told of a call."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


@pytest.mark.asyncio
async def test_reflection_tells_of_all_services_that_have_joined(
    numbers_proto: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (numbers_proto / "more.proto").write_text(NUMBERS.replace("package numbers", "package more"), encoding="utf-8")
    described = reflection_pb2.ServerReflectionRequest(list_services="")
    found = reflection_pb2.ServerReflectionRequest(file_containing_symbol="more.Number")

    @grpc_method("numbers.Numbers", "Square")
    def one(data: Number) -> Number:
        return data

    @grpc_method("more.Numbers", "Square")
    def two(data: Number) -> Number:
        return data

    async with (
        serving(numbers_proto, one, reflection=True) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        await server.join(service(two, name="more"))
        await server.announce(True)
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([described, found]))]

    names = {listed.name for listed in answers[0].list_services_response.service}
    assert names >= {"numbers.Numbers", "more.Numbers", "grpc.health.v1.Health"}
    assert b"more" in answers[1].file_descriptor_response.file_descriptor_proto[0]
    assert "Cannot register" not in caplog.text


@pytest.mark.asyncio
async def test_metadata_over_the_limit_is_refused_alone(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square, max_metadata_size=1024) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = channel.unary_unary("/numbers.Numbers/Square")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x08\x03", metadata=(("large", "x" * 4096),))
        answer = await call(b"\x08\x03")

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert answer == b"\x08\x09"


@pytest.mark.asyncio
async def test_calls_over_the_limit_are_refused_at_once(numbers_proto: Path) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    @grpc_method("Numbers", "Square")
    async def slow(data: Number) -> Number:
        started.set()
        await go_on.wait()
        return data

    async with (
        serving(numbers_proto, slow, max_in_flight=1) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = channel.unary_unary("/numbers.Numbers/Square")
        first = call(b"\x08\x03")
        await started.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x08\x03")
        go_on.set()

        assert await first == b"\x08\x03"
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# Peers that speak HTTP/2 and know no manners (RFC 9113)

SETTINGS, PING, GOAWAY = 4, 6, 7
MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 3, 6
ENHANCE_YOUR_CALM = 11


def http2(kind: int, body: bytes = b"") -> bytes:
    """Return a frame for the connection itself."""
    return len(body).to_bytes(3, "big") + bytes([kind, 0]) + (0).to_bytes(4, "big") + body


HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2(SETTINGS)


async def heard(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, bytes]]:
    """Yield the kind and the body of each frame, until the connection ends."""
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readexactly(9)
            yield head[3], await reader.readexactly(int.from_bytes(head[:3]))


@asynccontextmanager
async def raw(server: GrpcServer) -> AsyncIterator[tuple[AsyncIterator[tuple[int, bytes]], asyncio.StreamWriter]]:
    """Connect without grpc; gives the frames that come, and what writes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield heard(reader), writer
    finally:
        writer.transport.abort()


@pytest.mark.asyncio
async def test_a_peer_is_told_how_many_calls_and_how_much_metadata_there_may_be(numbers_proto: Path) -> None:
    async with serving(numbers_proto, square) as server, raw(server) as (frames, writer):
        writer.write(HELLO)
        kind, body = await anext(frames)

    settings = {
        int.from_bytes(body[at : at + 2]): int.from_bytes(body[at + 2 : at + 6]) for at in range(0, len(body), 6)
    }
    assert kind == SETTINGS
    assert (settings[MAX_CONCURRENT_STREAMS], settings[MAX_HEADER_LIST_SIZE]) == (100, 8192)


@pytest.mark.asyncio
async def test_a_peer_that_pings_without_end_is_sent_away(numbers_proto: Path) -> None:
    async with serving(numbers_proto, square) as server, raw(server) as (frames, writer):
        writer.write(HELLO + http2(PING, b"are you?") * 8)
        farewells = [body async for kind, body in frames if kind == GOAWAY]

    assert [int.from_bytes(body[4:8]) for body in farewells] == [ENHANCE_YOUR_CALM]


@pytest.mark.asyncio
async def test_a_connection_is_ended_when_it_is_old(numbers_proto: Path) -> None:
    ages = {"max_connection_age": 0.1, "max_connection_age_grace": 0.1}
    async with serving(numbers_proto, square, **ages) as server, raw(server) as (frames, writer):
        writer.write(HELLO)
        farewells = [body async for kind, body in frames if kind == GOAWAY]

    assert b"max_age" in farewells[0]


@pytest.mark.asyncio
@pytest.mark.parametrize("first", [b"", HELLO[:8], HELLO[:24]], ids=["nothing", "half a preface", "no settings"])
async def test_a_peer_that_never_says_what_it_wants_is_sent_away(numbers_proto: Path, first: bytes) -> None:
    async with serving(numbers_proto, square, handshake_timeout=0.1) as server, raw(server) as (frames, writer):
        writer.write(first)
        kinds = [kind async for kind, _ in frames]

    assert kinds[-1:] in ([], [GOAWAY])  # it has ended


@pytest.mark.asyncio
async def test_connections_over_the_limit_are_hung_up_until_there_is_room(numbers_proto: Path) -> None:
    async with serving(numbers_proto, square, max_connections=1) as server:
        async with raw(server) as (frames, writer), raw(server) as (others, other):
            writer.write(HELLO)
            assert (await anext(frames))[0] == SETTINGS
            other.write(HELLO)
            assert [kind async for kind, _ in others] == []

        async with (
            asyncio.timeout(PATIENCE),
            calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
        ):
            answer = None
            while answer is None:  # until gRPC has seen that the first one is gone
                with suppress(Unavailable):
                    answer = await numbers.Square({"value": 3})
                await asyncio.sleep(0)  # or a refusal at once would leave no turn to the timeout
            assert answer == {"value": 9}


@pytest.mark.asyncio
async def test_nobody_is_told_of_the_services_unless_asked_for(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        await server.announce(True)
        for name in ("grpc.reflection.v1alpha.ServerReflection", "grpc.channelz.v1.Channelz"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{name}/ServerReflectionInfo")(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.asyncio
@pytest.mark.parametrize("message", ["\ud83d cut", "漢" * 1000, "😀" * 1000, "é" * 5000])
async def test_an_error_in_any_script_is_answered_with_its_code(numbers_proto: Path, message: str) -> None:
    @grpc_method("Numbers", "Square")
    async def fail(data: Number) -> Number:
        raise RpcException({"statusCode": 404, "code": "my-code", "message": message})

    async with (
        serving(numbers_proto, fail) as server,
        calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
    ):
        with pytest.raises(RpcException) as caught:
            await numbers.Square({"value": 1})

    assert (caught.value.status_code, caught.value.code) == (404, "my-code")
    assert caught.value.message[:4] == message[:4]


@pytest.mark.asyncio
async def test_who_leaves_a_stream_that_waits_for_him_is_no_error(
    numbers_proto: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (numbers_proto / "texts.proto").write_text(TEXTS, encoding="utf-8")
    sent, ended = 0, asyncio.Event()

    @grpc_method("Texts", "Flood")
    async def flood(data: Any) -> AsyncIterator[dict[str, str]]:
        nonlocal sent
        try:
            while True:
                yield {"text": "x" * 100_000}
                sent += 1
        finally:
            ended.set()

    async with (
        serving(numbers_proto, flood) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = channel.unary_stream("/texts.Texts/Flood")(b"")
        await call.read()
        before = -1
        while sent != before:  # until the windows are full
            before = sent
            await asyncio.sleep(0.05)
        call.cancel()
        await ended.wait()

    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.asyncio
async def test_requests_that_nobody_takes_any_more_are_not_waited_for(numbers_proto: Path) -> None:
    @grpc_method("Numbers", "Sum")
    async def first(data: AsyncIterator[Number]) -> Number:
        return await anext(data)

    async def endless() -> AsyncIterator[dict[str, int]]:
        yield {"value": 7}
        await asyncio.Event().wait()

    async with (
        serving(numbers_proto, first) as server,
        calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
    ):
        await numbers.Sum(stream_of(1))
        before = len(asyncio.all_tasks())
        answers = [await numbers.Sum(endless()) for _ in range(5)]
        while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - of grpc's own tasks
            await asyncio.sleep(0.01)  # the fixture's time-out ends it

    assert answers == [{"value": 7}] * 5


@pytest.mark.asyncio
async def test_a_long_list_is_taken_whole_from_a_service_of_this_process(numbers_proto: Path) -> None:
    here = service(count, name="numbers")
    files = protos.load((str(numbers_proto),))

    async with calling(lambda: LocalGrpcClient(here, files), numbers_proto) as numbers:
        values = [answer["value"] async for answer in numbers.Count({"value": 5000})]

    assert values == list(range(5000))


@pytest.mark.asyncio
async def test_who_watches_the_health_does_not_hold_up_the_end(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        started = asyncio.get_running_loop().time()
        await server.close(PATIENCE)
        took = asyncio.get_running_loop().time() - started

    assert took < PATIENCE / 2


@pytest.mark.asyncio
async def test_an_answer_that_does_not_fit_is_the_servers_fault(
    numbers_proto: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @grpc_method("Numbers", "Square")
    async def odd(data: Number) -> Any:
        return {"value": "seven"}

    async with (
        serving(numbers_proto, odd) as server,
        calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
    ):
        with pytest.raises(RpcException, match="Internal server error") as caught:
            await numbers.Square({"value": 1})

    assert caught.value.status_code == 500
    assert "/numbers.Numbers/Square does not fit at /value" in caplog.text


@pytest.mark.asyncio
async def test_an_answer_that_is_no_message_is_a_bad_answer(numbers_proto: Path) -> None:
    async def nonsense(request: bytes, context: Any) -> bytes:
        return b"\xff\xff"

    server = grpc.aio.server()
    handlers = {"Square": grpc.unary_unary_rpc_method_handler(nonsense)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("numbers.Numbers", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with calling(lambda: GrpcClient(address(port, numbers_proto), "numbers"), numbers_proto) as numbers:
            with pytest.raises(RpcException) as caught:
                await numbers.Square({"value": 1})
    finally:
        await server.stop(None)

    assert (caught.value.status_code, caught.value.code) == (502, "bad-answer")


@pytest.mark.parametrize("told", ["[" * 4000, "null", "5", "[]", "{}", '"text"', '{"statusCode":"404"}', "no JSON"])
def test_an_odd_error_object_of_a_peer_leaves_the_status_as_it_is(told: str) -> None:
    error = from_status(failed(grpc.StatusCode.NOT_FOUND, "nf", (("rpc-error", told),)), "shop")

    assert (error.status_code, error.message) == (404, "nf")


@pytest.mark.parametrize(
    ("details", "sent"),
    [
        ("failed to connect to all addresses; last error: refused", False),
        ("connections to all backends failing; last error: refused", False),
        ("failed to connect to mail server", True),
        ("Socket closed", True),
    ],
)
def test_only_grpc_itself_can_tell_that_nothing_was_sent(details: str, sent: bool) -> None:
    error = from_status(failed(grpc.StatusCode.UNAVAILABLE, details, ()), "shop")

    assert isinstance(error, ConnectionLost) is sent


@pytest.mark.asyncio
async def test_what_is_too_large_can_never_succeed(numbers_proto: Path) -> None:
    async with (
        serving(numbers_proto, square, max_message_length=2) as server,
        calling(lambda: GrpcClient(address(server.port, numbers_proto), "numbers"), numbers_proto) as numbers,
    ):
        with pytest.raises(RpcException) as caught:
            await numbers.Square({"value": 2**40})

    assert (caught.value.status_code, caught.value.retryable) == (413, False)


@pytest.mark.asyncio
async def test_a_name_whose_address_is_taken_is_an_error(numbers_proto: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = GrpcServer(address(taken.getsockname()[1], numbers_proto)._replace(host="localhost"), service(square))

        with pytest.raises(OSError, match="taken"):
            await server.listen()


@pytest.mark.asyncio
async def test_reflection_bears_a_copy_of_healths_own_file(numbers_proto: Path) -> None:
    (numbers_proto / "grpc/health/v1").mkdir(parents=True)
    copy = 'syntax = "proto3";\npackage grpc.health.v1;\nmessage HealthCheckRequest { string name = 7; }\n'
    (numbers_proto / "grpc/health/v1/health.proto").write_text(copy, encoding="utf-8")

    async with serving(numbers_proto, square, reflection=True) as server:
        await server.announce(True)
        await server.announce(True)


@pytest.mark.asyncio
async def test_two_handlers_of_one_method_are_refused(numbers_proto: Path) -> None:
    @grpc_method("numbers.Numbers", "Square")
    def other(data: Number) -> Number:
        return data

    with pytest.raises(ConfigurationError, match="Two handlers"):
        await GrpcServer(address(0, numbers_proto), service(square, other)).listen()


def test_the_plain_name_of_metadata_wins_over_the_binary_one() -> None:
    pairs = (("identity-bin", b"mallory"), ("identity", "ada"), ("name-bin", "é".encode()))

    assert from_metadata(pairs) == {"identity": "ada", "name": "é"}


@pytest.mark.asyncio
async def test_calls_go_in_turn_to_all_addresses_and_past_one_that_is_gone(numbers_proto: Path) -> None:
    asked: list[str] = []

    def named(name: str) -> Callable[..., Any]:
        @grpc_method("Numbers", "Square")
        async def square(data: Number) -> Number:
            asked.append(name)
            return data

        return square

    servers = [GrpcServer(address(0, numbers_proto), service(named(name))) for name in ("one", "other")]
    for server in servers:
        await server.listen()
    both = address(servers[0].port, numbers_proto)._replace(others=(("localhost", servers[1].port),))
    try:
        async with asyncio.timeout(PATIENCE), calling(lambda: GrpcClient(both, "numbers"), numbers_proto) as numbers:
            while set(asked) != {"one", "other"}:  # the second connection may come a moment later
                await numbers.Square({"value": 3})
            asked.clear()
            for _ in range(10):
                await numbers.Square({"value": 3})
            in_turn = sorted(asked)
            await servers[0].close(0)
            asked.clear()
            answered = 0
            while answered < 10:
                with suppress(RpcException):  # the call that finds it gone
                    await numbers.Square({"value": 3})
                    answered += 1
    finally:
        for server in servers:
            await server.close(0)

    assert in_turn == ["one"] * 5 + ["other"] * 5
    assert set(asked) == {"other"}


def test_a_server_has_one_address(numbers_proto: Path) -> None:
    with pytest.raises(ConfigurationError, match="a server listens at one address, not at 2"):
        load(parse("grpc://127.0.0.1:5000,127.0.0.1:5001"), "server")
