"""What the orders service refuses, as its callers see it."""

from collections.abc import Mapping, Sequence

from microservices import RpcException


class ProductNotFound(RpcException):
    """404: there is no such product on offer, or the id is not one."""

    def __init__(self) -> None:
        super().__init__({"statusCode": 404, "code": "product-not-found", "message": "There is no such product."})


class OrderNotFound(RpcException):
    """404: there is no such order, or the id is not one."""

    def __init__(self) -> None:
        super().__init__({"statusCode": 404, "code": "order-not-found", "message": "There is no such order."})


class UnknownProducts(RpcException):
    """400: these lines name products that are not on offer."""

    def __init__(self, lines: Sequence[int]) -> None:
        message = "There is no such product."
        errors = [
            {"pointer": f"/lines/{line}/product_id", "message": message, "code": "unknown-product"} for line in lines
        ]
        super().__init__({"statusCode": 400, "code": "unknown-product", "message": message, "errors": errors})


class MixedCurrencies(RpcException):
    """400: one order is paid in one currency."""

    def __init__(self) -> None:
        message = "The products of an order must have the same currency."
        error = {"pointer": "/lines", "message": message, "code": "mixed-currencies"}
        super().__init__({"statusCode": 400, "code": "mixed-currencies", "message": message, "errors": [error]})


class OutOfStock(RpcException):
    """409: of these lines less is available than wanted; `available` is by the line's index."""

    def __init__(self, available: Mapping[int, int]) -> None:
        errors = [
            {
                "pointer": f"/lines/{line}",
                "message": f"Only {rest} of this product can be ordered now.",
                "code": "out-of-stock",
                "available": rest,
            }
            for line, rest in sorted(available.items())
        ]
        message = "There is not enough in stock."
        super().__init__({"statusCode": 409, "code": "out-of-stock", "message": message, "errors": errors})


class WrongState(RpcException):
    """409: the order is past the point where this could be done."""

    def __init__(self, state: str) -> None:
        self.state = state
        message = f"This cannot be done with an order that is {state}."
        super().__init__({"statusCode": 409, "code": "wrong-state", "message": message, "state": state})


class PaymentDeclined(RpcException):
    """402: the way of paying was refused; the order is cancelled."""

    def __init__(self, order_id: str, decline_code: str) -> None:
        message = "The payment was declined; the order is cancelled."
        error = {"pointer": "/payment_token", "message": message, "code": decline_code}
        super().__init__(
            {
                "statusCode": 402,
                "code": "payment-declined",
                "message": message,
                "order_id": order_id,
                "errors": [error],
            }
        )


class PaymentUnknown(RpcException):
    """503, or 504 where the time was over: nobody can say whether it was paid; the order is cancelled.

    `payment_id` names the payment, where there is one.
    """

    def __init__(self, order_id: str, *, late: bool, payment_id: str | None = None) -> None:
        self.payment_id = payment_id
        super().__init__(
            {
                "statusCode": 504 if late else 503,
                "code": "payment-timeout" if late else "payment-unavailable",
                "message": "The payment could not be made now; the order is cancelled.",
                "order_id": order_id,
            }
        )


class InvalidCursor(RpcException):
    """400: the cursor is not one that a list gave out."""

    def __init__(self) -> None:
        message = "This is not a cursor from an earlier page."
        error = {"pointer": "/cursor", "message": message, "code": "invalid"}
        super().__init__({"statusCode": 400, "code": "invalid", "message": message, "errors": [error]})
