"""The thread pool of the `def` handlers."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from random import Random
from typing import Any

import pytest

from microservices.client import Client
from microservices.context import RpcContext, current
from microservices.exceptions import DeadlineExceeded, Unavailable
from microservices.executor import Executor, Lender, lending, wait_for
from microservices.handlers import event_pattern, message_pattern
from microservices.transports.local import LocalClient
from tests.toolkit.conftest import context, service

language: ContextVar[str] = ContextVar("language", default="en")
PATIENCE = 10


@pytest.mark.asyncio
async def test_a_call_runs_on_a_thread_of_the_pool() -> None:
    name = await Executor(1).run(lambda: threading.current_thread().name, context())

    assert name.startswith("handler")


@pytest.mark.asyncio
async def test_units_of_work_stand_around_the_call_inside_its_thread() -> None:
    notes: list[tuple[str, int]] = []

    def unit(name: str) -> Any:
        @contextmanager
        def noted(context: RpcContext) -> Iterator[None]:
            notes.append((f"enter {name} for {context.pattern}", threading.get_ident()))
            try:
                yield
            finally:
                notes.append((f"leave {name}", threading.get_ident()))

        return noted

    executor = Executor(1, units_of_work=[unit("outer"), unit("inner")])

    thread = await executor.run(threading.get_ident, context())

    assert [note for note, _ in notes] == ["enter outer for ask", "enter inner for ask", "leave inner", "leave outer"]
    assert {ident for _, ident in notes} == {thread} != {threading.get_ident()}


@pytest.mark.asyncio
async def test_a_unit_of_work_sees_how_the_call_failed() -> None:
    seen: list[BaseException] = []

    @contextmanager
    def watching(context: RpcContext) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            seen.append(error)
            raise

    def fail() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone") as caught:
        await Executor(1, units_of_work=[watching]).run(fail, context())

    assert seen == [caught.value]


@pytest.mark.asyncio
async def test_each_message_has_a_fresh_context() -> None:
    executor = Executor(1)
    language.set("de")  # of the one who submits

    def speak(new: str) -> tuple[str, RpcContext | None]:
        before = language.get()
        language.set(new)
        return before, current.get()

    first, second = context(pattern="first"), context(pattern="second")

    assert await executor.run(lambda: speak("fr"), first) == ("en", first)
    assert await executor.run(lambda: speak("it"), second) == ("en", second)
    assert language.get() == "de"


@pytest.mark.asyncio
async def test_stop_iteration_does_not_hang_the_caller() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await Executor(1).run(lambda: next(iter([])), context())


@pytest.mark.asyncio
async def test_a_call_whose_deadline_has_passed_is_not_started() -> None:
    ran: list[int] = []
    late = context()
    late.cap_deadline(-1)

    with pytest.raises(DeadlineExceeded):
        await Executor(1).run(lambda: ran.append(1), late)

    assert ran == []


@pytest.mark.asyncio
async def test_a_job_whose_caller_gave_up_is_not_started(gate: threading.Event) -> None:
    executor = Executor(1)
    ran: list[str] = []
    blocking = asyncio.create_task(executor.run(gate.wait, context()))
    waiting = asyncio.create_task(executor.run(lambda: ran.append("abandoned"), context()))
    await asyncio.sleep(0)

    waiting.cancel()
    await asyncio.sleep(0)
    gate.set()
    await blocking
    await executor.run(lambda: ran.append("next"), context())

    assert waiting.cancelled()
    assert ran == ["next"]


@pytest.mark.asyncio
async def test_a_caller_who_gives_up_does_not_stop_a_running_job(gate: threading.Event) -> None:
    executor = Executor(1)
    started, finished = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        gate.wait(PATIENCE)
        finished.set()

    task = asyncio.create_task(executor.run(work, context()))
    assert await asyncio.to_thread(started.wait, PATIENCE)
    task.cancel()
    await asyncio.wait([task])
    gate.set()

    assert task.cancelled()
    assert await asyncio.to_thread(finished.wait, PATIENCE)


@pytest.mark.asyncio
async def test_a_job_whose_caller_gave_up_is_waited_for_when_the_process_ends(gate: threading.Event) -> None:
    executor, started = Executor(1), threading.Event()

    def slow() -> None:
        started.set()
        gate.wait(PATIENCE)

    call = asyncio.create_task(executor.run(slow, context()))
    await asyncio.to_thread(started.wait, PATIENCE)
    call.cancel()
    too_short = await executor.idle(0.05)
    asyncio.get_running_loop().call_later(0.05, gate.set)
    long_enough = await executor.idle(PATIENCE)

    assert (too_short, long_enough, executor.busy) == (False, True, False)


@pytest.mark.asyncio
async def test_too_many_waiting_jobs_refuse_the_next_until_there_is_room(gate: threading.Event) -> None:
    executor = Executor(2, limit=3)
    tasks = [asyncio.create_task(executor.run(gate.wait, context())) for _ in range(5)]
    await asyncio.sleep(0)

    with pytest.raises(Unavailable) as caught:
        await executor.run(lambda: None, context())
    gate.set()
    await asyncio.gather(*tasks)

    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    assert await executor.run(lambda: "room", context()) == "room"


@pytest.mark.asyncio
async def test_closing_refuses_what_has_not_started_and_finishes_what_has(gate: threading.Event) -> None:
    executor = Executor(1)
    started = threading.Event()

    def work() -> str:
        started.set()
        gate.wait(PATIENCE)
        return "done"

    running = asyncio.create_task(executor.run(work, context()))
    assert await asyncio.to_thread(started.wait, PATIENCE)
    waiting = asyncio.create_task(executor.run(lambda: "never", context()))
    await asyncio.sleep(0)
    executor.close()
    gate.set()

    async with asyncio.timeout(PATIENCE):
        assert await running == "done"
        with pytest.raises(Unavailable):
            await waiting
        with pytest.raises(Unavailable):
            await executor.run(lambda: "later", context())


@pytest.mark.asyncio
async def test_an_executor_that_nobody_holds_any_more_ends_its_threads() -> None:
    executor, together = Executor(4), threading.Barrier(4)

    def meet() -> threading.Thread:
        together.wait(PATIENCE)
        return threading.current_thread()

    threads = await asyncio.gather(*(executor.run(meet, context()) for _ in range(4)))
    del executor
    gc.collect()
    for thread in threads:
        await asyncio.to_thread(thread.join, PATIENCE)

    assert [thread.is_alive() for thread in threads] == [False] * 4


# Many at a time


@pytest.mark.asyncio
async def test_calls_of_one_moment_run_on_as_many_threads_as_there_are() -> None:
    together = threading.Barrier(8)
    executor = Executor(8)

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(executor.run(together.wait, context()) for _ in range(64)))


@pytest.mark.asyncio
@pytest.mark.parametrize("place", [0, 10, 19])
async def test_a_slow_call_holds_up_no_other(place: int, gate: threading.Event) -> None:
    executor = Executor(2)

    def work(number: int) -> int:
        if number == place:
            gate.wait(PATIENCE)
        return number

    calls = [asyncio.create_task(executor.run(partial(work, number), context())) for number in range(20)]
    slow = calls.pop(place)
    async with asyncio.timeout(PATIENCE):
        answers = await asyncio.gather(*calls)
        waited = not slow.done()
        gate.set()
        answers.insert(place, await slow)

    assert waited
    assert answers == list(range(20))


@pytest.mark.asyncio
async def test_outcomes_that_the_loop_has_not_fetched_yet_come_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, loop, last = Executor(1), asyncio.get_running_loop(), threading.Event()
    wake, woken = loop.call_soon_threadsafe, []

    def counted(*call: Any, **options: Any) -> asyncio.Handle:
        woken.append(call)
        return wake(*call, **options)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    calls = [asyncio.create_task(executor.run(partial(str, number), context())) for number in range(100)]
    calls.append(asyncio.create_task(executor.run(last.set, context())))
    await asyncio.sleep(0)
    last.wait(PATIENCE)  # the loop stands still meanwhile
    answers = await asyncio.gather(*calls)

    assert answers == [*map(str, range(100)), None]
    assert 1 <= len(woken) <= 2  # the last outcome may come just after


@pytest.mark.asyncio
async def test_no_call_is_lost_when_threads_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microservices.executor._LINGER", 0.0001)
    executor, random = Executor(3), Random(7)

    async with asyncio.timeout(PATIENCE):
        for _ in range(500):
            number = random.randrange(1, 6)
            calls = (executor.run(threading.get_ident, context()) for _ in range(number))
            assert len(await asyncio.gather(*calls)) == number
            await asyncio.sleep(random.random() / 5000)
        assert await executor.idle(PATIENCE)


def test_two_loops_may_share_the_threads() -> None:
    executor = Executor(2)

    async def ask(first: int) -> list[int]:
        numbers = range(first, first + 500)
        return await asyncio.gather(*(executor.run(partial(abs, -number), context()) for number in numbers))

    with ThreadPoolExecutor(2) as loops:
        answers = list(loops.map(lambda first: asyncio.run(ask(first)), (0, 1000)))

    assert answers == [list(range(500)), list(range(1000, 1500))]


def test_a_call_that_outlives_its_loop_hurts_no_later_one(gate: threading.Event) -> None:
    executor, started = Executor(1), threading.Event()

    def slow() -> None:
        started.set()
        gate.wait(PATIENCE)

    async def give_up() -> None:
        call = asyncio.create_task(executor.run(slow, context()))
        await asyncio.to_thread(started.wait, PATIENCE)
        call.cancel()

    async def ask() -> tuple[str, bool]:
        return await executor.run(lambda: "answer", context()), await executor.idle(PATIENCE)

    asyncio.run(give_up())
    busy = executor.busy
    gate.set()

    assert busy
    assert asyncio.run(ask()) == ("answer", True)


@pytest.mark.asyncio
async def test_a_thread_that_cannot_be_started_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    executor = Executor(1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(Unavailable):
            await executor.run(lambda: None, context())

    async with asyncio.timeout(PATIENCE):
        assert await executor.run(lambda: "answer", context()) == "answer"


# Nested calls


@pytest.mark.asyncio
@pytest.mark.parametrize("inner_is_async", [False, True])
async def test_as_many_nested_calls_as_there_are_threads_do_not_wait_for_ever(inner_is_async: bool) -> None:
    executor = Executor(4)
    threads: dict[str, set[int]] = {"outer": set(), "inner": set()}

    def seen(where: str) -> int:
        threads[where].add(threading.get_ident())
        return threading.get_ident()

    @message_pattern("price")
    def price(data: int) -> tuple[int, int]:
        return data * 2, seen("inner")

    @message_pattern("price")
    async def async_price(data: int) -> tuple[int, int]:
        return await executor.run(lambda: (data * 2, seen("inner")), context())

    prices = service(async_price if inner_is_async else price, name="prices", executor=executor)
    loop = asyncio.get_running_loop()
    inner = Client("prices", lambda: LocalClient(prices), run=lambda work: asyncio.run_coroutine_threadsafe(work, loop))

    @message_pattern("order")
    def order(data: int) -> tuple[int, bool]:
        thread = seen("outer")
        answer, inner_thread = inner.sync.send("price", data)
        return answer, inner_thread == thread

    outer = Client("shop", lambda: LocalClient(service(order, executor=executor)))

    async with asyncio.timeout(PATIENCE):
        answers = await asyncio.gather(*(outer.send("order", number) for number in range(64)))
    await inner.close()
    await outer.close()

    assert answers == [[number * 2, True] for number in range(64)]
    assert len(threads["outer"]) <= 4
    assert threads["inner"] <= threads["outer"]


@pytest.mark.asyncio
async def test_calls_nested_three_deep_run_on_one_thread() -> None:
    executor = Executor(1)
    loop = asyncio.get_running_loop()

    def client_of(dispatcher: Any) -> Client:
        return Client(
            dispatcher.service,
            lambda: LocalClient(dispatcher),
            run=lambda work: asyncio.run_coroutine_threadsafe(work, loop),
        )

    @message_pattern("third")
    def third(data: int) -> int:
        return data + 1

    thirds = client_of(service(third, name="third", executor=executor))

    @message_pattern("second")
    def second(data: int) -> int:
        return thirds.sync.send("third", data) * 2

    seconds = client_of(service(second, name="second", executor=executor))

    @message_pattern("first")
    def first(data: int) -> int:
        return seconds.sync.send("second", data) + seconds.sync.send("second", data)

    firsts = client_of(service(first, name="first", executor=executor))

    async with asyncio.timeout(PATIENCE):
        assert await firsts.send("first", 1) == 8


@pytest.mark.asyncio
async def test_an_emitter_does_not_run_the_handlers_of_its_event_itself(gate: threading.Event) -> None:
    executor = Executor(2)
    loop = asyncio.get_running_loop()
    emitter_went_on: list[bool] = []
    heard = asyncio.Event()

    @event_pattern("made")
    def hear() -> None:
        emitter_went_on.append(gate.wait(2))
        loop.call_soon_threadsafe(heard.set)

    bus = Client(
        "listeners",
        lambda: LocalClient(service(hear, name="listeners", executor=executor)),
        run=lambda work: asyncio.run_coroutine_threadsafe(work, loop),
    )

    @message_pattern("make")
    def make() -> None:
        bus.sync.emit("made")
        gate.set()

    shop = Client("shop", lambda: LocalClient(service(make, executor=executor)))

    async with asyncio.timeout(PATIENCE):
        await shop.send("make")
        await heard.wait()

    assert emitter_went_on == [True]


@pytest.mark.asyncio
async def test_a_thread_that_lends_itself_runs_the_handlers_of_its_calls() -> None:
    loop = asyncio.get_running_loop()

    @message_pattern("where")
    def where() -> int:
        return threading.get_ident()

    client = Client(
        "shop",
        lambda: LocalClient(service(where)),
        run=lambda work: asyncio.run_coroutine_threadsafe(work, loop),
    )

    def ask() -> tuple[bool, bool]:
        with lending():
            lent = client.sync.send("where") == threading.get_ident()
        return lent, client.sync.send("where") == threading.get_ident()

    assert await asyncio.to_thread(ask) == (True, False)


@pytest.mark.parametrize("lent", [True, False])
def test_waiting_ends_when_the_time_is_over(lent: bool) -> None:
    never: Future[None] = Future()

    def wait() -> None:
        with pytest.raises(DeadlineExceeded):
            wait_for(lambda: never, 0.01)

    if lent:
        with lending():
            wait()
    else:
        wait()


@pytest.mark.parametrize("lent", [True, False])
def test_waiting_gives_the_result_or_raises_the_error(lent: bool) -> None:
    good: Future[str] = Future()
    good.set_result("good")
    bad: Future[str] = Future()
    bad.set_exception(LookupError("bad"))

    def both() -> None:
        assert wait_for(lambda: good, 1) == "good"
        with pytest.raises(LookupError, match="bad"):
            wait_for(lambda: bad, 1)

    if lent:
        with lending():
            both()
    else:
        both()


def test_a_job_that_was_lent_at_the_last_moment_still_runs() -> None:
    waiting, ran = Lender(), []

    class Overtaken(Future[str]):
        def add_done_callback(self, notice: Any) -> None:
            super().add_done_callback(notice)  # which ends the waiting
            assert waiting.lend(lambda: ran.append("lent"))

    future = Overtaken()
    future.set_result("done")

    assert waiting.wait(future, 1) == "done"
    assert ran == ["lent"]
    assert not waiting.lend(lambda: ran.append("too late"))
