"""gRPC as any client speaks it: beside the page, alone, in the fleet, and until the process ends."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from microservices.transports import protos
from tests.system.shop import PATIENCE, ROOT, Process, Shop, fleet, runserver, until

pytestmark = pytest.mark.slow

FILES = protos.load((str(ROOT / "proto"),))
SOON = 2.5  # seconds: without an event, a watcher looks again after five


class Peer:
    """A plain gRPC client: a channel, and bytes that the .proto files explain."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    def ask(self, rpc: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call an RPC and return its answer."""
        method = FILES.method(rpc)
        call: Any = self.channel.unary_unary(method.path)
        body = call(method.request.encode(data, strict=True), timeout=PATIENCE)
        answer: dict[str, Any] = method.response.decode(body)
        return answer

    def stream(self, rpc: str, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Call an RPC and return its answers as they come."""
        method = FILES.method(rpc)
        call: Any = self.channel.unary_stream(method.path)
        return map(method.response.decode, call(method.request.encode(data, strict=True), timeout=PATIENCE))

    def health(self, service: str = "") -> int:
        """Return what the health service says."""
        request = health_pb2.HealthCheckRequest(service=service)
        stub: Any = health_pb2_grpc.HealthStub(self.channel)
        return int(stub.Check(request, timeout=PATIENCE, wait_for_ready=True).status)


@pytest.fixture
def connect() -> Iterator[Any]:
    """Make peers whose channels are closed with the test."""
    peers: list[Peer] = []

    def connect(port: int) -> Peer:
        peers.append(Peer(port))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.channel.close()


@pytest.fixture
def peer(shop: Shop, connect: Any) -> Peer:
    """A peer of `grpcserve`, which serves all services on one port."""
    started(shop)
    peer: Peer = connect(shop.grpc_port)
    assert peer.health() == health_pb2.HealthCheckResponse.SERVING
    return peer


def started(shop: Shop, *names: str) -> Process:
    process = shop.start("grpcserve", *names)
    process.until_says("ready")
    return process


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def placed(shop: Shop, users: Peer, orders: Peer) -> dict[str, Any]:
    """Order something by gRPC; what there is to buy is looked up by HTTP."""
    product = httpx.get(f"{shop.url}/api/products", params={"limit": "1"}, timeout=20).json()["data"][0]
    customer = users.ask("UsersService/FindAll")["users"][0]
    lines = [{"product_id": product["id"], "quantity": 1}]
    return orders.ask("OrdersService/CreateOrder", {"customer": customer, "lines": lines, "payment_token": "tok_ok"})


def test_what_is_made_over_http_is_found_by_grpc_and_the_other_way_round(shop: Shop, peer: Peer) -> None:
    runserver(shop)
    everybody = peer.ask("UsersService/FindAll")["users"]

    with httpx.Client(base_url=shop.url, timeout=20) as http:
        zoe = http.post("/api/users", json={"name": "Zoë", "email": "zoe@example.org", "password": "long enough"})
        found = peer.ask("UsersService/FindOne", {"id": zoe.json()["id"]})
        yan = peer.ask(
            "UsersService/CreateUser", {"name": "Yan", "email": "yan@example.org", "password": "long enough"}
        )
        seen = http.get(f"/api/users/{yan['id']}").json()

    assert len(everybody) == 30
    assert found == {"id": zoe.json()["id"], "name": "Zoë", "email": "zoe@example.org"}
    assert (seen["id"], seen["name"], seen["email"]) == (yan["id"], "Yan", "yan@example.org")
    assert len(peer.ask("UsersService/FindAll")["users"]) == 32


def test_an_order_lives_by_grpc_alone(shop: Shop, peer: Peer) -> None:
    runserver(shop)
    order = placed(shop, peer, peer)
    another = placed(shop, peer, peer)

    listed = list(peer.stream("OrdersService/FindAll", {"user_id": order["user_id"], "status": "confirmed"}))
    watched = peer.stream("OrdersService/WatchOrder", {"id": order["id"]})
    first = next(watched)
    began = time.monotonic()
    cancelled = peer.ask("OrdersService/CancelOrder", {"id": order["id"]})
    *_, last = watched
    took = time.monotonic() - began

    assert [found["id"] for found in listed] == [another["id"], order["id"]]
    assert first == order
    assert (cancelled["status"], cancelled["refunded"]) == ("cancelled", order["total"])
    assert (last["status"], last["id"]) == ("cancelled", order["id"])
    assert took < SOON
    assert peer.ask("PaymentsService/FindOne", {"id": order["payment_id"]})["status"] == "refunded"


def test_money_is_held_taken_and_given_back_once_by_its_keys(peer: Peer) -> None:
    hold = {"order_id": "order", "user_id": "ada", "amount": 1250, "currency": "EUR", "payment_token": "tok_ok"}
    payment = peer.ask("PaymentsService/Authorize", hold | {"idempotency_key": "hold"})
    peer.ask("PaymentsService/Capture", {"id": payment["id"], "idempotency_key": "take"})

    refund = {"id": payment["id"], "amount": 250, "idempotency_key": "refund"}
    first, again = (peer.ask("PaymentsService/Refund", refund) for _ in range(2))

    assert first == again
    assert (first["amount"], first["status"], first["payment"]["status"]) == (250, "done", "part_refunded")


@pytest.mark.parametrize(
    ("rpc", "data", "code", "status"),
    [
        ("UsersService/FindOne", {"id": "nobody"}, grpc.StatusCode.NOT_FOUND, 404),
        ("OrdersService/CancelOrder", {"id": "nothing"}, grpc.StatusCode.NOT_FOUND, 404),
        ("PaymentsService/Refund", {"id": "x", "amount": 0}, grpc.StatusCode.INVALID_ARGUMENT, 400),
    ],
)
def test_mistakes_are_told_as_grpc_does(
    peer: Peer, rpc: str, data: dict[str, Any], code: grpc.StatusCode, status: int
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        peer.ask(rpc, data)

    error: Any = refused.value
    told = dict(error.trailing_metadata())
    assert error.code() is code
    assert json.loads(told["rpc-error"])["statusCode"] == status


def test_health_knows_each_service(peer: Peer) -> None:
    said = {name: peer.health(name) for name in FILES.services}

    assert said == dict.fromkeys(
        ("users.UsersService", "orders.OrdersService", "payments.PaymentsService"),
        health_pb2.HealthCheckResponse.SERVING,
    )


def test_a_process_that_is_told_to_end_takes_its_leave_of_those_who_watch(shop: Shop, peer: Peer) -> None:
    runserver(shop)
    watched = peer.stream("OrdersService/WatchOrder", {"id": placed(shop, peer, peer)["id"]})
    next(watched)
    process = shop.processes[0]

    process.signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError) as ended:
        next(watched)

    error: Any = ended.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "This process ends" in error.details()
    assert process.wait() == 0, process.output
    assert "Traceback" not in process.output


def test_a_named_service_is_served_on_its_own_port_and_nothing_else_is(shop: Shop, connect: Any) -> None:
    started(shop, "users")

    users = connect(int(shop.env["USERS_GRPC_PORT"]))

    assert len(users.ask("UsersService/FindAll")["users"]) == 30
    closed = [shop.grpc_port, shop.http_port, shop.users_port, shop.health_port]
    closed += [int(shop.env[f"{name}_GRPC_PORT"]) for name in ("ORDERS", "PAYMENTS")]
    assert [port for port in closed if is_open(port)] == []


def test_a_port_that_is_taken_is_named(shop: Shop, peer: Peer) -> None:
    second = shop.start("grpcserve")

    assert second.wait() == 1
    assert f"cannot listen on grpc://127.0.0.1:{shop.grpc_port}: the port is taken" in second.output
    assert "Traceback" not in second.output
    assert peer.health() == health_pb2.HealthCheckResponse.SERVING


def test_a_name_that_is_no_grpc_service_is_told_with_those_that_are(shop: Shop) -> None:
    wrong = shop.start("grpcserve", "notifications")

    assert wrong.wait() == 2
    assert "'notifications' is no gRPC service that lives here" in wrong.output


def test_each_service_of_the_fleet_answers_on_a_grpc_port_of_its_own(shop: Shop, connect: Any) -> None:
    fleet(shop)
    ports = {name: int(shop.env[f"{name.upper()}_GRPC_PORT"]) for name in ("users", "orders", "payments")}
    users, orders, payments = (connect(port) for port in ports.values())

    order = placed(shop, users, orders)

    assert [name for name, port in ports.items() if f"grpc :{port}" not in shop.processes[0].output] == []
    assert not is_open(shop.grpc_port)
    assert payments.ask("PaymentsService/FindOne", {"id": order["payment_id"]})["status"] == "captured"
    with pytest.raises(grpc.RpcError) as elsewhere:
        users.ask("PaymentsService/FindOne", {"id": order["payment_id"]})
    error: Any = elsewhere.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_those_who_watch_in_the_fleet_hear_of_a_cancellation_over_http(shop: Shop, connect: Any) -> None:
    fleet(shop)
    users, orders = (connect(int(shop.env[f"{name}_GRPC_PORT"])) for name in ("USERS", "ORDERS"))
    order = placed(shop, users, orders)
    watched = orders.stream("OrdersService/WatchOrder", {"id": order["id"]})
    next(watched)

    began = time.monotonic()
    answer = httpx.post(f"{shop.url}/api/orders/{order['id']}/cancel", timeout=20)
    *_, last = watched
    took = time.monotonic() - began
    repeat = httpx.post(f"{shop.url}/api/orders/{order['id']}/cancel", timeout=20)

    assert (answer.status_code, answer.json()["refunded"]) == (200, order["total"])
    assert last["status"] == "cancelled"
    assert took < SOON
    assert (repeat.status_code, repeat.json()["code"]) == (409, "wrong-state")


def test_a_service_alone_serves_tcp_and_grpc_at_once(shop: Shop, connect: Any) -> None:
    users = shop.start("runmicroservice", "users")
    shop.until_ready(users, shop.health_port)

    by_grpc = connect(int(shop.env["USERS_GRPC_PORT"])).ask("UsersService/FindAll")["users"]
    by_tcp = asked_by_tcp(shop, {"pattern": {"cmd": "get_users"}, "data": {"limit": 30}, "id": "1"})["users"]

    assert [user["id"] for user in by_grpc] == [user["id"] for user in by_tcp]
    assert len(by_grpc) == 30
    assert users.stop() == 0
    until(lambda: not is_open(shop.users_port), "the door closed")


def asked_by_tcp(shop: Shop, request: object) -> Any:
    """Send one request as a NestJS client writes it and return the response."""
    text = json.dumps(request)
    with socket.create_connection(("127.0.0.1", shop.users_port), timeout=10) as connection:
        connection.sendall(f"{len(text)}#{text}".encode())
        with connection.makefile("rb") as stream:
            length = b""
            while not length.endswith(b"#"):
                length += stream.read(1)
            return json.loads(stream.read(int(length[:-1])))["response"]
