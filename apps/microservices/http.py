"""A connection of the embedded HTTP server, with the bounds that uvicorn leaves to others."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .instruments import dropped

Base: Any = AutoHTTPProtocol

HEAD_LIMIT = 64 * 1024  # bytes of a request line and headers
PATIENCE = 10.0  # seconds: for a head to be whole, for a reader to take something


class HttpConnection(Base):
    """uvicorn's HTTP/1.1, one of `most` connections of a process.

    One that is beyond them is closed at once; one whose request line and headers do not come to an end within ten
    seconds and 64 KiB, or that takes nothing of its answer for so long, is closed, too. `name` is what this
    process calls itself.
    """

    def __init__(self, *args: Any, name: str = "", most: int = 2048, patience: float = PATIENCE, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._name = name
        self._most = most
        self._patience = patience
        self._head = 0
        self._look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a connection, if there are not too many."""
        super().connection_made(transport)
        if self._most and len(self.connections) > self._most:
            self._drop("too-many")
        else:
            self._look_later(None, 0)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; what is not yet a whole head must not grow for ever."""
        before = self.cycle
        of_head = before is None or not before.more_body
        super().data_received(data)
        if self.cycle is not before:
            self._head = 0
        elif of_head:
            self._head += len(data)
            if self._head > HEAD_LIMIT:
                self._drop("too-large")

    # One timer a connection, that looks now and then: nothing is paid for each request.

    def _look_later(self, cycle: Any, unsent: int) -> None:
        self._look = self.loop.call_later(self._patience, self._look_again, cycle, unsent)

    def _look_again(self, cycle: Any, unsent: int) -> None:
        # As a WebSocket it has another owner.
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            return
        left = self.transport.get_write_buffer_size()
        if left and left == unsent:
            self._drop("slow-reader")
        elif self.cycle is cycle and (cycle is None or cycle.response_complete) and not left:
            if self._head:
                self._drop("half-request")
            else:
                self.transport.close()
        else:
            self._look_later(self.cycle, left)

    def _drop(self, reason: str) -> None:
        dropped.add(self._name, "http-connections", reason)
        self.transport.abort()
