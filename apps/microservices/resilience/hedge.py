"""A second request where the first takes longer than nearly all do."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from copy import copy
from typing import Any

from ..context import RpcContext
from ..middleware import Endpoint
from .retry import Budget

_KEPT = 200
_LEAST = 20
_REFRESH = 20


class Hedge:
    """A Middleware that asks again when a call of a safe pattern takes longer than 95 of 100 do; the first answer wins.

    The second request comes out of the retry `budget`. Nothing is hedged before twenty answers are known.
    """

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget = budget
        self._clock = clock
        self._times: deque[float] = deque(maxlen=_KEPT)
        self._since = 0
        self._p95: float | None = None
        self.hedged = 0

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def hedged(data: Any, context: RpcContext) -> Any:
            began = self._clock()
            patience = self._p95
            if patience is None:
                result = await endpoint(data, context)
            else:
                result = await self._first_of_two(endpoint, data, context, patience)
            self._note(self._clock() - began)
            return result

        return hedged

    async def _first_of_two(self, endpoint: Endpoint, data: Any, context: RpcContext, patience: float) -> Any:
        # A context for each: the transport gives it its id. The second goes elsewhere than the first has gone.
        first = copy(context)
        tasks = {self._start(endpoint, data, first)}
        try:
            done, _ = await asyncio.wait(tasks, timeout=patience)
            if not done and self._budget.take():
                self.hedged += 1
                tasks.add(self._start(endpoint, data, copy(first)))
            while True:
                done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                # An error of one is the answer only where the other has failed, too.
                answers = [task for task in done if task.exception() is None]
                if answers or not left:
                    return (answers or list(done))[0].result()
                tasks = left
        finally:
            for task in tasks:
                task.cancel()

    @staticmethod
    def _start(endpoint: Endpoint, data: Any, context: RpcContext) -> asyncio.Task[Any]:
        work: Any = endpoint(data, context)
        return asyncio.get_running_loop().create_task(work, context=copy_context())

    def _note(self, seconds: float) -> None:
        self._times.append(seconds)
        self._since += 1
        if len(self._times) >= _LEAST and self._since >= _REFRESH:
            self._since = 0
            self._p95 = sorted(self._times)[len(self._times) * 95 // 100]
