"""Every error of the toolkit.

MicroserviceError
├── ConfigurationError          a setting, address or handler is declared wrongly
├── PacketError                 bytes that are no packet
│   └── FrameError              bytes that are no frame: the connection cannot go on
└── RpcException                an error meant for the caller; travels as `err`
    ├── InvalidPayload          400  the payload does not fit the handler's annotation
    ├── NoHandler               502  nobody handles this pattern
    ├── Unavailable             503  the service cannot be reached; nothing was sent
    │   └── ConnectionLost      503  the connection ended under the call: outcome unknown
    └── DeadlineExceeded        504  no answer in time: outcome unknown

A handler's own errors are RpcExceptions with a mapping or a text; whatever else it
raises reaches the caller as "Internal server error" and the log with its traceback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NO_HANDLER = "There is no matching message handler defined in the remote service."
INTERNAL = "Internal server error"
FORBIDDEN = "Forbidden resource"
TRACEBACK = "traceback"
"""Where a service in development tells a caller what went wrong in it."""


class MicroserviceError(Exception):
    """The root of all errors of the toolkit."""


class ConfigurationError(MicroserviceError):
    """A setting, an address or a handler is declared wrongly."""


class PacketError(MicroserviceError):
    """These bytes are no packet."""


class FrameError(PacketError):
    """These bytes are no frame; the rest of the stream cannot be read either."""


class RpcException(MicroserviceError):
    """An error meant for the caller.

    `error` is a mapping, sent verbatim, or any other value, sent as
    `{"status": "error", "message": error}` (nest-wire.md section 4). A mapping should carry
    `statusCode` (400-599), `code` (a stable kebab-case word) and `message`, and may carry
    `errors`, a list of `{"pointer", "message", "code"}`.
    """

    def __init__(self, error: Any = INTERNAL) -> None:
        super().__init__(error)
        self.error = error

    @classmethod
    def from_wire(cls, err: Any) -> RpcException:
        """Return the exception that a peer's `err` stands for."""
        if err == NO_HANDLER:
            return NoHandler()
        if isinstance(err, Mapping) and err.get("status") == "error" and set(err) == {"status", "message"}:
            return RpcException(err["message"])
        if isinstance(err, Mapping) and isinstance(err.get(TRACEBACK), str):
            error = cls.from_wire({key: value for key, value in err.items() if key != TRACEBACK})
            error.add_note(f"In the service:\n{err[TRACEBACK]}")
            return error
        error = RpcException(err)
        # Which side notices first that the time is over must make no difference to the caller.
        return DeadlineExceeded(error.message) if error.code == DeadlineExceeded.code else error

    def to_wire(self) -> Any:
        """Return the value of `err` in the response packet."""
        if isinstance(self.error, Mapping):
            return self.error
        return {"status": "error", "message": self.error}

    def __str__(self) -> str:
        return self.message

    @property
    def status_code(self) -> int:
        """The HTTP status of this error; 500 where the peer named none."""
        if isinstance(self.error, Mapping):
            for key in ("statusCode", "status"):
                status = self.error.get(key)
                if type(status) is int and 400 <= status <= 599:
                    return status
        return 403 if self.message == FORBIDDEN else 500

    @property
    def code(self) -> str:
        """A stable word for the kind of error."""
        if isinstance(self.error, Mapping) and isinstance(self.error.get("code"), str):
            return str(self.error["code"])
        if self.status_code != 500:
            return _CODES.get(self.status_code, "rpc-error")
        return "internal" if self.message == INTERNAL else "rpc-error"

    @property
    def message(self) -> str:
        """One sentence for people. A list (NestJS's class-validator) is in `errors` instead."""
        message = self.error.get("message", "") if isinstance(self.error, Mapping) else self.error
        if isinstance(message, list):
            return "The data is not valid."
        return message if isinstance(message, str) else repr(message)

    @property
    def errors(self) -> list[dict[str, Any]]:
        """What is wrong with which field: `{"pointer", "message", "code"}` each."""
        error = self.error if isinstance(self.error, Mapping) else {"message": self.error}
        errors = error.get("errors")
        if isinstance(errors, list):
            return [dict(error) for error in errors if isinstance(error, Mapping)]
        message = error.get("message")
        if isinstance(message, list):
            return [{"pointer": "", "message": str(text), "code": "invalid"} for text in message]
        return []

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later."""
        return self.status_code in (429, 503, 504)

    @property
    def retry_after(self) -> int | None:
        """After how many seconds it may, where that is known: what the peer named (`retryAfter`), 1 for a 503."""
        told = self.error.get("retryAfter") if isinstance(self.error, Mapping) else None
        if isinstance(told, int | float) and not isinstance(told, bool) and 0 <= told < 2**31:
            return math.ceil(told)
        return 1 if self.status_code == 503 else None


_CODES = {400: "invalid", 401: "unauthenticated", 403: "forbidden", 404: "not-found", 409: "conflict", 429: "quota"}


class InvalidPayload(RpcException):
    """The payload does not fit the handler's annotation.

    `pointer` is a JSON pointer (RFC 6901); `errors` are several of them, each with its `message` and `code`.
    """

    def __init__(self, message: str, pointer: str = "", errors: list[dict[str, Any]] | None = None) -> None:
        fields = errors or [{"pointer": pointer, "message": message, "code": "invalid"}]
        super().__init__({"statusCode": 400, "code": "invalid", "message": message, "errors": fields})


class NoHandler(RpcException):
    """Nobody handles this pattern. Travels as NestJS's own text."""

    status_code = 502
    code = "no-handler"

    def __init__(self) -> None:
        super().__init__(NO_HANDLER)

    def to_wire(self) -> str:
        return NO_HANDLER


class Unavailable(RpcException):
    """The service cannot be reached; nothing was sent, so any call may be tried elsewhere."""

    def __init__(self, message: str, code: str = "unavailable") -> None:
        super().__init__({"statusCode": 503, "code": code, "message": message})


class ConnectionLost(Unavailable):
    """The connection ended under the call; whether the service did the work is unknown."""

    def __init__(self, message: str = "Connection closed") -> None:
        super().__init__(message, code="connection-lost")


class Draining(RpcException):
    """The service is about to end, and has not done the work."""

    def __init__(self, service: str) -> None:
        super().__init__({"statusCode": 503, "code": "draining", "message": f"{service} is about to end."})


class DeadlineExceeded(RpcException):
    """No answer in time; whether the service did the work is unknown."""

    code = "deadline-exceeded"

    def __init__(self, message: str = "The deadline of the call has passed.") -> None:
        super().__init__({"statusCode": 504, "code": self.code, "message": message})
