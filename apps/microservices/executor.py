"""The thread pool on which `def` handlers run, each whole and inside its unit of work."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import Context, ContextVar
from typing import Any, TypeVar

from .context import RpcContext, current
from .exceptions import DeadlineExceeded, Unavailable
from .instruments import Bound, dropped

T = TypeVar("T")
UnitOfWork = Callable[[RpcContext], AbstractContextManager[Any]]
"""A hook around each handler, inside its thread: database connections, transactions."""
Work = Callable[[Callable[[], Any], RpcContext], Any]

_LINGER = 0.05
"""Seconds for which a thread waits for its next job before it goes back to the pool, which costs more."""
_GLANCE = 0.01
"""Seconds from one look at the threads to the next, while their end is waited for."""

lender: ContextVar[Lender | None] = ContextVar("microservices.lender", default=None)
"""The waiting thread that runs the `def` handlers which this call leads to."""

_lends: ContextVar[bool] = ContextVar("microservices.lends", default=False)


class Executor:
    """A pool of `size` threads with at most `limit` handlers waiting for one.

    The default pool of asyncio would be shared with name resolution, and asgiref's
    thread-sensitive one is a single thread.
    """

    def __init__(self, size: int = 16, *, limit: int = 1000, units_of_work: Sequence[UnitOfWork] = ()) -> None:
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="handler")
        self._size = size
        self._room = limit + size
        # No locks: each step is one operation of a container, and who adds looks again afterwards.
        self._jobs: deque[Job] = deque()
        self._unfinished: set[Job] = set()
        # The bells of the threads that linger, after a None for each that is not at work at all.
        self._free: list[threading.Lock | None] = [None] * size
        self._waking = False
        self._closed = False
        self._returns: Returns | None = None
        self._work: Work = lambda call, context: call()
        for unit in reversed(units_of_work):
            self._work = _inside(unit, self._work)

    async def run(self, call: Callable[[], T], context: RpcContext) -> T:
        """Run `call` on a thread and return its result; the caller's cancellation does not stop it.

        Raises Unavailable when too many wait already, DeadlineExceeded when its turn comes too late.
        """
        returns, loop = self._returns, asyncio.get_running_loop()
        if returns is None or returns.loop is not loop:
            returns = self._returns = Returns(loop)
        job = Job(self._work, call, context, returns)
        waiting = lender.get()
        if waiting is None or not waiting.lend(job):
            self._submit(job, context)
        try:
            return await job.future  # type: ignore[no-any-return]
        finally:
            job.forget()

    def _submit(self, job: Job, context: RpcContext) -> None:
        # What its caller has given up counts until a thread has passed it: threads that hang must not
        # let the queue grow.
        if len(self._unfinished) >= self._room:
            dropped.add(context.service, "threads", "overloaded")
            raise Unavailable("Too many calls are waiting for a thread.", code="overloaded")
        if self._closed:
            raise Unavailable("No more calls are taken.", code="closed")
        self._unfinished.add(job)
        self._jobs.append(job)
        self._wake()

    def _wake(self) -> None:
        # One thread at a time, which wakes the next: many jobs of one moment wake as many as get to run. Two may pass
        # the question at once; that is sound, since whoever is woken ends `_waking` before it looks for jobs.
        if self._waking or not self._jobs:
            return
        try:
            bell = self._free.pop()
        except IndexError:
            return  # all are at work, and look for more before they rest
        self._waking = True
        if bell is not None:
            bell.release()
            return
        try:
            self._pool.submit(self._serve)
        except RuntimeError:  # closed meanwhile, or the system has no more threads
            self._waking = False
            self._free.insert(0, None)
            if self._closed or len(self._free) >= self._size:  # else those at work will take what waits
                self._refuse()

    def _serve(self) -> None:
        bell = threading.Lock()
        bell.acquire()
        while True:
            self._waking = False
            self._take_turns()
            self._free.append(bell)
            self._wake()
            if not bell.acquire(timeout=_LINGER):
                try:
                    self._free.remove(bell)
                except ValueError:
                    bell.acquire()  # it was rung at the last moment
                else:
                    break
        if len(self._free) < self._size:  # the pool may start late what it once could not
            self._free.insert(0, None)
        self._wake()

    def _take_turns(self) -> None:
        while True:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            self._wake()
            job()
            self._unfinished.discard(job)

    def _refuse(self) -> None:
        while True:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            job.refuse()
            self._unfinished.discard(job)

    @property
    def bounds(self) -> list[Bound]:
        """The calls that threads are at work on, or that wait for one."""
        return [Bound("threads", len(self._unfinished), self._room)]

    @property
    def busy(self) -> bool:
        """Whether a thread is still at work."""
        return bool(self._unfinished)

    async def idle(self, grace: float) -> bool:
        """Wait until no thread is at work, at most `grace` seconds; return whether none is.

        A handler whose caller has given up is waited for here alone: its task has ended long ago.
        """
        end = time.monotonic() + grace
        while self._unfinished and time.monotonic() < end:  # noqa: ASYNC110 - to be told would cost every message
            await asyncio.sleep(_GLANCE)
        return not self._unfinished

    def close(self) -> None:
        """Let running handlers finish and start no more; those that wait fail with Unavailable."""
        self._closed = True
        self._refuse()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _inside(unit: UnitOfWork, work: Work) -> Work:
    def run(call: Callable[[], Any], context: RpcContext) -> Any:
        with unit(context):
            return work(call, context)

    return run


class Returns:
    """The way of outcomes back to an event loop: all that threads leave before it comes share one call."""

    __slots__ = ("_called", "_outcomes", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._outcomes: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._called = False

    def put(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        """Leave the outcome of a call for its loop, from any thread."""
        self._outcomes.append((future, result, error))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop has closed, and with it whoever waited
                self.loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._called = False  # before the first look: what is left from here on calls again
        while self._outcomes:
            future, result, error = self._outcomes.popleft()
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)


class Job:
    """One handler call on its way to a thread; its outcome arrives on the loop that made it."""

    __slots__ = ("_call", "_context", "_returns", "_work", "future")

    def __init__(self, work: Work, call: Callable[[], Any], context: RpcContext, returns: Returns) -> None:
        self._work = work
        self._call: Callable[[], Any] | None = call
        self._context = context
        self._returns = returns
        self.future: asyncio.Future[Any] = returns.loop.create_future()

    def __call__(self) -> None:
        call = self._call
        if call is None or self.future.cancelled():
            return
        error: BaseException | None = None
        result = None
        try:
            # A fresh context per message: a shared one would leak language, time zone and trace.
            result = Context().run(self._run, call)
        except StopIteration as stop:  # a future cannot carry it
            error = RuntimeError(f"a handler raised StopIteration: {stop}")
        except BaseException as raised:  # noqa: BLE001 - it is raised again where it is awaited
            error = raised
        self._returns.put(self.future, result, error)

    def refuse(self) -> None:
        """Tell the caller that the pool was closed before the job's turn came."""
        self._returns.put(self.future, None, Unavailable("The call was not started.", code="closed"))

    def forget(self) -> None:
        """Let go of the payload when it is needed no more, though the job may still wait in the queue."""
        self._call = None

    def _run(self, call: Callable[[], Any]) -> Any:
        current.set(self._context)
        _lends.set(True)
        self._context.check_deadline()
        return self._work(call, self._context)


