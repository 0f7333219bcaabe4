"""The .proto files of the shop and the handlers that answer for them."""

from collections import Counter
from pathlib import Path

import pytest

from microservices.handlers import Door, Handler, registry
from microservices.transports import protos
from microservices.transports.grpc import check

ROOT = Path(__file__).resolve().parents[2]
FILES = protos.load((str(ROOT / "proto"),))
METHODS = [method for methods in FILES.services.values() for method in methods.values()]

SERVED = {
    "/users.UsersService/FindOne": "users.handlers.get_user",
    "/users.UsersService/FindAll": "users.handlers.find_all",
    "/users.UsersService/CreateUser": "users.handlers.create_user",
    "/orders.OrdersService/CreateOrder": "orders.handlers.create_order",
    "/orders.OrdersService/FindOne": "orders.handlers.get_order",
    "/orders.OrdersService/FindAll": "orders.handlers.find_all",
    "/orders.OrdersService/CancelOrder": "orders.handlers.cancel_order",
    "/orders.OrdersService/WatchOrder": "orders.handlers.watch_order",
    "/payments.PaymentsService/Authorize": "payments.handlers.authorize_payment",
    "/payments.PaymentsService/Capture": "payments.handlers.capture_payment",
    "/payments.PaymentsService/Void": "payments.handlers.void_payment",
    "/payments.PaymentsService/Refund": "payments.handlers.refund_payment",
    "/payments.PaymentsService/FindOne": "payments.handlers.get_payment",
    "/payments.PaymentsService/FindByKey": "payments.handlers.get_payment_by_key",
}


def doors() -> list[tuple[str, Handler, Door]]:
    """Return every gRPC door of the shop: its service, its handler and itself."""
    return [
        (service, handler, door)
        for service in ("users", "orders", "payments", "notifications")
        for handler in registry.of(service)
        for door in handler.doors
        if door.kind == "grpc"
    ]


def test_every_rpc_is_served_by_exactly_one_handler_of_its_service() -> None:
    served = Counter(FILES.method(door.route).path for _, _, door in doors())

    assert served == Counter(method.path for method in METHODS)
    assert {FILES.method(door.route).path: handler.name for _, handler, door in doors()} == SERVED
    assert all(FILES.method(door.route).service.startswith(f"{service}.") for service, _, door in doors())


@pytest.mark.parametrize("path", SERVED)
def test_a_handler_streams_as_its_rpc_does(path: str) -> None:
    [handler] = [handler for _, handler, door in doors() if FILES.method(door.route).path == path]

    check(handler, FILES.method(path))


def test_what_changes_nothing_is_safe_to_repeat_and_what_has_a_key_is_told_apart_by_it() -> None:
    retries = {FILES.method(door.route).path.rpartition(".")[2]: door.retry for _, _, door in doors()}

    assert {path for path, retry in retries.items() if retry == "safe"} == {
        *("UsersService/FindOne", "UsersService/FindAll"),
        *("PaymentsService/FindOne", "PaymentsService/FindByKey"),
        *("OrdersService/FindOne", "OrdersService/FindAll", "OrdersService/WatchOrder"),
    }
    assert {path for path, retry in retries.items() if retry == "keyed"} == {
        f"PaymentsService/{name}" for name in ("Authorize", "Capture", "Void", "Refund")
    }
