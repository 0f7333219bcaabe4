"""What waits for the answers of a peer: a call for one value, a stream for many."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from msgspec import Raw

from ..exceptions import RpcException


class Call:
    """One request for one value."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[Raw | None]) -> None:
        self.future = future

    def take(self, value: Raw) -> None:
        if not self.future.done():
            self.future.set_result(value)

    def end(self) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def fail(self, error: RpcException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


END = object()
"""What a stream gives after its last value."""


class Stream:
    """The values of one request, waiting to be taken; never more than `limit`."""

    __slots__ = ("_limit", "_room", "_values", "_wake")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: deque[Any] = deque()
        self._wake = asyncio.Event()
        self._room: asyncio.Future[None] | None = None

    async def get(self) -> Any:
        while not self._values:
            self._wake.clear()
            await self._wake.wait()
        value = self._values.popleft()
        if self._room is not None and len(self._values) <= self._limit // 4:
            self.open()
        if isinstance(value, RpcException):
            raise value
        return value

    def take(self, value: Raw) -> asyncio.Future[None] | None:
        if len(self._values) >= self._limit:
            overflow = {"statusCode": 500, "code": "stream-overflow", "message": "The values came too fast."}
            self._values.clear()
            self.fail(RpcException(overflow))
            return None
        self._put(value)
        if len(self._values) >= self._limit // 2 and self._room is None:
            self._room = asyncio.get_running_loop().create_future()
        return self._room

    def end(self) -> None:
        self._put(END)

    def fail(self, error: RpcException) -> None:
        self._put(error)

    def open(self) -> None:
        """Let a sender that was held back go on."""
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def _put(self, value: Any) -> None:
        self._values.append(value)
        self._wake.set()
