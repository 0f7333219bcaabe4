"""Answers that are kept for a while, and equal calls that share one."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from ..codec import UNENCODABLE, encode
from ..context import RpcContext
from ..exceptions import DeadlineExceeded
from ..middleware import Endpoint

Key = tuple[str, bytes, str]


def key_of(data: Any, context: RpcContext) -> Key | None:
    """Return what makes two calls equal: pattern, data, and for whom they are made; None for data without JSON."""
    try:
        return context.pattern, encode(data), context.metadata.get("identity", "")
    except UNENCODABLE:
        return None  # to be told by the transport, as ever


class Cache:
    """A Middleware that keeps the answers of a safe pattern for `ttl` seconds, at most `size` of them.

    The one used longest ago goes first. Errors are not kept.
    """

    def __init__(self, ttl: float, size: int = 1000, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl = ttl
        self._size = size
        self._clock = clock
        self._kept: OrderedDict[Key, tuple[float, Any]] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def cached(data: Any, context: RpcContext) -> Any:
            key = key_of(data, context)
            if key is None:
                return await endpoint(data, context)
            kept = self._kept.get(key)
            if kept is not None and kept[0] > self._clock():
                self._kept.move_to_end(key)
                self.hits += 1
                return kept[1]
            self.misses += 1
            result = await endpoint(data, context)
            self._kept[key] = self._clock() + self._ttl, result
            self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
            return result

        return cached

    def clear(self) -> None:
        """Forget all answers."""
        self._kept.clear()


class _Shared:
    """A call that several wait for."""

    __slots__ = ("task", "waiting")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.waiting = 0


class Coalescing:
    """A Middleware by which equal calls of a safe pattern that are under way at the same time are made once.

    The call goes on for as long as one of those who share it waits.
    """

    def __init__(self) -> None:
        self._under_way: dict[Key, _Shared] = {}

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def shared(data: Any, context: RpcContext) -> Any:
            key = key_of(data, context)
            if key is None:
                return await endpoint(data, context)
            while True:
                call = self._under_way.get(key)
                leads = call is None
                if call is None:
                    call = self._start(key, endpoint(data, context))
                call.waiting += 1
                try:
                    async with asyncio.timeout(context.remaining()):
                        return await asyncio.shield(call.task)
                except TimeoutError:
                    raise DeadlineExceeded() from None
                except DeadlineExceeded:
                    if leads or context.expired():
                        raise
                    # It was the leader's time that was over: whoever has some left asks again.
                finally:
                    call.waiting -= 1
                    if not call.waiting and not call.task.done():
                        self._forget(key, call)
                        call.task.cancel()

        return shared

    def _start(self, key: Key, work: Any) -> _Shared:
        # A task of its own, since its leader may be the first to go.
        call = _Shared(asyncio.get_running_loop().create_task(work, context=copy_context()))
        self._under_way[key] = call
        call.task.add_done_callback(lambda task: self._ended(key, call, task))
        return call

    def _ended(self, key: Key, call: _Shared, task: asyncio.Task[Any]) -> None:
        self._forget(key, call)
        if not task.cancelled():
            task.exception()  # seen, even where nobody waits any more

    def _forget(self, key: Key, call: _Shared) -> None:
        if self._under_way.get(key) is call:
            del self._under_way[key]
