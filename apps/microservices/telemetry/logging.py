"""One log line a call, on both sides: pattern, peer, time, status and id, never a payload."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from ..context import RpcContext
from ..exceptions import ConfigurationError, RpcException
from ..instruments import Bound, dropped
from ..middleware import Call, Endpoint
from ..packets import pattern_name

_Line = tuple[float, str, str, str, int, float, str, str, str]
_MAX_ID = 64

# What is told every few seconds would drown the rest.
_QUIET = ("instance_up",)

_FIELDS = ("side", "service", "pattern", "status", "ms", "transport", "peer", "id")


class CallLog:
    """A Middleware that notes each call and leaves the formatting to a thread of its own.

    A line through `logging` costs many times what a call does, so the call only appends to a
    bounded queue. `logger` receives the records; what the thread cannot keep up with is dropped
    and counted. `sample` is the part of the calls that is noted, at most 1; a call that failed always is.
    """

    def __init__(self, logger: logging.Logger | None = None, *, limit: int = 10_000, sample: float = 1) -> None:
        if not 0 <= sample <= 1:
            raise ConfigurationError(f"CallLog(sample={sample!r}): a part of all calls, between 0 and 1.")
        self._logger = logger or logging.getLogger("microservices.calls")
        self._sample = sample
        self._due = 0.0
        self._limit = limit
        self._lines: deque[_Line] = deque()
        self._wake = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def logged(data: Any, context: RpcContext) -> Any:
            started = time.perf_counter()
            try:
                result = await endpoint(data, context)
            except RpcException as error:
                self._note(context, started, error.status_code)
                raise
            except asyncio.CancelledError:
                self._note(context, started, _given_up(context))
                raise
            except BaseException:
                self._note(context, started, 500)
                raise
            if hasattr(result, "__aiter__"):
                return self._to_the_end(result, context, started)
            if self._chosen():
                self._note(context, started, 200)
            return result

        return logged

    def in_place(self, call: Call) -> Call:
        """Note the calls of an inline handler."""

        def logged(data: Any, context: RpcContext) -> Any:
            started = time.perf_counter()
            try:
                result = call(data, context)
            except Exception as error:
                self._note(context, started, error.status_code if isinstance(error, RpcException) else 500)
                raise
            if self._chosen():
                self._note(context, started, 200)
            return result

        return logged

    @property
    def bounds(self) -> list[Bound]:
        """The lines that are not written yet."""
        return [Bound("call-log", len(self._lines), self._limit)]

    def flush(self) -> None:
        """Write what waits, now."""
        with self._writing:
            while self._lines:
                self._write(self._lines.popleft())

    async def _to_the_end(self, values: AsyncIterator[Any], context: RpcContext, started: float) -> AsyncIterator[Any]:
        status = 500
        try:
            async for value in values:
                yield value
            status = 200
        except RpcException as error:
            status = error.status_code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            status = _given_up(context)
            raise
        finally:
            if status != 200 or self._chosen():
                self._note(context, started, status)
            if hasattr(values, "aclose"):
                await values.aclose()

    def _chosen(self) -> bool:
        # Evenly, not at random: cheaper, and no run of luck hides a handler.
        self._due += self._sample
        if self._due < 1:
            return False
        self._due -= 1
        return True

    def _note(self, context: RpcContext, started: float, status: int) -> None:
        if len(self._lines) >= self._limit:
            dropped.add(context.service, "call-log", "full")
            return
        ms = (time.perf_counter() - started) * 1000
        # Not the context itself: it may hold a whole packet, and a peer's id may be any text.
        id = (context.id or "-")[:_MAX_ID]
        side, service, pattern = context.side, context.service, context.pattern
        self._lines.append((time.time(), side, service, pattern, status, ms, context.transport, context.peer, id))
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="call-log", daemon=True)
                self._thread.start()
                atexit.register(self.flush)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(0.05)  # lines come in bursts: gather them
            self._wake.clear()
            try:
                self.flush()
            except Exception:  # a handler's or a filter's: the next lines are worth another attempt
                logging.getLogger("microservices").exception("lines of the call log could not be written")

    def _write(self, line: _Line) -> None:
        at, side, service, pattern, status, ms, transport, peer, id = line
        level = logging.WARNING if status >= 500 else logging.DEBUG if pattern in _QUIET else logging.INFO
        if not self._logger.isEnabledFor(level):
            return
        values = (side, service, pattern_name(pattern), status, round(ms, 1), transport, peer or "-", id)
        record = self._logger.makeRecord(
            self._logger.name,
            level,
            "",
            0,
            "%s %s %s %d %.1f ms %s %s %s",
            values,
            None,
            extra={"fields": dict(zip(_FIELDS, values, strict=True))},
        )
        record.created = at
        self._logger.handle(record)


def _given_up(context: RpcContext) -> int:
    # 499 is what proxies log for a caller who left: nothing of the service's has failed.
    return 504 if context.expired() else 499


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line.update(fields or {"message": record.getMessage()})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
