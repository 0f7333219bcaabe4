"""The shop in its three shapes, on the same shopper's journey.

A journey is: list the products, order one, read the order, and read what one is told until it says that the order is
confirmed and paid. The shoppers have signed up before: hashing a password takes longer than all the rest, and the
same in every shape.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import httpx

from .measure import Case, Sample, Side
from .peers import Run
from .processes import Tree
from .shop import ALL_READY, READY, Shop

JOURNEYS, SHOPPERS = 240, 8
TOLD = {"order_created", "order_confirmed", "payment_captured"}
PATIENCE = 20
PAUSE = 0.01

ON = "JSON log lines, validation, heartbeats"


def journeys(stack: ExitStack) -> Iterator[Case]:
    """Yield the case. Time and memory are those of all processes, Valkey's too; the memory is PSS."""
    seeded = Shop(stack)
    with closing(sqlite3.connect(seeded.folder / "data" / "orders.sqlite3")) as database, database:
        database.execute("UPDATE orders_product SET on_hand = 1000000")

    def side(name: str, on: str, *command: str, ready: str = READY, bus: bool = False, **env: str) -> Side:
        shop = Shop(stack, seeded)
        trees = [shop.start_bus(stack)] if bus else []
        trees.append(shop.start(stack, name, *command, ready=ready, **env))
        return Side(name, f"{ON}; {on}", _shopping(name, shop.url, trees))

    yield Case(
        f"journeys of {SHOPPERS} shoppers, all processes on one core, memory as PSS",
        JOURNEYS,
        [
            side("monolith", "events in memory", "serve", LISTEN="0"),
            side("hybrid", "doors open, events on Redis Streams", "serve", bus=True),
            side("fleet", "requests over TCP, events on Redis Streams", "runfleet", ready=ALL_READY, bus=True),
        ],
        warm_up=SHOPPERS,
    )


def _shopping(name: str, url: str, trees: Sequence[Tree]) -> Run:
    def run(calls: int) -> Sample:
        before, own, started = sum(tree.cpu for tree in trees), time.process_time(), time.perf_counter()
        try:
            took = asyncio.run(shop_for(url, calls))
        except (httpx.HTTPError, TimeoutError) as error:
            raise RuntimeError(f"{name}: {error!r}") from error
        seconds = time.perf_counter() - started
        return Sample(
            rate=calls / seconds,
            cpu=(sum(tree.cpu for tree in trees) - before) / calls * 1e6,
            load=(time.process_time() - own) / seconds,
            memory=sum(tree.share for tree in trees),
            p50=took[len(took) // 2] * 1e3,
            p99=took[len(took) * 99 // 100] * 1e3,
        )

    return run


async def shop_for(url: str, calls: int) -> list[float]:
    """Make so many journeys, each shopper one after the other; return what each took, in seconds, sorted.

    Raises httpx.HTTPError, and TimeoutError where one is not told of an order within 20 s.
    """
    took: list[float] = []
    numbers = iter(range(calls))
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
        users = (await _get(http, "/api/users", limit=SHOPPERS))["data"]

        async def shop(user: str) -> None:
            for number in numbers:
                started = time.perf_counter()
                async with asyncio.timeout(PATIENCE):
                    await journey(http, user, number)
                took.append(time.perf_counter() - started)

        await asyncio.gather(*(shop(user["id"]) for user in users))
    return sorted(took)


async def journey(http: httpx.AsyncClient, user: str, number: int) -> None:
    """Go shopping once."""
    products = (await _get(http, "/api/products"))["data"]
    lines = [{"product_id": products[number % len(products)]["id"], "quantity": 1}]
    order = {"user_id": user, "lines": lines, "payment_token": "tok_ok"}
    placed = (await http.post("/api/orders", json=order)).raise_for_status().json()["id"]

    async def confirmed() -> bool:
        return (await _get(http, f"/api/orders/{placed}"))["status"] == "confirmed"

    async def told() -> bool:
        page = (await _get(http, "/api/notifications", user_id=user, limit=10))["data"]
        return {notice["kind"] for notice in page if notice["data"]["order_id"] == placed} >= TOLD

    for reached in (confirmed, told):
        while not await reached():  # noqa: ASYNC110 - it is in another process
            await asyncio.sleep(PAUSE)


async def _get(http: httpx.AsyncClient, path: str, **query: Any) -> Any:
    return (await http.get(path, params=query)).raise_for_status().json()