class Lender:
    """A thread that waits for a call and meanwhile runs the `def` handlers that the call leads to.

    Without it, as many handlers as the pool has threads, each waiting for a neighbour in the
    same process, would wait for ever.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = True

    def lend(self, job: Job) -> bool:
        """Take a job; False when the thread has stopped waiting."""
        with self._lock:
            if self._open:
                self._jobs.put(job)
            return self._open

    def wait(self, future: Future[T], timeout: float | None) -> T:
        """Run lent jobs until `future` is done, then return its result."""
        future.add_done_callback(lambda _: self._jobs.put(None))
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while (job := self._jobs.get(timeout=None if end is None else max(0, end - time.monotonic()))) is not None:
                job()
        except queue.Empty:
            future.cancel()
            raise DeadlineExceeded() from None
        finally:
            with self._lock:
                self._open = False
            self._run_what_is_left()
        return future.result()

    def _run_what_is_left(self) -> None:
        while not self._jobs.empty():
            job = self._jobs.get_nowait()
            if job is not None:
                job()


@contextmanager
def lending() -> Iterator[None]:
    """Let the current thread run the handlers that its own calls lead to, as a pool thread does.

    For tests: the handlers then share the thread's database connection and transaction.
    """
    token = _lends.set(True)
    try:
        yield
    finally:
        _lends.reset(token)


def wait_for(start: Callable[[], Future[T]], timeout: float | None) -> T:
    """Start a call on an event loop from this thread and wait for it, lending the thread if it may lend.

    `start` hands the coroutine to its loop; `timeout` is in seconds. Raises DeadlineExceeded.
    """
    if not _lends.get():
        future = start()
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise DeadlineExceeded() from None
    waiting = Lender()
    token = lender.set(waiting)
    try:
        future = start()
    finally:
        lender.reset(token)
    return waiting.wait(future, timeout)
