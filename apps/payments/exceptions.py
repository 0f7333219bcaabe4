"""What the payments service refuses, as its callers see it."""

from microservices import RpcException


class PaymentNotFound(RpcException):
    """404: there is no such payment, or the id is not one."""

    def __init__(self) -> None:
        super().__init__({"statusCode": 404, "code": "payment-not-found", "message": "There is no such payment."})


class PaymentDeclined(RpcException):
    """402: the provider refuses this way of paying."""

    def __init__(self, decline_code: str) -> None:
        message = "The payment was declined."
        super().__init__(
            {"statusCode": 402, "code": "payment-declined", "message": message, "decline_code": decline_code}
        )


class WrongState(RpcException):
    """409: the payment is past the point where this could be done."""

    def __init__(self, state: str) -> None:
        message = f"This cannot be done with a payment that is {state}."
        super().__init__({"statusCode": 409, "code": "wrong-state", "message": message, "state": state})


class KeyReused(RpcException):
    """409: the key belongs to another payment or refund, or to one of another amount."""

    def __init__(self) -> None:
        message = "This key was used for another payment or amount."
        super().__init__({"statusCode": 409, "code": "key-reused", "message": message})


class RefundTooLarge(RpcException):
    """409: so much was not taken, or is given back already; `left` is what can still be given back."""

    def __init__(self, left: int) -> None:
        message = f"Only {left} of this payment can still be given back."
        error = {"pointer": "/amount", "message": message, "code": "refund-too-large"}
        super().__init__(
            {"statusCode": 409, "code": "refund-too-large", "message": message, "left": left, "errors": [error]}
        )


class ProviderSilent(RpcException):
    """504: the provider did not answer; whether it did what it was asked is unknown."""

    def __init__(self) -> None:
        message = "The payment provider did not answer."
        super().__init__({"statusCode": 504, "code": "provider-timeout", "message": message})


class InvalidCursor(RpcException):
    """400: the cursor is not one that a list gave out."""

    def __init__(self) -> None:
        message = "This is not a cursor from an earlier page."
        error = {"pointer": "/cursor", "message": message, "code": "invalid"}
        super().__init__({"statusCode": 400, "code": "invalid", "message": message, "errors": [error]})
