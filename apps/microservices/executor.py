"""The thread pool on which `def` handlers run, each whole and inside its unit of work."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import Context, ContextVar
from typing import Any, TypeVar

from .context import RpcContext, current
from .exceptions import DeadlineExceeded, Unavailable

T = TypeVar("T")
UnitOfWork = Callable[[RpcContext], AbstractContextManager[Any]]
"""A hook around each handler, inside its thread: database connections, transactions."""

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
        self._limit = limit
        self._size = size
        self._unfinished: set[Future[None]] = set()
        self._work: Callable[[Callable[[], Any], RpcContext], Any] = lambda call, context: call()
        for unit in reversed(units_of_work):
            self._work = _inside(unit, self._work)

    async def run(self, call: Callable[[], T], context: RpcContext) -> T:
        """Run `call` on a thread and return its result; the caller's cancellation does not stop it.

        Raises Unavailable when too many wait already, DeadlineExceeded when its turn comes too late.
        """
        job = Job(self._work, call, context)
        waiting = lender.get()
        if waiting is None or not waiting.lend(job):
            self.submit(job)
        return await job.future  # type: ignore[no-any-return]

    def submit(self, job: Job) -> None:
        """Queue a job for the pool. Raises Unavailable when too many wait already."""
        # What its caller has given up counts until a thread has passed it: threads that hang must not
        # let the queue grow.
        if len(self._unfinished) >= self._limit + self._size:
            raise Unavailable("Too many calls are waiting for a thread.", code="overloaded")
        try:
            waiting = self._pool.submit(job)
        except RuntimeError as error:
            raise Unavailable("No more calls are taken.", code="closed") from error
        self._unfinished.add(waiting)
        waiting.add_done_callback(self._unfinished.discard)
        waiting.add_done_callback(job.drop)
        job.future.add_done_callback(job.forget)

    @property
    def busy(self) -> bool:
        """Whether a thread is still at work."""
        return bool(self._unfinished)

    async def idle(self, grace: float) -> bool:
        """Wait until no thread is at work, at most `grace` seconds; return whether none is.

        A handler whose caller has given up is waited for here alone: its task has ended long ago.
        """
        end = time.monotonic() + grace
        while self._unfinished and time.monotonic() < end:
            running = [asyncio.wrap_future(future) for future in list(self._unfinished)]
            await asyncio.wait(running, timeout=end - time.monotonic())
        return not self._unfinished

    def close(self) -> None:
        """Let running handlers finish and start no more; those that wait fail with Unavailable."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _inside(
    unit: UnitOfWork, work: Callable[[Callable[[], Any], RpcContext], Any]
) -> Callable[[Callable[[], Any], RpcContext], Any]:
    def run(call: Callable[[], Any], context: RpcContext) -> Any:
        with unit(context):
            return work(call, context)

    return run


class Job:
    """One handler call on its way to a thread; its outcome arrives on the loop that made it."""

    __slots__ = ("_call", "_context", "_loop", "_work", "future")

    def __init__(
        self, work: Callable[[Callable[[], Any], RpcContext], Any], call: Callable[[], Any], context: RpcContext
    ) -> None:
        self._work = work
        self._call: Callable[[], Any] | None = call
        self._context = context
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

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
        try:
            self._loop.call_soon_threadsafe(self._settle, result, error)
        except RuntimeError:
            return  # the loop has closed, and with it whoever waited

    def drop(self, waiting: Future[None]) -> None:
        """Tell the caller when the pool was closed before the job's turn came."""
        if waiting.cancelled():
            error = Unavailable("The call was not started.", code="closed")
            self._loop.call_soon_threadsafe(self._settle, None, error)

    def forget(self, _: asyncio.Future[Any]) -> None:
        """Let go of the payload when it is needed no more, though the job may still wait in the queue."""
        self._call = None

    def _run(self, call: Callable[[], Any]) -> Any:
        current.set(self._context)
        _lends.set(True)
        self._context.check_deadline()
        return self._work(call, self._context)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


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
