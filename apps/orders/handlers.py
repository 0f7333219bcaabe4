"""The request doors of the orders service."""

from collections.abc import AsyncIterator

from microservices import RpcContext, clients, grpc_method, message_pattern

from . import selectors, services
from .contracts import (
    CancelOrder,
    CreateOrder,
    FindOrders,
    GetOrder,
    GetOrders,
    GetProduct,
    GetProducts,
    Order,
    Orders,
    Product,
    Products,
)
from .selectors import order_shown, product_shown
from .watch import FINAL, feed


@message_pattern({"cmd": "get_product"}, retry="safe")
def get_product(data: GetProduct, ctx: RpcContext) -> Product:
    """Return one product."""
    return product_shown(selectors.product_get(product_id=data.id))


@message_pattern({"cmd": "get_products"}, retry="safe")
def get_products(data: GetProducts, ctx: RpcContext) -> Products:
    """Return a page of products, or several by their ids."""
    if data.ids is not None:
        return Products(
            products=[product_shown(found) for found in selectors.product_list_by_ids(product_ids=data.ids)]
        )
    page = selectors.product_list(cursor=data.cursor, limit=data.limit)
    return Products(products=[product_shown(product) for product in page.products], next=page.next)


# Never repeated: nothing tells a repeat from a second order.
@message_pattern({"cmd": "create_order"}, retry="never")
@grpc_method("OrdersService", "CreateOrder")
def create_order(data: CreateOrder, ctx: RpcContext) -> Order:
    """Place an order and pay for it."""
    order = services.order_place(customer=data.customer, lines=data.lines, payment_token=data.payment_token)
    return order_shown(order)


@message_pattern({"cmd": "get_order"}, retry="safe")
@grpc_method("OrdersService", "FindOne", retry="safe")
def get_order(data: GetOrder, ctx: RpcContext) -> Order:
    """Return one order."""
    return order_shown(selectors.order_get(order_id=data.id))


@message_pattern({"cmd": "get_orders"}, retry="safe")
def get_orders(data: GetOrders, ctx: RpcContext) -> Orders:
    """Return a page of orders."""
    page = selectors.order_list(user_id=data.user_id, status=data.status, cursor=data.cursor, limit=data.limit)
    return Orders(orders=[order_shown(order) for order in page.orders], next=page.next)


# Never repeated: no key is kept yet, so that a repeat would hear 409, as if somebody else had cancelled it.
@message_pattern({"cmd": "cancel_order"})
@grpc_method("OrdersService", "CancelOrder")
def cancel_order(data: CancelOrder, ctx: RpcContext) -> Order:
    """Call an order off, and give its money back."""
    return order_shown(services.order_call_off(order_id=data.id, reason=data.reason or services.BY_CUSTOMER))


@grpc_method("OrdersService", retry="safe")
def find_all(data: FindOrders, ctx: RpcContext) -> list[Order]:
    """Return the orders of a user or in a status, the latest first."""
    return [order_shown(order) for order in selectors.order_list_all(user_id=data.user_id, status=data.status)]


@grpc_method("OrdersService", retry="safe")
async def watch_order(data: GetOrder, ctx: RpcContext) -> AsyncIterator[Order]:
    """Tell how an order stands, now and whenever that changes, until nothing can change any more."""
    version = 0
    with feed.watching(data.id) as changes:
        while True:
            order = await clients["orders"].send({"cmd": "get_order"}, {"id": data.id}, returns=Order)
            if order.version != version:
                version = order.version
                yield order
            if order.status in FINAL:
                return
            await changes.next()
