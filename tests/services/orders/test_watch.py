"""Watching an order: who is woken, when, and until when."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, aclosing
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from microservices import RpcContext, RpcException
from microservices.lifecycle import State, lifecycle
from orders import handlers, watch
from orders.consumers import OrdersConsumer
from orders.contracts import Customer, GetOrder, Order, OrderChanged
from orders.watch import Changes, Feed, feed

pytestmark = pytest.mark.asyncio

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CONTEXT = RpcContext(service="orders", pattern="watch", transport="test", side="server")


class Book:
    """Stands in for the orders service: `get_order` answers with the order as it is at the time."""

    def __init__(self) -> None:
        self.looks = 0
        self.looked_five_times = asyncio.Event()
        self.order = order("pending", 1)

    def change(self, status: str, version: int) -> None:
        self.order = order(status, version)

    async def send(self, pattern: dict[str, str], data: dict[str, str], *, returns: type[Order]) -> Order:
        assert (pattern, data, returns) == ({"cmd": "get_order"}, {"id": "one"}, Order)
        self.looks += 1
        if self.looks == 5:
            self.looked_five_times.set()
        return self.order


def order(status: str, version: int) -> Order:
    """Return an order of which only this matters."""
    times: dict[str, Any] = dict.fromkeys(("confirmed_at", "shipped_at", "delivered_at", "cancelled_at"))
    return Order(
        id="one",
        number="2030-000001",
        user_id="ada",
        customer=Customer(id="ada", name="Ada", email="ada@example.org"),
        status=status,
        lines=[],
        total=1000,
        currency="EUR",
        payment_id=None,
        refunded=0,
        placed_at=NOW,
        cancel_reason=None,
        version=version,
        created_at=NOW,
        **times,
    )


def watching() -> AsyncIterator[Order]:
    return handlers.watch_order(GetOrder(id="one"), CONTEXT)


async def woken(changes: Changes) -> bool:
    """Return whether something has happened already, without waiting for it."""
    try:
        async with asyncio.timeout(0):
            await changes.next()
    except TimeoutError:
        return False
    return True


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    """Put a double in the place of orders."""
    double = Book()
    monkeypatch.setattr(handlers, "clients", {"orders": double})
    return double


@pytest.fixture
def look_again(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set how long watchers wait before they look for themselves."""
    return lambda seconds: monkeypatch.setattr(watch, "LOOK_AGAIN", seconds)


@pytest.fixture(autouse=True)
def _nobody_stays() -> Iterator[None]:
    yield
    assert feed._leave not in lifecycle.on_drain


async def test_a_change_wakes_those_who_watch_this_order_and_nobody_else() -> None:
    with feed.watching("one") as one, feed.watching("one") as other, feed.watching("two") as two:
        feed.changed("one")

        assert [await woken(changes) for changes in (one, other, two)] == [True, True, False]


async def test_a_change_that_comes_first_is_not_missed_and_several_count_as_one() -> None:
    with feed.watching("one") as changes:
        for _ in range(3):
            feed.changed("one")

        assert [await woken(changes), await woken(changes)] == [True, False]


async def test_a_change_of_what_nobody_watches_is_no_news() -> None:
    feed.changed("one")

    with feed.watching("one") as changes:
        assert not await woken(changes)


async def test_without_news_a_watcher_looks_again_after_a_while(look_again: Callable[[float], None]) -> None:
    look_again(0.01)

    with feed.watching("one") as changes:
        async with asyncio.timeout(5):
            await changes.next()
            await changes.next()


async def test_too_many_watchers_are_refused_until_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_WATCHERS", 2)
    crowd = Feed()

    with ExitStack() as watchers:
        watchers.enter_context(crowd.watching("one"))
        with crowd.watching("two"), pytest.raises(RpcException) as refused, crowd.watching("one"):
            pass
        watchers.enter_context(crowd.watching("two"))

    assert (refused.value.status_code, refused.value.code) == (503, "overloaded")


async def test_those_who_watch_are_told_when_the_process_is_about_to_end(
    look_again: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_again(60)

    with feed.watching("one") as changes:
        waiting = asyncio.create_task(changes.next())
        await asyncio.sleep(0)  # let it begin to wait
        monkeypatch.setattr(lifecycle, "state", State.DRAINING)
        for leave in tuple(lifecycle.on_drain):
            await leave()

        with pytest.raises(RpcException) as ended:
            await asyncio.wait_for(waiting, 5)

    assert (ended.value.status_code, ended.value.code) == (503, "draining")


async def test_every_event_of_an_order_wakes_its_watchers() -> None:
    [events] = [OrdersConsumer.order_changed.__microservice_doors__]  # type: ignore[attr-defined]

    with feed.watching("one") as changes:
        await OrdersConsumer().order_changed(OrderChanged(id="one"), CONTEXT)
        heard = await woken(changes)

    assert heard
    assert {door.delivery for door in events} == {"each"}
    assert {door.name for door in events} == {
        f"order_{what}" for what in ("created", "confirmed", "cancelled", "shipped", "delivered", "refunded")
    }


async def test_an_order_is_told_at_once_and_whenever_it_has_changed(book: Book) -> None:
    async with asyncio.timeout(5), aclosing(watching()) as told:  # type: ignore[type-var]
        first = await anext(told)
        book.change("confirmed", 2)
        feed.changed("one")
        second = await anext(told)

    assert [(order.status, order.version) for order in (first, second)] == [("pending", 1), ("confirmed", 2)]


async def test_the_watching_ends_when_nothing_can_change_any_more(book: Book) -> None:
    seen = []

    async with asyncio.timeout(5):
        async for told in watching():
            seen.append(told.status)
            book.change("cancelled", 2)
            feed.changed("one")

    assert seen == ["pending", "cancelled"]


@pytest.mark.parametrize("status", watch.FINAL)
async def test_an_order_at_its_end_is_told_once(book: Book, status: str) -> None:
    book.change(status, 4)

    async with asyncio.timeout(5):
        seen = [told.status async for told in watching()]

    assert seen == [status]


async def test_what_has_not_changed_is_not_told_again(book: Book, look_again: Callable[[float], None]) -> None:
    look_again(0.001)

    async with asyncio.timeout(5), aclosing(watching()) as told:  # type: ignore[type-var]
        await anext(told)
        following = asyncio.ensure_future(anext(told))
        await book.looked_five_times.wait()
        unchanged = not following.done()
        book.change("confirmed", 2)
        changed = await following

    assert unchanged
    assert changed.version == 2


async def test_a_change_while_a_watcher_looks_is_not_missed(
    book: Book, look_again: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_again(60)
    look = book.send

    async def slowly(*args: Any, **options: Any) -> Order:
        found = await look(*args, **options)
        if book.looks == 1:
            book.change("confirmed", 2)
            feed.changed("one")
        return found

    monkeypatch.setattr(handlers, "clients", {"orders": SimpleNamespace(send=slowly)})

    async with asyncio.timeout(5), aclosing(watching()) as told:  # type: ignore[type-var]
        seen = [(await anext(told)).version, (await anext(told)).version]

    assert seen == [1, 2]


async def test_an_order_that_is_not_there_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    async def missing(*_: Any, **__: Any) -> Order:
        raise RpcException({"statusCode": 404, "code": "order-not-found"})

    monkeypatch.setattr(handlers, "clients", {"orders": SimpleNamespace(send=missing)})

    with pytest.raises(RpcException) as refused:
        await anext(watching())

    assert refused.value.code == "order-not-found"
