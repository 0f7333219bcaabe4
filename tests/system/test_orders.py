"""One shopper's journey: browse, order, pay, be told; the same in every shape and over every bus."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from microservices.client import Client
from microservices.transports import parse
from microservices.transports.redis_streams import StreamsBus
from microservices.transports.tcp import TcpClient
from tests.system.shop import Process, Shop, fleet, free_ports, runserver, serve, until
from tests.valkey import Valkey

pytestmark = pytest.mark.slow

Start = Callable[[Shop], object]


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A bus of this test's own."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


def on_streams(start: Start) -> Callable[[Shop, Valkey], None]:
    """Start a shape with events on Redis Streams."""

    def started(shop: Shop, valkey: Valkey) -> None:
        shop.env["REDIS_URL"] = valkey.url
        start(shop)

    return started


def on_pub_sub(start: Start) -> Callable[[Shop, Valkey], None]:
    """Start a shape with events on Redis as NestJS speaks it."""

    def started(shop: Shop, valkey: Valkey) -> None:
        shop.env |= {"REDIS_URL": valkey.url, "EVENTS_URL": valkey.url}
        start(shop)

    return started


def all_on_redis(start: Start) -> Callable[[Shop, Valkey], None]:
    """Start a shape with requests and events on Redis."""

    def started(shop: Shop, valkey: Valkey) -> None:
        shop.env |= {"REDIS_URL": valkey.url, "EVENTS_URL": valkey.url}
        shop.env |= {f"{name}_URL": valkey.url for name in ("USERS", "ORDERS", "PAYMENTS", "NOTIFICATIONS")}
        start(shop)

    return started


def users_on_redis(start: Start) -> Callable[[Shop, Valkey], None]:
    """Start a shape with nothing but the requests for users moved to Redis."""

    def started(shop: Shop, valkey: Valkey) -> None:
        shop.env |= {"REDIS_URL": valkey.url, "USERS_URL": valkey.url}
        start(shop)

    return started


def in_memory(start: Start) -> Callable[[Shop, Valkey], None]:
    """Start a shape with events in memory."""

    def started(shop: Shop, valkey: Valkey) -> None:
        start(shop)

    return started


SHAPES = {
    "monolith, events in memory": in_memory(runserver),
    "hybrid, events in memory": in_memory(serve),
    "hybrid, events on streams": on_streams(serve),
    "fleet, events on streams": on_streams(fleet),
    "fleet, events on pub/sub": on_pub_sub(fleet),
    "fleet, requests for users on redis": users_on_redis(fleet),
    "fleet, requests and events on redis": all_on_redis(fleet),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_an_order_is_placed_paid_and_told(shop: Shop, valkey: Valkey, shape: Callable[[Shop, Valkey], None]) -> None:
    shape(shop, valkey)

    with httpx.Client(base_url=shop.url, timeout=20) as http:
        user = http.get("/api/users", params={"limit": "1"}).json()["data"][0]
        product = http.get("/api/products", params={"limit": "1"}).json()["data"][0]
        confirmed = place(http, user["id"], product["id"], "tok_ok")
        declined = place(http, user["id"], product["id"], "tok_declined")
        too_many = place(http, user["id"], product["id"], "tok_ok", quantity=1000)
        nobody = place(http, "01a20000-0000-7000-8000-000000000000", product["id"], "tok_ok")

        assert confirmed.status_code == 201, confirmed.text
        order = confirmed.json()
        assert (order["status"], order["customer"]["email"]) == ("confirmed", user["email"])
        assert http.get(f"/api/orders/{order['id']}").json() == order
        [payment] = http.get("/api/payments", params={"order_id": order["id"]}).json()["data"]
        assert (payment["status"], payment["amount"]) == ("captured", order["total"])
        assert (declined.status_code, declined.json()["code"]) == (402, "payment-declined")
        assert (too_many.status_code, too_many.json()["code"]) == (409, "out-of-stock")
        assert [error["pointer"] for error in too_many.json()["errors"]] == ["/lines/0"]
        assert nobody.status_code == 404
        left = http.get(f"/api/products/{product['id']}").json()["available"]
        assert left == product["available"] - 1

        told = {"order_created", "order_confirmed", "payment_captured", "payment_failed", "order_cancelled"}
        until(lambda: told <= set(kinds(http, user["id"])), f"told of {told}")
        assert sorted(kinds(http, user["id"])) == sorted([*told, "order_created"])
    assert list((shop.databases / "mail").iterdir())


def test_fifty_shoppers_at_once_never_buy_more_than_there_is(shop: Shop) -> None:
    fleet(shop)

    with httpx.Client(base_url=shop.url, timeout=30) as http:
        user = http.get("/api/users", params={"limit": "1"}).json()["data"][0]
        products = http.get("/api/products").json()["data"]
        product = min(products, key=lambda product: product["available"])
        share = max(1, product["available"] // 20)
        with ThreadPoolExecutor(50) as shoppers:
            answers = list(
                shoppers.map(lambda _: place(http, user["id"], product["id"], "tok_ok", share).status_code, range(50))
            )
        left = http.get(f"/api/products/{product['id']}").json()

    sold = answers.count(201)
    assert set(answers) <= {201, 409}
    assert sold == min(50, product["available"] // share)
    assert left["available"] == product["available"] - sold * share


def test_two_instances_share_the_events_and_one_takes_over_what_the_other_leaves(shop: Shop, valkey: Valkey) -> None:
    bus_url = f"redis-streams://127.0.0.1:{valkey.port}?take_over_after=1"
    shop.env |= {"REDIS_URL": valkey.url, "EVENTS_URL": bus_url}
    one, other = notifications(shop), notifications(shop)
    events = Client("events", lambda: StreamsBus(parse(bus_url), "events")).sync
    inbox = Client("notifications", lambda: TcpClient(parse(other.url), "notifications")).sync

    def told() -> list[str]:
        page = inbox.send({"cmd": "get_notifications"}, {"user_id": "ada", "limit": 100})
        return sorted(notification["data"]["order_id"] for notification in page["notifications"])

    names = [f"order-{number:02}" for number in range(40)]
    for name in names[:20]:
        events.emit("order_created", order(name))
    until(lambda: len(told()) == 20, "20 notifications")
    one.process.signal(signal.SIGSTOP)
    for name in names[20:]:
        events.emit("order_created", order(name))
    until(lambda: len(told()) > 20, "those of the one that is not frozen")
    taken_by_the_frozen = 40 - len(told())
    one.process.signal(signal.SIGKILL)
    until(lambda: len(told()) == 40, "the rest of them, taken over")

    assert told() == names
    assert taken_by_the_frozen > 0
    assert "order_created" in one.process.output


def test_a_dead_service_is_started_again(shop: Shop) -> None:
    fleet(shop)
    runfleet = shop.processes[0]
    found = re.search(r"^  users +(\d+)  up", runfleet.output, re.MULTILINE)
    assert found

    os.kill(int(found[1]), signal.SIGKILL)
    runfleet.until_says("users is up again")

    assert httpx.get(f"{shop.url}/api/users", timeout=20).status_code == 200


def test_the_owner_of_a_taken_port_is_named(shop: Shop) -> None:
    shop.until_ready(shop.start("serve", SERVICES="gateway"))

    second = shop.start("runfleet")

    assert second.wait() == 1
    assert f"cannot have port {shop.http_port}: it is taken by process {shop.processes[0].pid}" in second.output


def test_an_order_is_paid_and_called_off_with_payments_reached_by_grpc(shop: Shop, valkey: Valkey) -> None:
    shop.env |= {"REDIS_URL": valkey.url, "PAYMENTS_URL": f"grpc://127.0.0.1:{shop.env['PAYMENTS_GRPC_PORT']}"}
    fleet(shop)

    with httpx.Client(base_url=shop.url, timeout=20) as http:
        user = http.get("/api/users", params={"limit": "1"}).json()["data"][0]
        product = http.get("/api/products", params={"limit": "1"}).json()["data"][0]
        declined = place(http, user["id"], product["id"], "tok_declined")
        order = place(http, user["id"], product["id"], "tok_ok")
        cancelled = http.post(f"/api/orders/{order.json()['id']}/cancel", json={"reason": "too late"})
        unmapped = http.get("/api/payments")

    assert (declined.status_code, declined.json()["code"]) == (402, "payment-declined")
    assert (order.status_code, order.json()["status"]) == (201, "confirmed")
    assert (cancelled.status_code, cancelled.json()["refunded"]) == (200, order.json()["total"])
    assert (unmapped.status_code, unmapped.json()["code"]) == (501, "not-mapped")


def place(http: httpx.Client, user: str, product: str, token: str, quantity: int = 1) -> httpx.Response:
    """Order one product."""
    lines = [{"product_id": product, "quantity": quantity}]
    return http.post("/api/orders", json={"user_id": user, "lines": lines, "payment_token": token})


def kinds(http: httpx.Client, user: str) -> list[str]:
    """Return what a user was told, by kind."""
    page = http.get("/api/notifications", params={"user_id": user, "limit": "100"}).json()
    return [notification["kind"] for notification in page["data"]]


class Instance(NamedTuple):
    """A process of one service."""

    process: Process
    url: str


def notifications(shop: Shop) -> Instance:
    """Start an instance of notifications on ports of its own."""
    door, health = free_ports(2)
    url = f"tcp://127.0.0.1:{door}"
    process = shop.start(
        "runmicroservice", "notifications", NOTIFICATIONS_URL=url, NOTIFICATIONS_HEALTH_PORT=str(health)
    )
    shop.until_ready(process, health)
    return Instance(process, url)


def order(name: str) -> dict[str, object]:
    """Return as much of an order as its events need."""
    customer = {"id": "ada", "name": "Ada", "email": "ada@example.org"}
    return {"id": name, "number": name, "customer": customer, "total": 100, "currency": "EUR", "cancel_reason": None}
