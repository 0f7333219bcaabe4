"""A circuit breaker for any function, with the options and events of opossum (reliability.md section 7)."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from typing import Any, Self

from ..exceptions import DeadlineExceeded, RpcException, Unavailable
from .breaker import Circuit, Options, State
from .turns import Turns
from .window import Window

logger = logging.getLogger("microservices.breaker")

EVENTS = (
    "fire",
    "success",
    "failure",
    "timeout",
    "reject",
    "open",
    "close",
    "half_open",
    "fallback",
    "cache_hit",
    "cache_miss",
    "coalesce_cache_hit",
    "coalesce_cache_miss",
    "semaphore_locked",
    "health_check_failed",
    "shutdown",
)
_COUNTED = {
    "fire": "fires",
    "success": "successes",
    "failure": "failures",
    "timeout": "timeouts",
    "reject": "rejects",
    "fallback": "fallbacks",
    "cache_hit": "cache_hits",
    "cache_miss": "cache_misses",
    "coalesce_cache_hit": "coalesce_cache_hits",
    "coalesce_cache_miss": "coalesce_cache_misses",
    "semaphore_locked": "semaphore_rejections",
}
_OPENED = {State.OPEN: "open", State.CLOSED: "close", State.HALF_OPEN: "half_open"}
_FOR_EVER = math.inf
_MANY = 2**31

Listener = Callable[..., Any]


class CircuitBreaker:
    """Calls `action`, and refuses to while it fails too often: `await CircuitBreaker(action).fire(1, 2)`.

    `action` may be a function, async or not; anything else but None is answered as it is. Times are in seconds; 0
    is a value like any other, and turns a limit of time off. docs/circuit-breaker.md explains all options, which
    have opossum's names and, but for `volume_threshold`, its defaults. `clock` gives the time, and `wall` the one
    that other processes have, too. It belongs to one event loop.

    Raises TypeError for an action that is None.
    """

    def __init__(
        self,
        action: Any,
        *,
        timeout: float = 10.0,
        reset_timeout: float = 30.0,
        error_threshold_percentage: float = 50.0,
        volume_threshold: int = 10,
        rolling_count_timeout: float = 10.0,
        rolling_count_buckets: int = 10,
        rolling_percentiles_enabled: bool = True,
        rotate_buckets: bool = True,
        capacity: int | None = None,
        allow_warm_up: bool = False,
        error_filter: Callable[..., bool] | None = None,
        enabled: bool = True,
        cache: bool = False,
        cache_ttl: float = 0.0,
        cache_size: int = 1000,
        cache_get_key: Callable[..., Any] | None = None,
        cache_transport: Any = None,
        coalesce: bool = False,
        coalesce_ttl: float | None = None,
        coalesce_size: int = 1000,
        coalesce_reset_on: tuple[str, ...] = ("error", "timeout"),
        name: str = "",
        group: str = "",
        state: Mapping[str, Any] | None = None,
        status: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        if action is None:
            raise TypeError("A circuit breaker needs something to call.")
        if unknown := set(coalesce_reset_on) - {"success", "error", "timeout"}:
            raise TypeError(f"coalesce_reset_on: {unknown.pop()!r} is not one of success, error, timeout.")
        self.name = name or getattr(action, "__qualname__", "") or f"breaker-{id(self):x}"
        self.group = group or self.name
        self.enabled = enabled
        self.is_shut_down = False
        self._action = action
        self._timeout = timeout
        self._error_filter = error_filter
        self._clock = clock
        self._wall = wall
        self._fallback: Any = None
        self._listeners: dict[str, list[Listener]] = {event: [] for event in EVENTS}
        self.turns = Turns(_MANY if capacity is None else capacity, 0)
        """The places for calls under way."""
        self.window = Window(
            rolling_count_timeout,
            rolling_count_buckets,
            clock,
            percentiles=rolling_percentiles_enabled,
            by_itself=rotate_buckets,
        )
        self._circuit = Circuit(
            Options(
                window=rolling_count_timeout or _FOR_EVER,
                least_calls=max(1, volume_threshold),
                # Above the percentage, and not at it.
                failure_rate=math.nextafter(error_threshold_percentage / 100, 2),
                slow_rate=_FOR_EVER,
                open_for=reset_timeout,
                open_at_most=reset_timeout,
                trials=1,
                trial_timeout=timeout or reset_timeout,
                warm_up=allow_warm_up,
            ),
            self._changed,
            lambda low, high: 1.0,
        )
        self._key = cache_get_key or _key
        self._cache = (cache_transport or Memory(cache_size, clock)) if cache else None
        self._cache_ttl = cache_ttl
        self._shared = Memory(coalesce_size, clock) if coalesce else None
        self._shared_ttl = timeout if coalesce_ttl is None else coalesce_ttl
        self._reset_on = coalesce_reset_on
        self._tasks: set[asyncio.Task[Any]] = set()
        self._checking: asyncio.Task[None] | None = None
        self._restore(state or {}, status or {})

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.name} {self.state}>"

    # Calls

    async def fire(self, *args: Any, **kwargs: Any) -> Any:
        """Call the action. Raises what it raises, or what `is_our_error` knows, if there is no fallback.

        Unavailable ("circuit-open", "overloaded", "shut-down") where it was not called, DeadlineExceeded where it
        took longer than `timeout`; work that goes on nevertheless keeps its place until it ends.
        """
        if self.is_shut_down:
            raise self._ours(Unavailable(f"{self.name} has been shut down.", code="shut-down"))
        self._emit("fire", args)
        if self._cache is None and self._shared is None:
            return await self._guarded(args, kwargs)
        key = self._key(*args, **kwargs)
        if self._cache is not None:
            kept = await _result(self._cache.get(key))
            if kept is not None:
                self._emit("cache_hit")
                return kept
            self._emit("cache_miss")
        if self._shared is None:
            return await self._kept(key, args, kwargs)
        task = self._shared.get(key)
        if task is not None:
            self._emit("coalesce_cache_hit")
        else:
            self._emit("coalesce_cache_miss")
            task = self._own(self._kept(key, args, kwargs))
            self._shared.set(key, task, self._shared_ttl)
            task.add_done_callback(lambda ended: self._ended(key, ended))
        # One who gives up does not take it from the others; it ends by its own time limit.
        return await asyncio.shield(task)

    __call__ = fire

    async def _kept(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = await self._guarded(args, kwargs)
        if self._cache is not None:
            await _result(self._cache.set(key, result, self._cache_ttl))
        return result

    async def _guarded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.enabled:
            return await self._run(args, kwargs)
        began = self._clock()
        epoch = self._circuit.enter(began)
        if epoch is None:
            refusal = self._ours(Unavailable(f"{self.name} has failed too often.", code="circuit-open"))
            self._emit("reject", refusal)
            return await self._fall_back(refusal, args, kwargs)
        if not self.turns.take():
            self._circuit.forgotten(epoch)
            locked = self._ours(Unavailable(f"{self.name} has no room for one more call.", code="overloaded"))
            self._emit("semaphore_locked", locked)
            return await self._fall_back(locked, args, kwargs)
        try:
            result = await self._within_timeout(args, kwargs)
        except _TimedOut:
            late = self._ours(DeadlineExceeded(f"{self.name} took longer than {self._timeout:g} s."))
            return await self._failed("timeout", late, epoch, began, args, kwargs)
        except Exception as error:
            if self._error_filter is None or not self._error_filter(error, *args):
                return await self._failed("failure", error, epoch, began, args, kwargs)
            self._succeeded(error, epoch, began)
            raise
        except BaseException:
            self._circuit.forgotten(epoch)
            raise
        self._succeeded(result, epoch, began)
        return result

    async def _within_timeout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._timeout:
            try:
                return await self._run(args, kwargs)
            finally:
                self.turns.give_back()
        work = self._own(self._run(args, kwargs))
        # Its place is free when it ends, and not when its caller has given up.
        work.add_done_callback(lambda _: self.turns.give_back())
        try:
            await asyncio.wait([work], timeout=self._timeout)
        finally:
            if not work.done():
                work.cancel()
        if not work.done():
            raise _TimedOut
        if work.cancelled():  # by itself: whoever calls has not been
            raise Unavailable(f"{self.name} has given up.", code="cancelled")
        return work.result()

    async def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await _result(self._action(*args, **kwargs) if callable(self._action) else self._action)

    def _succeeded(self, result: Any, epoch: int, began: float) -> None:
        now = self._clock()
        self._circuit.succeeded(epoch, now)
        self._emit("success", result, now - began, latency=now - began)

    async def _failed(
        self,
        event: str,
        error: Exception,
        epoch: int,
        began: float,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        now = self._clock()
        self._circuit.failed(epoch, now)
        self._emit(event, error, now - began, args, latency=now - began)
        return await self._fall_back(error, args, kwargs)

    async def _fall_back(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._fallback is None:
            raise error
        result = await _result(self._fallback(*args, error, **kwargs))
        self._emit("fallback", result, error)
        return result

    def _ours(self, error: RpcException) -> RpcException:
        error.breaker = self.name  # type: ignore[attr-defined]
        return error

    # What surrounds them

    def fallback(self, function: Any) -> Self:
        """Answer with `function(*args, error)` where the action could not; it may be another breaker. Returns self."""
        if not callable(function):
            raise TypeError(f"{function!r} cannot be called.")
        self._fallback = function
        return self

    def on(self, event: str, listener: Listener) -> Self:
        """Call `listener` with each such event. Raises ValueError for one that there is not."""
        self._of(event).append(listener)
        return self

    def once(self, event: str, listener: Listener) -> Self:
        """Call `listener` with the next such event."""

        def only_once(*facts: Any) -> None:
            self.off(event, only_once)
            listener(*facts)

        return self.on(event, only_once)

    def off(self, event: str, listener: Listener) -> Self:
        """Call `listener` no more."""
        listeners = self._of(event)
        if listener in listeners:
            listeners.remove(listener)
        return self

    def health_check(self, check: Callable[[], Any], interval: float = 5.0) -> None:
        """Call `check` each `interval` seconds, and open when it fails. Needs a running loop; raises TypeError."""
        if not callable(check):
            raise TypeError(f"{check!r} cannot be called.")
        if isinstance(interval, bool) or not isinstance(interval, int | float) or not 0 < interval < _FOR_EVER:
            raise TypeError(f"{interval!r} is no number of seconds.")
        if self._checking is not None:
            self._checking.cancel()
        self._checking = self._own(self._check(check, interval))

    async def _check(self, check: Callable[[], Any], interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            try:
                await _result(check())
            except Exception as error:  # noqa: BLE001 - told
                self._emit("health_check_failed", error)
                self.open()

    def clear_cache(self) -> None:
        """Forget all answers that are kept."""
        if self._cache is not None:
            self._cache.flush()

    # Its state

    @property
    def state(self) -> State:
        """Where it stands; an open one whose time is over is tried with the next call."""
        return self._circuit.state

    @property
    def opened(self) -> bool:
        return self.state is State.OPEN

    @property
    def half_open(self) -> bool:
        return self.state is State.HALF_OPEN

    @property
    def closed(self) -> bool:
        return self.state is State.CLOSED

    def open(self) -> None:
        """Refuse calls for `reset_timeout`."""
        if not self.opened:
            self._circuit.open(self._clock())

    def close(self) -> None:
        """Let calls through, and count anew."""
        self._circuit.close()

    def enable(self) -> None:
        """Guard calls again."""
        self.enabled = True

    def disable(self) -> None:
        """Let all calls through, and count none."""
        self.enabled = False

    def shutdown(self) -> None:
        """Refuse all calls from now on, and end whatever it does in the background."""
        if self.is_shut_down:
            return
        self.is_shut_down = True
        self.enabled = False
        if self._checking is not None:
            self._checking.cancel()
        self.clear_cache()
        self._emit("shutdown")
        for listeners in self._listeners.values():
            listeners.clear()

    @staticmethod
    def is_our_error(error: BaseException) -> bool:
        """Return whether an error is a breaker's own, and not the action's."""
        return hasattr(error, "breaker")

    @property
    def stats(self) -> dict[str, Any]:
        """The counts of the window by name, `latency_mean` and `percentiles` in seconds."""
        mean, percentiles = self.window.latencies()
        counts = self.window.counts
        return {**{name: counts[name] for name in _COUNTED.values()}, "latency_mean": mean, "percentiles": percentiles}

    def to_json(self) -> dict[str, Any]:
        """Return what another process needs to go on as this one: give it as `state` and `status`."""
        opened_at = self._circuit.opened_at
        return {
            "state": {
                "name": self.name,
                "group": self.group,
                "state": str(self.state),
                "enabled": self.enabled,
                "shutdown": self.is_shut_down,
                "opened_at": None if opened_at is None else self._wall() - (self._clock() - opened_at),
            },
            "status": {name: count for name, count in self.stats.items() if type(count) is int},
        }

    def _restore(self, state: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or not isinstance(status, Mapping):
            raise TypeError("`state` and `status` are mappings, as to_json gives them.")
        self.window.restore(status)
        opened_at = state.get("opened_at")
        if opened_at is not None:
            opened_at = self._clock() - (self._wall() - opened_at)
        try:
            restored = State(state.get("state", State.CLOSED))
        except ValueError as error:
            raise TypeError(f"{state['state']!r} is no state.") from error
        if restored is not State.CLOSED:
            self._circuit.restore(restored, self._clock() if opened_at is None else opened_at)
        self.enabled = bool(state.get("enabled", self.enabled))
        if state.get("shutdown"):
            self.shutdown()

    def _changed(self, old: State, new: State) -> None:
        logger.info("%s: %s, was %s", self.name, new, old)
        if new in _OPENED:
            self._emit(_OPENED[new])

    # Bookkeeping

    def _of(self, event: str) -> list[Listener]:
        if event not in self._listeners:
            raise ValueError(f"There is no event {event!r}; there are {', '.join(EVENTS)}.")
        return self._listeners[event]

    def _emit(self, event: str, *facts: Any, latency: float | None = None) -> None:
        if event in _COUNTED:
            self.window.add(_COUNTED[event], latency)
            if event == "timeout":
                self.window.add("failures")
        for listener in tuple(self._listeners[event]):
            try:
                listener(*facts)
            except Exception:  # of whoever listens: the call must not suffer
                logger.exception("a listener to %r of %s has failed", event, self.name)

    def _own(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work, context=copy_context())  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._let_go)
        return task

    def _let_go(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it has heard of it, or has given up

    def _ended(self, key: Any, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            outcome = "timeout"
        elif (error := task.exception()) is None:
            outcome = "success"
        else:
            outcome = "timeout" if isinstance(error, DeadlineExceeded) else "error"
        if outcome in self._reset_on and self._shared is not None:
            self._shared.delete(key)


class Memory:
    """Keeps values for a time, as many as `size`; the one that was used longest ago makes room.

    A cache of one's own has the same methods, which may be async.
    """

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._clock = clock
        self._kept: dict[Any, tuple[float, Any]] = {}

    def get(self, key: Any) -> Any:
        """Return what is kept under a key, or None."""
        until, value = self._kept.pop(key, (0.0, None))
        if value is None or until <= self._clock():
            return None
        self._kept[key] = until, value
        return value

    def set(self, key: Any, value: Any, ttl: float) -> None:
        """Keep a value for `ttl` seconds; 0 for any time."""
        self._kept.pop(key, None)
        if self._size <= 0:
            return
        while len(self._kept) >= self._size:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = self._clock() + ttl if ttl else _FOR_EVER, value

    def delete(self, key: Any) -> None:
        """Forget one."""
        self._kept.pop(key, None)

    def flush(self) -> None:
        """Forget all."""
        self._kept.clear()


class _TimedOut(Exception):
    """The action took too long, and not something inside of it."""


def _key(*args: Any, **kwargs: Any) -> Any:
    return repr((args, sorted(kwargs.items())))


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
