"""What the orders service can be asked; products that are not on offer are as if they were not there."""

from collections.abc import Sequence
from typing import NamedTuple

from django.db.models import QuerySet

from microservices.ids import cursor_after, id_before, is_id

from . import contracts
from .contracts import MAX_ALL, MAX_PAGE
from .exceptions import InvalidCursor, OrderNotFound, ProductNotFound
from .models import Order, Product


class ProductPage(NamedTuple):
    """Some products, and the cursor of those after them."""

    products: list[Product]
    next: str | None


class OrderPage(NamedTuple):
    """Some orders, and the cursor of those after them."""

    orders: list[Order]
    next: str | None


def product_get(*, product_id: str) -> Product:
    """Return one product. Raises ProductNotFound."""
    product = products_on_offer().filter(pk=product_id).first() if is_id(product_id) else None
    if product is None:
        raise ProductNotFound()
    return product


def product_list(*, cursor: str | None = None, limit: int = 50) -> ProductPage:
    """Return a page of products, oldest first. Raises InvalidCursor."""
    limit = min(limit, MAX_PAGE)
    products = products_on_offer()
    if cursor is not None:
        products = products.filter(pk__gt=_read_cursor(cursor))
    # One more than asked for tells whether there is a next page without counting.
    rows = list(products.order_by("pk")[: limit + 1])
    return ProductPage(rows[:limit], cursor_after(rows[limit - 1].pk) if len(rows) > limit else None)


def product_list_by_ids(*, product_ids: Sequence[str]) -> list[Product]:
    """Return those of these products that there are, in the order asked for."""
    found = products_on_offer().in_bulk([product_id for product_id in product_ids if is_id(product_id)])
    return [found[product_id] for product_id in dict.fromkeys(product_ids) if product_id in found]


def order_get(*, order_id: str, for_update: bool = False) -> Order:
    """Return one order, its row locked on request. Raises OrderNotFound."""
    orders = Order.objects.select_for_update() if for_update else Order.objects.all()
    order = orders.filter(pk=order_id).first() if is_id(order_id) else None
    if order is None:
        raise OrderNotFound()
    return order


def order_list(
    *, user_id: str | None = None, status: str | None = None, cursor: str | None = None, limit: int = 50
) -> OrderPage:
    """Return a page of orders with their lines, the latest first. Raises InvalidCursor."""
    limit = min(limit, MAX_PAGE)
    orders = _orders(user_id, status)
    if cursor is not None:
        orders = orders.filter(pk__lt=_read_cursor(cursor))
    rows = list(orders[: limit + 1])
    return OrderPage(rows[:limit], cursor_after(rows[limit - 1].pk) if len(rows) > limit else None)


def order_list_all(*, user_id: str | None = None, status: str | None = None) -> list[Order]:
    """Return the latest orders with their lines, at most MAX_ALL, the latest first."""
    return list(_orders(user_id, status)[:MAX_ALL])


def products_on_offer() -> QuerySet[Product]:
    """Return what can be ordered, in stock or not."""
    return Product.objects.filter(active=True)


def product_shown(product: Product) -> contracts.Product:
    """Return a product as others may see it."""
    return contracts.Product(
        id=product.id,
        sku=product.sku,
        name=product.name,
        description=product.description,
        price=product.price,
        currency=product.currency,
        available=product.on_hand - product.reserved,
        on_hand=product.on_hand,
        reserved=product.reserved,
        version=product.version,
        created_at=product.created_at,
    )


def order_shown(order: Order) -> contracts.Order:
    """Return an order as others may see it."""
    lines = [
        contracts.Line(
            product_id=line.product_id,
            sku=line.sku,
            name=line.name,
            unit_price=line.unit_price,
            quantity=line.quantity,
            line_total=line.line_total,
        )
        for line in order.lines.all()
    ]
    return contracts.Order(
        id=order.id,
        number=order.number,
        user_id=order.user_id,
        customer=contracts.Customer(id=order.user_id, name=order.customer_name, email=order.customer_email),
        status=order.status,
        lines=lines,
        total=order.total,
        currency=order.currency,
        payment_id=order.payment_id or None,
        refunded=order.refunded,
        placed_at=order.placed_at,
        confirmed_at=order.confirmed_at,
        shipped_at=order.shipped_at,
        delivered_at=order.delivered_at,
        cancelled_at=order.cancelled_at,
        cancel_reason=order.cancel_reason or None,
        version=order.version,
        created_at=order.created_at,
    )


def _orders(user_id: str | None, status: str | None) -> QuerySet[Order]:
    orders = Order.objects.prefetch_related("lines").order_by("-pk")
    if user_id is not None:
        orders = orders.filter(user_id=user_id)
    return orders if status is None else orders.filter(status=status)


def _read_cursor(cursor: str) -> str:
    try:
        return id_before(cursor)
    except ValueError as error:
        raise InvalidCursor() from error
