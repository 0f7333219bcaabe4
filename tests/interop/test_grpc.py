"""Over gRPC, NestJS and ourselves understand each other, whoever calls whom: by the shop's own .proto files."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from microservices import DeadlineExceeded, NoHandler, RpcException
from microservices.client import Client
from microservices.stubs import GrpcServices
from microservices.transports import Address, protos
from microservices.transports.grpc import GrpcClient
from tests.interop.nest import NestClient, free_port, nest_client, nest_server
from tests.system.shop import MANAGE, ROOT, Shop

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
]

PROTO = str(ROOT / "proto")
ADA = {"id": "1", "name": "Ada é😀", "email": "ada@example.org"}


# NestJS calls us: the shop's real `grpcserve`


@pytest.fixture(scope="module")
def shop(node_modules: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A shop that serves gRPC alone, with its thirty users and twenty products."""
    shop = Shop(tmp_path_factory.mktemp("shop"))
    for command in ("migratefleet", "seed_users", "seed_products"):
        env = {**os.environ, **shop.env}
        subprocess.run([*MANAGE, command], env=env, cwd=ROOT, check=True, capture_output=True, timeout=60)
    shop.start("grpcserve").until_says("ready")
    yield shop
    shop.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def nest(shop: Shop) -> AsyncIterator[NestClient]:
    """NestJS's ClientGrpc of the shop."""
    async with nest_client(f"grpc://127.0.0.1:{shop.grpc_port}") as client:
        yield client


@pytest.fixture(scope="module")
def product_id(shop: Shop) -> str:
    """A product of the shop."""
    command = [*MANAGE, "send", "--raw", "orders", "get_products", '{"limit": 1}']
    env = {**os.environ, **shop.env, "LOG_LEVEL": "ERROR"}
    told = subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, timeout=30).stdout
    return str(json.loads(told)["products"][0]["id"])


async def some_order(nest: NestClient, product_id: str) -> dict[str, Any]:
    """Place an order by gRPC."""
    [users] = (await nest.call("UsersService", "findAll", {})).values
    request = {
        "customer": users["users"][0],
        "lines": [{"product_id": product_id, "quantity": 1}],
        "payment_token": "tok_ok",
        "idempotency_key": "k",
    }
    answer = await nest.call("OrdersService", "createOrder", request)
    assert answer.error is None
    [order] = answer.values
    return dict(order)


async def test_nest_reads_our_users(nest: NestClient) -> None:
    [everyone] = (await nest.call("UsersService", "FindAll", {})).values
    [one] = (await nest.call("UsersService", "findOne", {"id": everyone["users"][0]["id"]})).values

    assert len(everyone["users"]) >= 30
    assert one == everyone["users"][0]
    assert set(one) == {"id", "name", "email"}


async def test_nest_creates_a_user_of_ours(nest: NestClient) -> None:
    given = {"name": "Zoë 😀", "email": "zoe@example.org", "password": "long enough"}

    [created] = (await nest.call("UsersService", "createUser", given, metadata={"trace-id": "7"})).values
    again = await nest.call("UsersService", "createUser", given)

    assert (created["name"], created["email"]) == ("Zoë 😀", "zoe@example.org")
    assert (again.error["code"], again.error["object"]["statusCode"]) == (6, 409)  # ALREADY_EXISTS


async def test_nest_is_told_our_errors_by_status_and_whole(nest: NestClient) -> None:
    unknown = await nest.call("UsersService", "findOne", {"id": "nope"})
    invalid = await nest.call("UsersService", "createUser", {"name": "A", "email": "a@b.org", "password": "x"})

    assert unknown.error["code"] == 5  # NOT_FOUND
    assert unknown.error["details"] == "There is no such user."
    assert unknown.error["object"] == {
        "statusCode": 404,
        "code": "user-not-found",
        "message": "There is no such user.",
    }
    assert invalid.error["code"] == 3  # INVALID_ARGUMENT
    assert [error["pointer"] for error in invalid.error["object"]["errors"]] == ["/password"]


