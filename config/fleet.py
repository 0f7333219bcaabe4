"""The map of the fleet: one line per service, its address, its gRPC port and its health port."""

from typing import NotRequired, TypedDict


class Place(TypedDict):
    """Where a service is found: the scheme of its URL names the transport."""

    url: str
    health: int
    grpc: NotRequired[int]


HTTP_PORT = 3000
GRPC_PORT = 5000  # of a process that serves the gRPC of all services

# Which RPC stands for which pattern, for callers whose <NAME>_URL is a grpc:// address.
RPCS = {
    "users": {"get_user": "UsersService/FindOne", "create_user": "UsersService/CreateUser"},
    "orders": {
        "get_order": "OrdersService/FindOne",
        "create_order": "OrdersService/CreateOrder",
        "cancel_order": "OrdersService/CancelOrder",
    },
    "payments": {
        "authorize_payment": "PaymentsService/Authorize",
        "capture_payment": "PaymentsService/Capture",
        "void_payment": "PaymentsService/Void",
        "refund_payment": "PaymentsService/Refund",
        "get_payment": "PaymentsService/FindOne",
        "get_payment_by_key": "PaymentsService/FindByKey",
    },
}

# What a repeated call would do, as the handlers say it, for callers in other processes, which cannot see them.
RETRY: dict[str, dict[str, str]] = {
    "users": dict.fromkeys(("get_user", "get_users", "get_users_by_ids"), "safe"),
    "orders": dict.fromkeys(("get_order", "get_orders", "get_product", "get_products"), "safe"),
    "payments": {
        **dict.fromkeys(("get_payment", "get_payment_by_key", "get_payments"), "safe"),
        **dict.fromkeys(("authorize_payment", "capture_payment", "void_payment", "refund_payment"), "keyed"),
    },
    "notifications": dict.fromkeys(("get_notifications", "mark_read"), "safe"),
}

SERVICES: dict[str, Place] = {
    "users": {"url": "tcp://127.0.0.1:3001", "grpc": 5000, "health": 9001},
    "orders": {"url": "tcp://127.0.0.1:3002", "grpc": 5001, "health": 9002},
    "payments": {"url": "tcp://127.0.0.1:3003", "grpc": 5002, "health": 9003},
    "notifications": {"url": "tcp://127.0.0.1:3004", "health": 9004},
}
