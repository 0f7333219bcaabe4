"""An event loop on which no time passes but that which everybody waits for."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
BEGIN = 1000.0


class _Selector(selectors.DefaultSelector):
    """Waits for nobody: it lets the time pass at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = BEGIN

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise RuntimeError("All wait, and nothing is due.")
            self.now += max(0.0, timeout)
        return events


class TimelessLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to what is due next."""

    def __init__(self) -> None:
        self._seconds = _Selector()
        super().__init__(self._seconds)

    def time(self) -> float:
        return self._seconds.now


def clock() -> float:
    """Return the time of the running loop; that of its beginning before it runs."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return BEGIN


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop of its own."""
    with asyncio.Runner(loop_factory=TimelessLoop) as runner:
        return runner.run(work)
