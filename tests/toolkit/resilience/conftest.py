"""A clock that stands still until it is told, and a service that answers as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from msgspec import Raw

from microservices.context import RpcContext


class Clock:
    """A clock that goes on when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Let the time pass at once, and note it."""
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Service:
    """An endpoint: gives or raises what it is told, one after the other, the last one for ever."""

    def __init__(self, answers: Iterable[Any] = ()) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, RpcContext]] = []
        self.gate: asyncio.Event | None = None
        """What its calls wait for."""
        self.under_way = 0

    async def __call__(self, data: Any, context: RpcContext) -> Any:
        self.calls.append((data, context))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.under_way += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.under_way -= 1
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def clock() -> Clock:
    return Clock()


def raw(text: str) -> Raw:
    """Make an answer as a transport gives it."""
    return Raw(text.encode())