async def test_nest_takes_a_stream_of_ours_to_its_end_or_leaves_it(nest: NestClient, product_id: str) -> None:
    order = await some_order(nest, product_id)

    all_orders = await nest.call("OrdersService", "findAll", {"user_id": order["user_id"]})
    nobodys = await nest.call("OrdersService", "findAll", {"user_id": "nobody"})
    watched = await nest.call("OrdersService", "watchOrder", {"id": order["id"]}, first=1)

    assert order["id"] in [found["id"] for found in all_orders.values]
    assert all_orders.values[0]["total"] == all_orders.values[0]["lines"][0]["unit_price"]
    assert nobodys.values == []
    assert [found["status"] for found in watched.values] == ["confirmed"]


async def test_a_deadline_of_nests_ends_what_we_do(nest: NestClient, product_id: str) -> None:
    order = await some_order(nest, product_id)

    answer = await nest.call("OrdersService", "watchOrder", {"id": order["id"]}, deadline=300)

    assert len(answer.values) == 1
    assert answer.error["code"] == 4  # DEADLINE_EXCEEDED


async def test_nest_is_told_at_once_of_a_stream_of_what_is_not_there(nest: NestClient) -> None:
    answer = await nest.call("OrdersService", "watchOrder", {"id": "nope"})

    assert (answer.values, answer.error["code"]) == ([], 5)


async def test_nest_is_told_of_a_service_that_we_do_not_serve_here(shop: Shop) -> None:
    shop.start("grpcserve", "users").until_says("ready")
    async with nest_client(f"grpc://127.0.0.1:{shop.env['USERS_GRPC_PORT']}") as nest:
        served = await nest.call("UsersService", "findAll", {})
        unserved = await nest.call("OrdersService", "findOne", {"id": "1"})

    assert served.error is None
    assert (unserved.values, unserved.error["code"]) == ([], 12)  # UNIMPLEMENTED


async def test_nest_gets_each_of_200_concurrent_answers_for_its_own_call(nest: NestClient) -> None:
    [everyone] = (await nest.call("UsersService", "findAll", {})).values
    asked = [everyone["users"][number % 30] for number in range(200)]

    answers = await asyncio.gather(*(nest.call("UsersService", "findOne", {"id": user["id"]}) for user in asked))

    assert [answer.values for answer in answers] == [[user] for user in asked]


# Any other client calls us: it knows no .proto file


async def test_a_client_without_our_proto_files_learns_them_from_us(shop: Shop) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{shop.grpc_port}") as channel:
        listed = await reflected(channel, list_services="")
        described = await reflected(channel, file_containing_symbol="users.UsersService")
        pool = DescriptorPool()
        for file in described.file_descriptor_response.file_descriptor_proto:
            pool.AddSerializedFile(file)
        nothing, users = (GetMessageClass(pool.FindMessageTypeByName(f"users.{name}")) for name in ("Empty", "Users"))
        find_all = channel.unary_unary("/users.UsersService/FindAll", response_deserializer=users.FromString)
        everyone = await find_all(nothing().SerializeToString(), timeout=5)

    assert {service.name for service in listed.list_services_response.service} >= {
        "grpc.health.v1.Health",
        "orders.OrdersService",
        "payments.PaymentsService",
        "users.UsersService",
    }
    assert len(everyone.users) >= 30


async def reflected(channel: grpc.aio.Channel, **question: str) -> Any:
    """Ask a server about itself."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(**question)
    [answer] = [answer async for answer in stub.ServerReflectionInfo(iter([request]), timeout=5)]
    return answer


# We call NestJS


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def nest_grpc_port(node_modules: None) -> AsyncIterator[int]:
    """The port of NestJS's gRPC server."""
    port = free_port()
    async with nest_server(f"grpc://127.0.0.1:{port}"):
        yield port


