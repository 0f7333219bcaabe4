"""What travels beside gRPC's messages: errors as statuses, and metadata, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import grpc
import msgspec

from ..exceptions import INTERNAL, ConnectionLost, DeadlineExceeded, NoHandler, RpcException, Unavailable

Code = grpc.StatusCode
Metadata = tuple[tuple[str, str | bytes], ...]

ERROR_KEY = "rpc-error"
"""The trailing metadata that holds the error object, as ASCII JSON: 402 survives FAILED_PRECONDITION."""

_MAX_ERROR = 4096
_MAX_DETAILS = 1024

_TO_STATUS = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    402: Code.FAILED_PRECONDITION,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    409: Code.FAILED_PRECONDITION,
    412: Code.ABORTED,
    422: Code.INVALID_ARGUMENT,
    429: Code.RESOURCE_EXHAUSTED,
    499: Code.CANCELLED,
    501: Code.UNIMPLEMENTED,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}
_FROM_STATUS = {
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 409,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNAUTHENTICATED: 401,
}
_BY_NUMBER: dict[Any, grpc.StatusCode] = {code.value[0]: code for code in Code}


def to_status(error: RpcException) -> tuple[grpc.StatusCode, str, Metadata]:
    """Return the status, the details and the trailing metadata that an error travels as.

    As in NestJS, a numeric `code` is the status itself, and a plain text is UNKNOWN; `statusCode` is
    mapped by the table of reference-system.md section 8.
    """
    whole = error.error if isinstance(error.error, Mapping) else {}
    number = whole.get("code")
    details = str(whole.get("details") or error.message)[:_MAX_DETAILS]
    if type(number) is int and number in _BY_NUMBER and number:
        return _BY_NUMBER[number], details, _error_object(whole)
    if isinstance(error, NoHandler):
        return Code.UNIMPLEMENTED, details, ()
    if not whole:
        odd = () if isinstance(error.error, str) else _error_object(error.to_wire())
        return (Code.INTERNAL if error.message == INTERNAL else Code.UNKNOWN), details, odd
    status = _TO_STATUS.get(error.status_code, Code.INTERNAL if error.status_code >= 500 else Code.FAILED_PRECONDITION)
    if error.status_code == 409 and error.code.endswith(("-taken", "-exists")):
        status = Code.ALREADY_EXISTS
    return status, details, _error_object(whole)


def from_status(error: grpc.aio.AioRpcError, service: str) -> RpcException:
    """Return the exception that a peer's status stands for."""
    status, details = error.code(), error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY:
            with suppress(ValueError):
                return RpcException.from_wire(json.loads(value))
    if status is Code.UNAVAILABLE:
        return _unreachable(details, service)
    if status is Code.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{service} did not answer in time.")
    if status is Code.UNIMPLEMENTED:
        return NoHandler()
    if status in _FROM_STATUS:
        word = status.name.lower().replace("_", "-")
        return RpcException({"statusCode": _FROM_STATUS[status], "code": word, "message": details})
    return RpcException(INTERNAL if status is Code.INTERNAL else details)


def _unreachable(details: str, service: str) -> RpcException:
    # Whether anything was sent is told in words only.
    if "failed to connect" in details.lower() or "resolution" in details.lower():
        return Unavailable(f"{service} cannot be reached: {details}")
    return ConnectionLost(f"Connection closed: {details}")


def _error_object(whole: Mapping[str, Any]) -> Metadata:
    for part in (whole, {key: whole[key] for key in ("statusCode", "code", "message") if key in whole}):
        try:
            text = json.dumps(msgspec.to_builtins(part), separators=(",", ":"))  # ASCII, as metadata must be
        except TypeError:
            continue
        if len(text) <= _MAX_ERROR:
            return ((ERROR_KEY, text),)
    return ()


def to_metadata(texts: Mapping[str, str], id: str) -> Metadata:
    """Return metadata as gRPC carries it: what is not printable ASCII goes as UTF-8 under `<name>-bin`.

    Raises RpcException for a name that gRPC does not allow.
    """
    pairs: list[tuple[str, str | bytes]] = [("id", id)]
    for name, value in texts.items():
        key = name.lower()
        if (
            not key.isascii()
            or not key.replace("-", "").replace("_", "").replace(".", "").isalnum()
            or key.startswith("grpc-")
        ):
            message = f"{name!r} is no name for gRPC metadata."
            raise RpcException({"statusCode": 400, "code": "bad-metadata", "message": message})
        if key == "id" or key.endswith("-bin"):
            continue
        fits = value.isascii() and value.isprintable() and value == value.strip()
        pairs.append((key, value) if fits else (f"{key}-bin", value.encode("utf-8", "replace")))
    return tuple(pairs)


def from_metadata(pairs: Any) -> dict[str, str]:
    """Return the texts among a peer's metadata; what is no UTF-8 is left to the handler, in `native`."""
    texts: dict[str, str] = {}
    for key, value in pairs:
        if key.startswith("grpc-") or key == "user-agent":
            continue
        if isinstance(value, str):
            texts[key] = value
        else:
            with suppress(UnicodeDecodeError):
                texts[key.removesuffix("-bin")] = value.decode()
    return texts
