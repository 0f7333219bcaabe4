"""What the notifications service refuses, as its callers see it."""

from microservices import RpcException


class NotificationNotFound(RpcException):
    """404: the user has no such notification, or the id is not one."""

    def __init__(self) -> None:
        message = "There is no such notification."
        super().__init__({"statusCode": 404, "code": "notification-not-found", "message": message})


class InvalidCursor(RpcException):
    """400: the cursor is not one that a list gave out."""

    def __init__(self) -> None:
        message = "This is not a cursor from an earlier page."
        error = {"pointer": "/cursor", "message": message, "code": "invalid"}
        super().__init__({"statusCode": 400, "code": "invalid", "message": message, "errors": [error]})
