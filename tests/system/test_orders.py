"""One shopper's journey: browse, order, pay, be told; the same in every shape and over every bus."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from microservices.client import Client
from microservices.transports import parse
from microservices.transports.redis_streams import StreamsBus
from microservices.transports.tcp import TcpClient
from tests import brokers
from tests.brokers import Kafka, Mosquitto, Nats, RabbitMQ, Valkey
from tests.system.shop import SERVICES, Process, Shop, fleet, free_ports, runserver, serve, until

pytestmark = pytest.mark.slow

Start = Callable[[Shop], object]


Broker = Callable[[type[brokers.Broker]], Any]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """Start brokers of this test's own: `broker(Nats)`."""
    with ExitStack() as running:
        yield lambda kind: running.enter_context(kind(tmp_path / kind.__name__.lower()))


@pytest.fixture
def valkey(broker: Broker) -> Valkey:
    """A bus of this test's own."""
    return broker(Valkey)


class Shape(NamedTuple):
    """How the shop is started, and what carries its requests and events: kinds of brokers, and options of their URLs.

    Without them requests go over TCP, or stay in the process, and events in memory.
    """

    start: Start
    requests: type[brokers.Broker] | None = None
    events: type[brokers.Broker] | None = None
    events_scheme: str = ""
    events_options: str = ""
    only: str = ""
    """The one service whose requests go over the broker."""

    def begin(self, shop: Shop, broker: Broker) -> None:
        """Start the brokers, and then the shop."""
        running = {kind: broker(kind) for kind in dict.fromkeys((self.requests, self.events)) if kind is not None}
        if Valkey in running:
            shop.env["REDIS_URL"] = running[Valkey].url
        if self.events is not None:
            scheme, _, rest = running[self.events].url.partition(":")
            shop.env["EVENTS_URL"] = f"{self.events_scheme or scheme}:{rest}{self.events_options}"
        if self.requests is not None and self.only:
            shop.env[f"{self.only.upper()}_URL"] = running[self.requests].url
        elif self.requests is not None:
            shop.env["SERVICES_URL"] = running[self.requests].url
            for name in SERVICES:
                del shop.env[f"{name.upper()}_URL"]
        self.start(shop)


SHAPES = {
    "monolith, events in memory": Shape(runserver),
    "hybrid, events in memory": Shape(serve),
    "hybrid, events on streams": Shape(serve, events=Valkey, events_scheme="redis-streams"),
    "fleet, events on streams": Shape(fleet, events=Valkey, events_scheme="redis-streams"),
    "fleet, requests for users on redis": Shape(
        fleet, requests=Valkey, events=Valkey, events_scheme="redis-streams", only="users"
    ),
    "fleet, all on redis": Shape(fleet, requests=Valkey, events=Valkey),
    "fleet, all on nats": Shape(fleet, requests=Nats, events=Nats),
    "fleet, all on nats, events on jetstream": Shape(
        fleet, requests=Nats, events=Nats, events_options="?stream=events"
    ),
    "fleet, all on mqtt": Shape(fleet, requests=Mosquitto, events=Mosquitto),
    "fleet, all on rabbitmq": Shape(fleet, requests=RabbitMQ, events=RabbitMQ),
    "fleet, all on kafka": Shape(fleet, requests=Kafka, events=Kafka),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_an_order_is_placed_paid_and_told(shop: Shop, broker: Broker, shape: Shape) -> None:
    shape.begin(shop, broker)

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
    # All of their work is done: one that is frozen inside a transaction would keep the other from the database, too.
    line = "server notifications order_created 200"
    until(lambda: sum(each.process.output.count(line) for each in (one, other)) == 20, "20 events worked on")
    assert len(told()) == 20
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
