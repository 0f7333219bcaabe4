"""The shop as two processes of each service and two gateways, any of which may be ended and started again."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from tests.faults.load import Failed
from tests.system.shop import SERVICES, Process, Shop, free_ports

LIMIT = 30.0
GATEWAY = "gateway"


class Instance:
    """A process of a service that keeps its ports when it is started again."""

    def __init__(self, shop: Shop, service: str, port: int, health: int, grpc: int) -> None:
        self.service = service
        self.url = f"http://127.0.0.1:{port}" if service == GATEWAY else f"tcp://127.0.0.1:{port}"
        self._readyz = f"http://127.0.0.1:{port if service == GATEWAY else health}/readyz"
        self._shop = shop
        name = service.upper()
        self._env = (
            {"SERVICES": GATEWAY, "HTTP_PORT": str(port)}
            if service == GATEWAY
            else {f"{name}_URL": self.url, f"{name}_HEALTH_PORT": str(health), f"{name}_GRPC_PORT": str(grpc)}
        )
        self.process: Process | None = None

    def start(self, **env: str) -> None:
        command = ["serve"] if self.service == GATEWAY else ["runmicroservice", self.service]
        self.process = self._shop.start(*command, **{**self._env, **env})

    async def ready(self) -> bool:
        """Return whether it says that calls may come."""
        try:
            async with httpx.AsyncClient(timeout=2) as http:
                return (await http.get(self._readyz)).status_code == 200
        except httpx.TransportError:
            return False

    async def until_ready(self) -> None:
        async with asyncio.timeout(LIMIT):
            while not await self.ready():
                assert self.process is not None
                assert self.process.running, self.process.output
                await asyncio.sleep(0.05)

    async def end(self, number: signal.Signals) -> int:
        """End it by a signal, and return its exit code."""
        assert self.process is not None
        self.process.signal(number)
        return await asyncio.to_thread(self.process.wait, LIMIT)


class Fleet:
    """Two instances of some services, one of the others, and one or two gateways."""

    def __init__(self, shop: Shop, twice: tuple[str, ...] = (), services: tuple[str, ...] = SERVICES) -> None:
        self.shop = shop
        counts = {name: 2 if name in twice else 1 for name in (*services, GATEWAY)}
        self.instances = {
            name: [Instance(shop, name, *free_ports(3)) for _ in range(count)] for name, count in counts.items()
        }
        for name in services:
            shop.env[f"{name.upper()}_URL"] = ",".join(each.url for each in self.instances[name])

    def __iter__(self) -> Iterator[Instance]:
        return itertools.chain.from_iterable(self.instances.values())

    async def start(self, **env: str) -> None:
        """Start all, and wait until they are ready."""
        for instance in self:
            instance.start(**env)
        await asyncio.gather(*(instance.until_ready() for instance in self))

    @property
    def gateway(self) -> str:
        """The URL of the first gateway."""
        return self.instances[GATEWAY][0].url


class Shopper:
    """Asks the gateways, as a load balancer passes it on: to those that say that they are ready.

    A connection that was refused has sent nothing, and another gateway is asked; all else is a failure.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._http = httpx.AsyncClient(timeout=LIMIT, limits=httpx.Limits(max_connections=None))
        self._ready: list[Instance] = []
        self._next = itertools.count()
        self._watching: asyncio.Task[None] | None = None
        self.users: list[str] = []
        self.products: list[str] = []
        self.confirmed: set[tuple[str, str, int]] = set()
        """Who was told that he has ordered what, and how much of it."""

    async def __aenter__(self) -> Shopper:
        await self._look()
        self._watching = asyncio.create_task(self._watch())
        self.users = [user["id"] for user in (await self._get("/api/users?limit=30"))["data"]]
        self.products = [product["id"] for product in (await self._get("/api/products?limit=20"))["data"]]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._watching is not None
        self._watching.cancel()
        await self._http.aclose()

    async def read(self, number: int) -> None:
        """Look at a user, or at a product."""
        if number % 2:
            await self._get(f"/api/users/{self.users[number % len(self.users)]}")
        else:
            await self._get(f"/api/products/{self.products[number % len(self.products)]}")

    async def order(self, number: int) -> None:
        """Order what no other number orders."""
        number, of_user = divmod(number, len(self.users))
        number, of_product = divmod(number, len(self.products))
        user, product, quantity = self.users[of_user], self.products[of_product], number + 1
        lines = [{"product_id": product, "quantity": quantity}]
        body = {"user_id": user, "lines": lines, "payment_token": "tok_ok"}
        await self._ask("POST", "/api/orders", json=body)
        self.confirmed.add((user, product, quantity))

    async def _get(self, path: str) -> Any:
        return (await self._ask("GET", path)).json()

    async def _ask(self, method: str, path: str, **beside: Any) -> httpx.Response:
        for _ in range(len(self._fleet.instances[GATEWAY])):
            if not self._ready:
                raise Failed("no gateway is ready")
            gateway = self._ready[next(self._next) % len(self._ready)]
            try:
                response = await self._http.request(method, gateway.url + path, **beside)
            except httpx.ConnectError:
                continue
            except httpx.TransportError as error:
                raise Failed(f"{method} {type(error).__name__}") from error
            if response.status_code >= 400:
                raise Failed(f"{method} {response.status_code} {response.json().get('code', '')}")
            return response
        raise Failed("no gateway takes connections")

    async def _look(self) -> None:
        gateways = self._fleet.instances[GATEWAY]
        states = await asyncio.gather(*(gateway.ready() for gateway in gateways))
        self._ready = [gateway for gateway, ready in zip(gateways, states, strict=True) if ready]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            await self._look()


class Orders:
    """What is in the database of the orders, whoever wrote it there."""

    def __init__(self, databases: Path) -> None:
        self._file = databases / "orders.sqlite3"

    def stock_up(self) -> None:
        """Have enough of everything."""
        with closing(sqlite3.connect(self._file, timeout=10)) as file, file:
            file.execute("UPDATE orders_product SET on_hand = 1000000")

    def placed(self) -> Counter[tuple[str, str, int]]:
        """Return how often each user ordered so much of each product."""
        query = """
            SELECT orders_order.user_id, orders_orderline.product_id, orders_orderline.quantity
            FROM orders_order JOIN orders_orderline ON orders_orderline.order_id = orders_order.id
        """
        with closing(sqlite3.connect(self._file, timeout=10)) as file:
            return Counter(file.execute(query).fetchall())
