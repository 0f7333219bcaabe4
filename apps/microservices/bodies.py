"""The bodies of HTTP requests, read before their turn comes, so that a slow sender takes nobody's place."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from .resilience.turns import Turns

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Refused(Exception):
    """A body that is not taken, and what its sender is told."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail


class Gone(Exception):
    """The sender has left."""


class Bodies(Turns):
    """Reads bodies of at most `limit` bytes, so `many` at a time; a `limit` of 0 leaves them to the application.

    Each may take `seconds` in all: per piece, a sender could make it last for ever.
    """

    def __init__(self, limit: int, many: int, seconds: float) -> None:
        super().__init__(many, 0)
        self._limit = limit
        self._seconds = seconds

    async def read(self, headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> Receive:
        """Return a `receive` that gives the body in one piece; the given one where there is no body.

        Raises Refused for one that is too large, too slow or one too many, and Gone.
        """
        length = 0
        for name, value in headers:
            if name == b"content-length" and value.isdigit():
                length = max(length, int(value))
            elif name == b"transfer-encoding":
                length = max(length, 1)
        if not length or not self._limit:
            return receive
        if length > self._limit:
            raise self._too_large()
        if not self.take():
            raise Refused(503, "overloaded", "More is sent to this process than it can take.")
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._whole(receive)
        except TimeoutError:
            raise Refused(408, "body-too-slow", f"The body took more than {self._seconds:g} s.") from None
        finally:
            self.give_back()
        return _again({"type": "http.request", "body": body, "more_body": False}, receive)

    async def _whole(self, receive: Receive) -> bytes:
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._limit:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(pieces)

    def _too_large(self) -> Refused:
        return Refused(413, "body-too-large", f"A body may have {self._limit:,} bytes.")


def _again(message: Message, receive: Receive) -> Receive:
    waiting = [message]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