@pytest_asyncio.fixture(loop_scope="session")
async def client(nest_grpc_port: int) -> AsyncIterator[Client]:
    """Our client of it; `get_user` is mapped to an RPC."""
    options = {"proto_path": [PROTO], "rpcs": {"get_user": "UsersService/FindOne"}}
    address = Address("grpc", "127.0.0.1", nest_grpc_port, options)
    client = Client("nest", lambda: GrpcClient(address, "nest"))
    yield client
    await client.close()


@pytest.fixture
def services(client: Client) -> GrpcServices:
    """Its services as objects."""
    return GrpcServices(client, protos.load((PROTO,)))


async def test_we_read_nests_users(services: GrpcServices) -> None:
    users = services.service("UsersService")

    assert await users.FindOne({"id": "1"}) == ADA
    assert await users.find_all({}) == {"users": [ADA, {**ADA, "id": "2"}]}
    created = await users.createUser({"name": "é", "email": "e@example.org", "password": "x"})
    assert created == {"id": "3", "name": "é", "email": "e@example.org"}


async def test_a_pattern_is_sent_by_the_rpc_that_it_is_mapped_to(client: Client) -> None:
    assert await client.send({"cmd": "get_user"}, {"id": "1"}) == ADA
    with pytest.raises(RpcException, match="update_user is no RPC") as caught:
        await client.send({"cmd": "update_user"}, {"id": "1"})
    assert caught.value.status_code == 501


@pytest.mark.parametrize(
    ("id", "status", "text"),
    [("nobody", 404, "nf"), ("text", 500, "boom"), ("bug", 500, "Internal server error")],
)
async def test_we_are_told_nests_errors(services: GrpcServices, id: str, status: int, text: str) -> None:
    with pytest.raises(RpcException, match=text) as caught:
        await services.service("UsersService").FindOne({"id": id})

    assert caught.value.status_code == status


async def test_a_method_that_nest_does_not_serve_is_no_handler(services: GrpcServices) -> None:
    with pytest.raises(NoHandler):
        await services.service("OrdersService").CancelOrder({"id": "1"})


async def test_we_take_a_stream_of_nests_and_the_error_at_its_end(services: GrpcServices) -> None:
    orders = services.service("OrdersService")

    whole = [order["id"] async for order in orders.FindAll({})]
    broken = orders.FindAll({"status": "broken"})
    values = [(await anext(broken))["total"], (await anext(broken))["total"]]
    with pytest.raises(RpcException, match="broken"):
        await anext(broken)

    assert whole == ["1", "2"]
    assert values == [2**53 - 1] * 2


async def test_nest_notices_that_we_leave_a_stream(services: GrpcServices) -> None:
    orders = services.service("OrdersService")
    before = (await orders.FindOne({"id": "1"}))["id"]

    watching = orders.WatchOrder({"id": "7"})
    first = await anext(watching)
    await watching.aclose()
    async with asyncio.timeout(5):
        while (await orders.FindOne({"id": "1"}))["id"] == before:  # until the cancellation has arrived
            pass

    assert first["id"] == "7"


async def test_a_call_that_nest_answers_too_late_ends_at_its_deadline(services: GrpcServices) -> None:
    started = asyncio.get_running_loop().time()

    with pytest.raises(DeadlineExceeded):
        await services.service("UsersService").FindOne({"id": "slow"}, timeout=0.2)

    assert asyncio.get_running_loop().time() - started < 2


async def test_our_metadata_arrives_at_nest(services: GrpcServices) -> None:
    answer = await services.service("UsersService").FindOne({"id": "metadata"}, metadata={"trace-id": "abc"})

    assert answer["name"] == "abc"


async def test_200_calls_at_once_each_get_their_own_answer(services: GrpcServices) -> None:
    users = services.service("UsersService")

    answers = await asyncio.gather(*(users.FindOne({"id": f"u{number}"}) for number in range(200)))

    assert [answer["id"] for answer in answers] == [f"u{number}" for number in range(200)]
