"""The REST API of the shop: each method declares the message that it sends."""

from microservices.rest import Lookup, RpcView, Send

from . import serializers


class UserList(RpcView):
    """All users, and registration."""

    get = Send(
        "users",
        {"cmd": "get_users"},
        query=serializers.UserQuery,
        returns=serializers.User,
        page="users",
        summary="List users",
    )
    post = Send(
        "users",
        {"cmd": "create_user"},
        body=serializers.UserCreate,
        returns=serializers.User,
        status=201,
        summary="Register a user",
    )


class UserDetail(RpcView):
    """One user."""

    get = Send("users", {"cmd": "get_user"}, returns=serializers.User, summary="Show a user")
    patch = Send(
        "users", {"cmd": "update_user"}, body=serializers.UserUpdate, returns=serializers.User, summary="Change a user"
    )
    delete = Send("users", {"cmd": "delete_user"}, status=204, summary="Delete a user")


class ProductList(RpcView):
    """The catalogue."""

    get = Send(
        "orders",
        {"cmd": "get_products"},
        query=serializers.ProductQuery,
        returns=serializers.Product,
        page="products",
        summary="List products",
    )


class ProductDetail(RpcView):
    """One product."""

    get = Send("orders", {"cmd": "get_product"}, returns=serializers.Product, summary="Show a product")


class OrderList(RpcView):
    """All orders, and ordering."""

    get = Send(
        "orders",
        {"cmd": "get_orders"},
        query=serializers.OrderQuery,
        returns=serializers.Order,
        page="orders",
        summary="List orders",
    )
    post = Send(
        "orders",
        {"cmd": "create_order"},
        body=serializers.OrderCreate,
        lookups={"customer": Lookup("users", {"cmd": "get_user"}, "user_id", ("id", "name", "email"))},
        returns=serializers.Order,
        status=201,
        timeout=10,  # it calls payments several times
        summary="Place an order",
    )


class OrderDetail(RpcView):
    """One order."""

    get = Send("orders", {"cmd": "get_order"}, returns=serializers.Order, summary="Show an order")


class OrderCancel(RpcView):
    """Calling one order off."""

    post = Send(
        "orders",
        {"cmd": "cancel_order"},
        body=serializers.OrderCancel,
        returns=serializers.Order,
        timeout=10,  # it calls payments several times
        summary="Cancel an order",
    )


class PaymentList(RpcView):
    """All payments."""

    get = Send(
        "payments",
        {"cmd": "get_payments"},
        query=serializers.PaymentQuery,
        returns=serializers.Payment,
        page="payments",
        summary="List payments",
    )


class PaymentDetail(RpcView):
    """One payment."""

    get = Send("payments", {"cmd": "get_payment"}, returns=serializers.Payment, summary="Show a payment")


class NotificationList(RpcView):
    """What a user was told."""

    get = Send(
        "notifications",
        {"cmd": "get_notifications"},
        query=serializers.NotificationQuery,
        returns=serializers.Notification,
        page="notifications",
        summary="List a user's notifications",
    )
