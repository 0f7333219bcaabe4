"""What travels beside gRPC's messages: errors as statuses, and metadata, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import grpc
import msgspec

from ..exceptions import INTERNAL, ConnectionLost, DeadlineExceeded, NoHandler, RpcException, Unavailable

Code = grpc.StatusCode
Metadata = tuple[tuple[str, str | bytes], ...]

ERROR_KEY = "rpc-error"
"""The trailing metadata that holds the error object, as ASCII JSON: 402 survives FAILED_PRECONDITION."""

# Together well below the 8 KiB of metadata that a peer takes; a text may triple on the wire, or grow sixfold.
_MAX_ERROR = 4096
_MAX_DETAILS = 700  # bytes of UTF-8
_MAX_MESSAGE = 250  # characters

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
# grpc's own sentences for a call that never left; whether anything was sent is told in words only.
_NEVER_SENT = ("failed to connect to all addresses", "connections to all backends failing", "DNS resolution failed")
_TOO_LARGE = (
    "SERVER: Received message larger than max",
    "CLIENT: Sent message larger than max",
    "received metadata size",
)


def to_status(error: RpcException) -> tuple[grpc.StatusCode, str, Metadata]:
    """Return the status, the details and the trailing metadata that an error travels as.

    As in NestJS, a numeric `code` is the status itself, and a plain text is UNKNOWN; `statusCode` is
    mapped by the table of reference-system.md section 8.
    """
    whole = error.error if isinstance(error.error, Mapping) else {}
    number = whole.get("code")
    details = _cut(str(whole.get("details") or error.message))
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
    told = _told(error)
    if told is not None:
        return RpcException.from_wire(told)
    if status is Code.UNAVAILABLE:
        if details.startswith(_NEVER_SENT):
            return Unavailable(f"{service} cannot be reached: {details}")
        return ConnectionLost(f"Connection closed: {details}")
    if status is Code.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{service} did not answer in time.")
    if status is Code.UNIMPLEMENTED:
        return NoHandler()
    if status is Code.RESOURCE_EXHAUSTED and details.startswith(_TOO_LARGE):
        # Not 429: the same call can never succeed.
        return RpcException({"statusCode": 413, "code": "too-large", "message": details})
    if status in _FROM_STATUS:
        return RpcException(_named(status, details))
    return RpcException(INTERNAL if status is Code.INTERNAL else details)


def _told(error: grpc.aio.AioRpcError) -> Any:
    """Return the error object of a peer, if it sent one that says more than the status does."""
    for key, value in error.trailing_metadata() or ():
        if key != ERROR_KEY:
            continue
        try:
            told = json.loads(value)
        except (ValueError, RecursionError):
            return None
        if not isinstance(told, dict) or not told:
            return None
        if type(told.get("code")) is int and "statusCode" not in told and error.code() in _FROM_STATUS:
            told["statusCode"] = _FROM_STATUS[error.code()]  # NestJS's form names the gRPC status alone
        odd = set(told) == {"status", "message"}
        return told if odd or RpcException(told).status_code != 500 or error.code() is Code.INTERNAL else None
    return None


def _named(status: grpc.StatusCode, details: str) -> dict[str, Any]:
    word = status.name.lower().replace("_", "-")
    return {"statusCode": _FROM_STATUS[status], "code": word, "message": details}


def _cut(text: str) -> str:
    # Half a character, as JavaScript may send it, would leave grpc unable to answer at all.
    return text.encode("utf-8", "replace")[:_MAX_DETAILS].decode("utf-8", "ignore")


def _error_object(whole: Mapping[str, Any]) -> Metadata:
    short = {key: whole[key] for key in ("statusCode", "code") if key in whole}
    if isinstance(whole.get("message"), str):
        short["message"] = whole["message"][:_MAX_MESSAGE]
    for part in (whole, short):
        try:
            text = json.dumps(msgspec.to_builtins(part), separators=(",", ":"))  # ASCII, as metadata must be
        except (TypeError, ValueError, RecursionError, OverflowError):
            continue
        if len(text) <= _MAX_ERROR:
            return ((ERROR_KEY, text),)
    return ()


def to_metadata(texts: Mapping[str, str], id: str) -> Metadata:
    """Return metadata as gRPC carries it: what is not printable ASCII goes as UTF-8 under `<name>-bin`.

    Raises RpcException for a name that gRPC does not allow, or keeps for itself.
    """
    pairs: list[tuple[str, str | bytes]] = [("id", id)]
    for name, value in texts.items():
        key = name.lower()
        if key == "id":
            continue
        plain = key.replace("-", "").replace("_", "").replace(".", "")
        if not (plain.isascii() and plain.isalnum()) or key.startswith("grpc-") or key.endswith("-bin"):
            message = f"{name!r} is no name for gRPC metadata."
            raise RpcException({"statusCode": 400, "code": "bad-metadata", "message": message})
        fits = value.isascii() and value.isprintable() and value == value.strip()
        pairs.append((key, value) if fits else (f"{key}-bin", value.encode("utf-8", "replace")))
    return tuple(pairs)


def from_metadata(pairs: Any) -> dict[str, str]:
    """Return the texts among a peer's metadata; what is no text is left to the handler, in `native`."""
    texts: dict[str, str] = {}
    binary: dict[str, str] = {}
    for key, value in pairs:
        if key.startswith("grpc-") or key == "user-agent":
            continue
        if isinstance(value, str):
            texts[key] = value
        else:
            try:
                text = value.decode()
            except UnicodeDecodeError:
                continue
            binary[key.removesuffix("-bin")] = text
    # The plain name wins: whoever strips or sets `identity` on the way must not be got around.
    return binary | texts
