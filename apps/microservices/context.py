"""What is known about one message beside its payload."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec import Raw

from .exceptions import DeadlineExceeded

_NO_PATTERN = Raw(b"null")
NO_HEADERS: Mapping[str, Any] = MappingProxyType({})

current: ContextVar[RpcContext | None] = ContextVar("microservices.context", default=None)
"""The message that this task or thread is working on; calls made meanwhile inherit from it."""

# Facts that belong to the whole journey of a request, not to one hop (reference-system.md section 4).
_INHERITED = ("traceparent", "tracestate", "identity")


class RpcContext(msgspec.Struct, kw_only=True, eq=False):
    """The second parameter of a handler, and what every Middleware sees of a call.

    `service` is the service called, `pattern` the route, `transport` the URL scheme, `peer` the
    other side's address, `metadata` the strings that travelled beside the payload, `deadline` a
    reading of `time.monotonic()` or None. `channel` is the concrete name under which the message came,
    where `pattern` is a wildcard, `headers` what the transport's own message said beside its body, and
    `native` that message itself, as the driver gives it (docs/transports.md lists them). On the calling side
    `raw_pattern` is the pattern as JSON, as the caller wrote it, `patience` the seconds to wait for each
    next value of a stream, `record` what the transport was told beside this one message, and `tried` where
    attempts have gone already, of a service at several addresses.
    """

    # A Struct, since one is made for each message: it costs a quarter of what a class with `__init__` does.
    service: str
    pattern: str
    transport: str
    side: str
    peer: str = ""
    metadata: dict[str, str] = {}
    raw_id: str | Raw | None = None
    deadline: float | None = None
    patience: float | None = None
    raw_pattern: Raw = _NO_PATTERN
    channel: str = ""
    headers: Mapping[str, Any] = NO_HEADERS
    native: Any = None
    record: Any = None
    tried: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<RpcContext {self.side} {self.service} {self.pattern} {self.transport} {self.peer}>"

    @property
    def id(self) -> str | None:
        """The request's id as text; None for an event."""
        # A server is given it as JSON of any kind, and seldom asked for it.
        if isinstance(self.raw_id, Raw):
            self.raw_id = bytes(self.raw_id).decode("utf-8", "replace").strip('"')
        return self.raw_id

    @id.setter
    def id(self, id: str | None) -> None:
        self.raw_id = id

    def remaining(self) -> float | None:
        """Return the seconds left, never below zero; None where there is no deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def expired(self) -> bool:
        """Return whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def check_deadline(self) -> None:
        """Raise DeadlineExceeded if the caller has given up."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineExceeded()

    def cap_deadline(self, seconds: float) -> None:
        """Bring the deadline forward to `seconds` from now, if it is later than that."""
        cap = time.monotonic() + seconds
        self.deadline = cap if self.deadline is None else min(cap, self.deadline)

    def inherited(self) -> dict[str, str]:
        """Return the metadata that calls made on behalf of this message carry on."""
        return {
            key: value for key in _INHERITED if isinstance(value := self.metadata.get(key), str) and value.isprintable()
        }


@contextmanager
def beyond_deadline() -> Iterator[None]:
    """Let the calls made inside take their own time: what has begun is ended, even if its caller has given up."""
    caller = copy(current.get())
    if caller is not None:
        caller.deadline = None
    token = current.set(caller)
    try:
        yield
    finally:
        current.reset(token)


def given_up(metadata: object) -> bool:
    """Return whether a packet's metadata tells that its caller had no time left when it was sent."""
    text = metadata.get("deadline") if type(metadata) is dict else None
    return isinstance(text, str) and text != "" and not text.strip("0")


def deadline_on_wire(metadata: object) -> float | None:
    """Return the deadline that a packet's metadata asks for, as a reading of `time.monotonic()`.

    `deadline` travels as milliseconds left, so clocks need not agree; nonsense counts as none.
    """
    text = metadata.get("deadline") if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not text.isascii() or not text.isdigit() or len(text) > 12:
        return None
    return time.monotonic() + int(text) / 1000
