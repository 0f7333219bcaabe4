"""What travels to and from the orders service."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

MAX_PAGE = 100
MAX_ALL = 1000

# A "$" alone would also match before a last line feed, hence the look-ahead behind it.
_ONE_LINE = r"^[^\x00-\x1f\x7f]+$(?!\n)"

Id = Annotated[str, Meta(min_length=1, max_length=36, pattern=_ONE_LINE)]
Name = Annotated[str, Meta(min_length=1, max_length=100, pattern=_ONE_LINE)]
Email = Annotated[str, Meta(min_length=1, max_length=254, pattern=_ONE_LINE)]
Token = Annotated[str, Meta(min_length=1, max_length=200, pattern=_ONE_LINE)]
Quantity = Annotated[int, Meta(ge=1, le=1000)]
Reason = Annotated[str, Meta(min_length=1, max_length=50, pattern=_ONE_LINE)]
Status = Literal["pending", "confirmed", "shipped", "delivered", "cancelled", "refunded"]
Limit = Annotated[int, Meta(ge=1, le=MAX_PAGE)]


class GetProduct(Struct):
    """Ask for one product."""

    id: str


class GetProducts(Struct):
    """Ask for a page of products, or for those with these ids."""

    ids: Annotated[list[str], Meta(max_length=MAX_PAGE)] | None = None
    cursor: str | None = None
    limit: Limit = 50


class Product(Struct):
    """A product as others may see it; `available` is what can be ordered now."""

    id: str
    sku: str
    name: str
    description: str
    price: int
    currency: str
    available: int
    on_hand: int
    reserved: int
    version: int
    created_at: datetime


class Products(Struct):
    """A page of products; `next` is the cursor of the page after it, if there is one."""

    products: list[Product]
    next: str | None = None


class Customer(Struct):
    """Who orders, as known when the order was placed."""

    id: Id
    name: Name
    email: Email


class Item(Struct):
    """How many of which product are wanted."""

    product_id: Id
    quantity: Quantity


class CreateOrder(Struct):
    """Place an order and pay for it."""

    customer: Customer
    lines: Annotated[list[Item], Meta(min_length=1, max_length=50)]
    payment_token: Token


class GetOrder(Struct):
    """Ask for one order."""

    id: str


class GetOrders(Struct):
    """Ask for a page of orders, of a user or in a status."""

    user_id: Id | None = None
    status: Status | None = None
    cursor: str | None = None
    limit: Limit = 50


class CancelOrder(Struct):
    """Call an order off; the reason is for people to read."""

    id: str
    reason: Reason | None = None


class FindOrders(Struct):
    """Ask for all orders at once, of a user or in a status."""

    user_id: Id | None = None
    status: Status | None = None


class OrderChanged(Struct):
    """What of an `order_*` event tells which order it was."""

    id: str


class Line(Struct):
    """A line of an order, with name and price as they were then."""

    product_id: str
    sku: str
    name: str
    unit_price: int
    quantity: int
    line_total: int


class Order(Struct):
    """An order as others may see it; the same travels in each `order_*` event."""

    id: str
    number: str
    user_id: str
    customer: Customer
    status: str
    lines: list[Line]
    total: int
    currency: str
    payment_id: str | None
    refunded: int
    placed_at: datetime
    confirmed_at: datetime | None
    shipped_at: datetime | None
    delivered_at: datetime | None
    cancelled_at: datetime | None
    cancel_reason: str | None
    version: int
    created_at: datetime


class Orders(Struct):
    """A page of orders, the latest first; `next` is the cursor of the page after it, if there is one."""

    orders: list[Order]
    next: str | None = None
