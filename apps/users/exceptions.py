"""What the users service refuses, as its callers see it."""

from microservices import RpcException


class UserNotFound(RpcException):
    """404: there is no such user, or the id is not one."""

    def __init__(self) -> None:
        super().__init__({"statusCode": 404, "code": "user-not-found", "message": "There is no such user."})


class EmailTaken(RpcException):
    """409: another user has this e-mail address."""

    def __init__(self) -> None:
        super().__init__({"statusCode": 409, "code": "email-taken", "message": "Another user has this e-mail address."})


class VersionMismatch(RpcException):
    """412: the user has changed since the caller read it."""

    def __init__(self, current: int) -> None:
        message = f"The user has changed meanwhile and is now at version {current}."
        super().__init__({"statusCode": 412, "code": "version-mismatch", "message": message})


class InvalidCursor(RpcException):
    """400: the cursor is not one that a list gave out."""

    def __init__(self) -> None:
        message = "This is not a cursor from an earlier page."
        error = {"pointer": "/cursor", "message": message, "code": "invalid"}
        super().__init__({"statusCode": 400, "code": "invalid", "message": message, "errors": [error]})
