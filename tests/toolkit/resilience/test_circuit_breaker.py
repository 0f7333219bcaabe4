"""opossum's checklist (reliability.md 7.1), its six defects (7.2) and six invariants, on a loop without time."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from microservices import CircuitBreaker
from microservices.exceptions import DeadlineExceeded, Unavailable
from microservices.resilience.circuit_breaker import EVENTS
from tests.toolkit.resilience.timeless import BEGIN, clock, run


def timeless(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a loop without time."""

    @functools.wraps(test)
    def on_a_loop(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return on_a_loop


class Action:
    """Answers as it is told: a value, or an exception, after so many seconds."""

    def __init__(self, answer: Any = "answer", seconds: float = 0.0) -> None:
        self.answer = answer
        self.seconds = seconds
        self.calls: list[tuple[Any, ...]] = []
        self.under_way = self.most = 0

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(args)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class Stubborn(Action):
    """Does not let itself be cancelled."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        work = asyncio.ensure_future(super().__call__(*args, **kwargs))
        while not work.done():
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                continue
        return work.result()


def breaker(action: Any, **options: Any) -> CircuitBreaker:
    return CircuitBreaker(action, **{"clock": clock, "wall": clock, "volume_threshold": 0} | options)


def listening(made: CircuitBreaker) -> list[tuple[Any, ...]]:
    """Return where all events of a breaker are noted, as (name, facts...)."""
    heard: list[tuple[Any, ...]] = []
    for event in EVENTS:
        made.on(event, lambda *facts, event=event: heard.append((event, *facts)))
    return heard


def names(heard: list[tuple[Any, ...]]) -> list[str]:
    return [event for event, *_ in heard]


async def fail(made: CircuitBreaker, times: int = 1) -> None:
    """Let calls fail that should."""
    for _ in range(times):
        with pytest.raises(ZeroDivisionError):
            await made.fire()


def broken() -> Action:
    return Action(ZeroDivisionError("broken"))


# 1. Identity


async def named() -> None: ...


def test_a_name_comes_from_the_function_or_an_option_or_is_made() -> None:
    assert CircuitBreaker(named).name == CircuitBreaker(named).group == "named"
    assert CircuitBreaker(named, name="users", group="all").name == "users"
    assert CircuitBreaker(named, name="users", group="all").group == "all"
    assert CircuitBreaker(7).name.startswith("breaker-")


def test_there_must_be_something_to_call() -> None:
    with pytest.raises(TypeError, match="something to call"):
        CircuitBreaker(None)
    with pytest.raises(TypeError, match="capaciti"):
        CircuitBreaker(named, capaciti=1)


@timeless
async def test_what_is_no_function_is_the_answer_and_what_is_not_async_works() -> None:
    assert await breaker("value").fire() == "value"
    assert await breaker(lambda number: number + 1).fire(1) == 2
    assert await breaker(asyncio.sleep)(0, "done") == "done"


# 2. Options


def test_the_defaults_are_opossums_but_for_the_volume() -> None:
    made = CircuitBreaker(named)
    options = made._circuit.options

    assert (made._timeout, options.open_for, options.window, options.least_calls) == (10, 30, 10, 10)
    assert 0.5 < options.failure_rate < 0.5000001
    assert made.turns.capacity > 10**9


@timeless
async def test_zero_is_a_value_for_each() -> None:
    slow = Action(seconds=100)
    assert await breaker(slow, timeout=0).fire() == "answer"

    at_once = breaker(broken(), reset_timeout=0)
    await fail(at_once, 3)  # tried again each time

    with pytest.raises(Unavailable, match="no room"):
        await breaker(slow, capacity=0).fire()

    strict = breaker(broken(), error_threshold_percentage=0)
    await fail(strict)
    assert strict.opened

    made = breaker(broken(), rolling_count_timeout=0, rolling_count_buckets=0, volume_threshold=3)
    await fail(made, 2)
    assert made.closed
    await asyncio.sleep(1000)
    await fail(made)
    assert made.opened
    assert made.stats["failures"] == 3


# 3. Calling


@timeless
async def test_arguments_pass_through_also_while_it_is_disabled() -> None:
    def action(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    made = breaker(action)
    assert await made.fire(1, b=2) == ((1,), {"b": 2})
    made.disable()
    assert await made.fire(1, b=2) == ((1,), {"b": 2})


# 4. Failure


@timeless
async def test_what_fails_counts_once_however_it_fails() -> None:
    def throws() -> None:
        raise ZeroDivisionError

    for action in (throws, broken()):
        made = breaker(action, volume_threshold=5)
        await fail(made)
        assert made.stats["failures"] == 1
        assert made.stats["fires"] == 1


@timeless
async def test_a_timeout_counts_once_and_has_an_error_of_its_own() -> None:
    made = breaker(Action(seconds=20), volume_threshold=5)
    began = clock()

    with pytest.raises(DeadlineExceeded) as late:
        await made.fire()

    assert clock() - began == 10
    assert made.is_our_error(late.value)
    assert (made.stats["timeouts"], made.stats["failures"]) == (1, 1)


@timeless
async def test_its_own_errors_can_be_told_from_the_actions() -> None:
    codes = {}
    made = breaker(Action(seconds=1), capacity=1, timeout=0.5)
    first = asyncio.ensure_future(made.fire())
    await asyncio.sleep(0)
    for name in ("locked", "open", "shut down"):
        if name == "open":
            with pytest.raises(DeadlineExceeded):
                await first
            assert made.opened
        if name == "shut down":
            made.shutdown()
        with pytest.raises(Unavailable) as refused:
            await made.fire()
        assert made.is_our_error(refused.value)
        codes[name] = refused.value.code

    assert codes == {"locked": "overloaded", "open": "circuit-open", "shut down": "shut-down"}
    assert not made.is_our_error(ZeroDivisionError())


# 5. Abort: a cancellation


@timeless
async def test_work_is_cancelled_on_timeout_and_not_when_it_ended_in_time() -> None:
    action = Action(seconds=20)
    with pytest.raises(DeadlineExceeded):
        await breaker(action).fire()
    await asyncio.sleep(0)

    assert action.under_way == 0
    assert await breaker(Action(seconds=5)).fire() == "answer"


@timeless
async def test_who_gives_up_ends_the_work_and_says_nothing_of_it() -> None:
    action = Action(seconds=5)
    made = breaker(action)
    call = asyncio.ensure_future(made.fire())
    await asyncio.sleep(1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0)

    assert action.under_way == made.turns.taken == 0
    assert made.closed
    assert made.stats["failures"] == 0


@timeless
async def test_work_that_cancels_itself_has_failed() -> None:
    async def quitter() -> None:
        raise asyncio.CancelledError

    with pytest.raises(Unavailable, match="given up"):
        await breaker(quitter).fire()


# 6. Opening


@timeless
async def test_it_opens_above_the_percentage_and_not_at_it() -> None:
    action = Action()
    made = breaker(action, volume_threshold=2)
    await made.fire()
    action.answer = ZeroDivisionError()
    await fail(made)
    assert made.closed  # at fifty

    await fail(made)
    assert made.opened


@timeless
async def test_failures_at_once_open_it_once() -> None:
    made = breaker(Action(ZeroDivisionError(), seconds=1), volume_threshold=3)
    heard = listening(made)

    await asyncio.gather(*(made.fire() for _ in range(10)), return_exceptions=True)

    assert names(heard).count("open") == 1


@timeless
async def test_below_the_volume_it_stays_closed() -> None:
    made = breaker(broken(), volume_threshold=10)
    await fail(made, 9)
    assert made.closed
    await fail(made)
    assert made.opened


@timeless
async def test_the_volume_does_not_matter_to_a_trial() -> None:
    made = breaker(broken(), volume_threshold=10)
    await fail(made, 10)
    await asyncio.sleep(30)
    await fail(made)
    assert made.opened


@timeless
async def test_while_it_warms_up_nothing_opens_it_and_after_one_window_anything_may() -> None:
    made = breaker(broken(), allow_warm_up=True)
    await fail(made, 5)
    assert made.closed
    await asyncio.sleep(9.9)
    await fail(made)
    assert made.closed
    await asyncio.sleep(0.2)
    await fail(made)
    assert made.opened

    cold = breaker(broken())
    await fail(cold)
    assert cold.opened


# 7. Half-open


@timeless
async def test_after_the_reset_time_one_call_tries_it_and_no_other() -> None:
    action = broken()
    made = breaker(action)
    heard = listening(made)
    await fail(made)
    await asyncio.sleep(29.9)
    with pytest.raises(Unavailable):
        await made.fire()

    await asyncio.sleep(0.2)
    action.answer, action.seconds = "answer", 1
    trial = asyncio.ensure_future(made.fire())
    await asyncio.sleep(0)
    assert made.half_open
    with pytest.raises(Unavailable):
        await made.fire()
    assert await trial == "answer"
    assert made.closed
    assert len(action.calls) == 2
    assert [name for name in names(heard) if name in ("open", "half_open", "close")] == ["open", "half_open", "close"]


@timeless
async def test_a_trial_that_fails_opens_it_for_the_whole_time_again() -> None:
    made = breaker(broken())
    await fail(made)
    await asyncio.sleep(30)
    await fail(made)
    assert made.opened
    await asyncio.sleep(29)
    with pytest.raises(Unavailable):
        await made.fire()
    await asyncio.sleep(1)
    await fail(made)


@timeless
async def test_an_error_that_the_filter_forgives_closes_it() -> None:
    action = broken()
    made = breaker(action, error_filter=lambda error: isinstance(error, LookupError))
    await fail(made)
    await asyncio.sleep(30)
    action.answer = KeyError()
    with pytest.raises(KeyError):
        await made.fire()
    assert made.closed


@timeless
async def test_a_call_from_before_it_opened_does_not_close_it() -> None:
    made = breaker(lambda seconds, error=None: _later(seconds, error))
    early = asyncio.ensure_future(made.fire(5))
    await asyncio.sleep(0)
    with pytest.raises(ZeroDivisionError):
        await made.fire(0, ZeroDivisionError())
    assert made.opened

    assert await early is None
    assert made.opened


async def _later(seconds: float, error: Exception | None) -> None:
    await asyncio.sleep(seconds)
    if error is not None:
        raise error


# 8. Fallback


@timeless
async def test_a_fallback_answers_when_open_after_failures_and_once_after_a_timeout() -> None:
    calls: list[tuple[Any, ...]] = []
    made = breaker(broken()).fallback(lambda *args: calls.append(args) or "instead")
    assert [await made.fire(1), await made.fire(2)] == ["instead", "instead"]
    assert made.opened
    slow = breaker(Action(seconds=20)).fallback(lambda *args: calls.append(args) or "instead")
    assert await slow.fire(3) == "instead"
    await asyncio.sleep(20)

    assert [(number, type(error)) for number, error in calls] == [
        (1, ZeroDivisionError),
        (2, Unavailable),
        (3, DeadlineExceeded),
    ]


@timeless
async def test_a_fallback_may_be_a_breaker_and_may_fail() -> None:
    other = breaker(lambda *args: f"other {args[0]}")
    assert await breaker(broken()).fallback(other).fire(7) == "other 7"

    def fails(error: Exception) -> None:
        raise LookupError("also") from error

    with pytest.raises(LookupError, match="also"):
        await breaker(broken()).fallback(fails).fire()
    with pytest.raises(TypeError, match="cannot be called"):
        breaker(broken()).fallback("instead")


@timeless
async def test_a_forgiven_error_is_not_fallen_back_from() -> None:
    made = breaker(broken(), error_filter=lambda error: True).fallback(lambda error: "instead")
    await fail(made, 3)
    assert made.closed
    assert made.stats["successes"] == 3


@timeless
async def test_a_breaker_with_a_fallback_closes_again() -> None:
    action = broken()
    made = breaker(action).fallback(lambda error: "instead")
    await made.fire()
    assert made.opened
    await asyncio.sleep(30)
    action.answer = "answer"
    assert await made.fire() == "answer"
    assert made.closed


# 9. Events


@timeless
async def test_events_tell_what_happens_with_latency_and_arguments() -> None:
    action = Action(seconds=1)
    made = breaker(action, timeout=5, volume_threshold=3)
    heard = listening(made)
    await made.fire(1)
    error = action.answer = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        await made.fire(2)
    action.seconds = 9
    with pytest.raises(DeadlineExceeded) as late:
        await made.fire(3)

    assert heard == [
        ("fire", (1,)),
        ("success", "answer", 1.0),
        ("fire", (2,)),
        ("failure", error, 1.0, (2,)),
        ("fire", (3,)),
        ("open",),
        ("timeout", late.value, 5.0, (3,)),
    ]


@timeless
async def test_a_disabled_breaker_still_tells_of_calls() -> None:
    made = breaker(broken())
    made.disable()
    heard = listening(made)
    await fail(made, 3)

    assert names(heard) == ["fire"] * 3
    assert made.closed


@timeless
async def test_listeners_come_and_go_and_hurt_nobody(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Any] = []
    made = breaker(Action())
    made.once("success", lambda *facts: heard.append("once")).on("success", heard.append)
    made.off("success", heard.append).on("success", lambda *facts: 1 / 0)

    assert [await made.fire(), await made.fire()] == ["answer", "answer"]
    assert heard == ["once"]
    assert "a listener to 'success'" in caplog.text
    with pytest.raises(ValueError, match="no event 'succes'"):
        made.on("succes", heard.append)


# 10. Statistics


@timeless
async def test_counts_roll_and_latencies_have_percentiles() -> None:
    action = Action()
    made = breaker(action)
    for seconds in range(1, 5):
        action.seconds = seconds / 10
        await made.fire()

    assert made.stats["successes"] == 4
    assert made.stats["latency_mean"] == pytest.approx(0.25)
    assert made.stats["percentiles"]["1"] == pytest.approx(0.4)
    assert made.stats["percentiles"]["0"] == pytest.approx(0.1)
    assert len(made.window.buckets) == 2  # of a second each
    await asyncio.sleep(10)
    assert made.stats["successes"] == 0


@timeless
async def test_percentiles_can_be_off_and_buckets_be_turned_from_outside() -> None:
    made = breaker(Action(seconds=1), rolling_percentiles_enabled=False, rotate_buckets=False, rolling_count_buckets=2)
    await made.fire()
    await asyncio.sleep(100)
    assert made.stats["latency_mean"] == 0
    assert made.stats["successes"] == 1
    made.window.rotate()
    assert made.stats["successes"] == 1
    made.window.rotate()
    assert made.stats["successes"] == 0


# 11. State


@timeless
async def test_another_breaker_goes_on_where_this_one_stood() -> None:
    action = broken()
    made = breaker(action, name="users", group="all")
    await fail(made)
    await asyncio.sleep(9)
    told = json.loads(json.dumps(made.to_json()))
    other = breaker(action, **told)

    assert told["state"]["opened_at"] == BEGIN
    assert other.opened
    assert other.stats["failures"] == 1
    await asyncio.sleep(20)
    with pytest.raises(Unavailable):
        await other.fire()
    await asyncio.sleep(1)
    action.answer = "answer"
    assert await other.fire() == "answer"


@timeless
async def test_what_has_been_open_for_long_or_half_open_is_tried() -> None:
    for state in ({"state": "open", "opened_at": BEGIN - 31}, {"state": "half-open", "opened_at": BEGIN - 31}):
        action = Action(seconds=1)
        made = breaker(action, state=state)
        answers = await asyncio.gather(*(made.fire() for _ in range(3)), return_exceptions=True)
        assert [isinstance(answer, Unavailable) for answer in answers] == [False, True, True]
        assert made.closed


@timeless
async def test_closed_disabled_and_shut_down_are_taken_over_and_nonsense_is_not() -> None:
    assert breaker(Action(), state={"state": "closed"}).closed
    assert not breaker(Action(), state={"enabled": False}).enabled
    assert breaker(Action(), state={"shutdown": True}).is_shut_down
    assert breaker(Action(), status={"failures": 3}).stats["failures"] == 3
    for wrong in ({"state": "ajar"}, "open", 7):
        with pytest.raises(TypeError):
            breaker(Action(), state=wrong)
    with pytest.raises(TypeError):
        breaker(Action(), status={"failures": "many"})


# 12. Bulkhead


@timeless
async def test_so_many_calls_at_a_time_and_the_rest_is_refused() -> None:
    action = Action(seconds=1)
    made = breaker(action, capacity=2)
    heard = listening(made)

    answers = await asyncio.gather(*(made.fire() for _ in range(5)), return_exceptions=True)

    assert [isinstance(answer, Unavailable) for answer in answers] == [False, False, True, True, True]
    assert names(heard).count("semaphore_locked") == made.stats["semaphore_rejections"] == 3
    assert (action.most, made.turns.taken) == (2, 0)


# 13. Cache, and calls that are shared


@timeless
async def test_answers_are_kept_for_their_time_by_their_key_and_as_many_as_there_is_room_for() -> None:
    action = Action()
    made = breaker(action, cache=True, cache_ttl=5, cache_size=2)
    heard = listening(made)
    await made.fire(1)
    await made.fire(1)
    await made.fire(2)
    assert action.calls == [(1,), (2,)]
    assert names(heard).count("cache_hit") == 1
    assert names(heard).count("cache_miss") == 2

    await asyncio.sleep(5)
    await made.fire(1)
    assert len(action.calls) == 3
    await made.fire(2)
    await made.fire(3)  # 1 was used longest ago
    await made.fire(2)
    assert len(action.calls) == 5
    made.clear_cache()
    await made.fire(2)
    assert len(action.calls) == 6


@timeless
async def test_a_key_and_a_cache_may_be_ones_own() -> None:
    class Elsewhere:
        def __init__(self) -> None:
            self.kept: dict[Any, Any] = {}

        async def get(self, key: Any) -> Any:
            return self.kept.get(key)

        async def set(self, key: Any, value: Any, ttl: float) -> None:
            self.kept[key] = value, ttl

        def flush(self) -> None:
            self.kept.clear()

    elsewhere = Elsewhere()
    made = breaker(Action(), cache=True, cache_get_key=lambda number: number % 2, cache_transport=elsewhere)
    await made.fire(1)
    assert await made.fire(3) == ("answer", 0.0)
    made.clear_cache()
    assert elsewhere.kept == {}


@timeless
async def test_equal_calls_under_way_are_made_once_alone_and_beside_a_cache() -> None:
    for cached in (False, True):
        action = Action(seconds=1)
        made = breaker(action, coalesce=True, cache=cached)
        heard = listening(made)
        assert await asyncio.gather(*(made.fire(1) for _ in range(4))) == ["answer"] * 4
        assert len(action.calls) == 1
        assert names(heard).count("coalesce_cache_hit") == 3
        assert names(heard).count("coalesce_cache_miss") == 1


@pytest.mark.parametrize(
    ("reset_on", "answer", "seconds", "calls"),
    [
        ((), "answer", 0, 1),
        (("success",), "answer", 0, 2),
        ((), ZeroDivisionError(), 0, 1),
        (("error",), ZeroDivisionError(), 0, 2),
        (("error",), "late", 20, 1),
        (("timeout",), "late", 20, 2),
    ],
)
@timeless
async def test_a_shared_call_is_given_up_as_it_is_said(
    reset_on: tuple[str, ...], answer: Any, seconds: float, calls: int
) -> None:
    action = Action(answer, seconds)
    made = breaker(action, coalesce=True, coalesce_ttl=60, coalesce_reset_on=reset_on, volume_threshold=10)
    for _ in range(2):
        await asyncio.gather(made.fire(1), return_exceptions=True)
    assert len(action.calls) == calls


def test_nonsense_about_shared_calls_is_told() -> None:
    with pytest.raises(TypeError, match="'succes' is not one of"):
        CircuitBreaker(named, coalesce_reset_on=("succes",))


# 14. Health check


@timeless
async def test_a_check_that_fails_opens_it() -> None:
    ill: list[Exception] = []

    def check() -> None:
        if ill:
            raise ill[0]

    made = breaker(Action())
    heard = listening(made)
    made.health_check(check, 5)
    await asyncio.sleep(6)
    assert made.closed
    ill.append(ZeroDivisionError())
    await asyncio.sleep(5)

    assert made.opened
    assert heard == [("health_check_failed", ill[0]), ("open",)]
    made.shutdown()


@timeless
async def test_a_check_is_a_function_and_its_interval_a_number() -> None:
    made = breaker(Action())
    with pytest.raises(TypeError):
        made.health_check("check")  # type: ignore[arg-type]
    for interval in ("5", True, 0, float("nan"), float("inf")):
        with pytest.raises(TypeError):
            made.health_check(lambda: None, interval)  # type: ignore[arg-type]


# 15. Life


@timeless
async def test_a_shut_down_breaker_refuses_and_leaves_nothing_behind() -> None:
    made = breaker(Action(), cache=True)
    heard = listening(made)
    made.health_check(lambda: None)
    await made.fire(1)
    made.shutdown()
    made.shutdown()
    await asyncio.sleep(0.1)

    with pytest.raises(Unavailable) as refused:
        await made.fire(1)
    assert refused.value.code == "shut-down"
    assert names(heard).count("shutdown") == 1
    assert not made._tasks
    assert not any(made._listeners.values())


@timeless
async def test_a_hundred_breakers_leave_no_tasks() -> None:
    made = [breaker(Action()) for _ in range(100)]
    for each in made:
        await each.fire()
        each.disable()
        each.enable()
        each.shutdown()

    assert asyncio.all_tasks() == {asyncio.current_task()}


# Six defects, and six invariants


@timeless
async def test_one_failure_opens_nothing_with_default_options() -> None:
    made = CircuitBreaker(broken(), clock=clock)
    await fail(made)
    assert made.closed


@timeless
async def test_a_late_success_from_before_does_not_close_a_half_open_one() -> None:
    made = breaker(lambda seconds, error=None: _later(seconds, error), timeout=100, reset_timeout=10)
    early = asyncio.ensure_future(made.fire(12))
    await asyncio.sleep(0)
    with pytest.raises(ZeroDivisionError):
        await made.fire(0, ZeroDivisionError())
    await asyncio.sleep(11)
    trial = asyncio.ensure_future(made.fire(50))
    await early
    assert made.half_open

    trial.cancel()


@timeless
async def test_rejections_open_nothing_and_dilute_nothing() -> None:
    action = Action(seconds=1)
    made = breaker(action, capacity=1, volume_threshold=3, cache=True, cache_get_key=lambda number: number)
    await asyncio.gather(*(made.fire(number) for number in range(5)), return_exceptions=True)
    assert made.closed
    for _ in range(20):
        await made.fire(0)  # kept
    action.answer = ZeroDivisionError()
    for number in (10, 11):
        with pytest.raises(ZeroDivisionError):
            await made.fire(number)

    assert made.opened  # two of three


@timeless
async def test_a_call_that_took_too_long_keeps_its_place_until_its_work_ends() -> None:
    action = Stubborn(seconds=10)
    made = breaker(action, capacity=2, timeout=1, volume_threshold=100)
    for _ in range(8):
        await asyncio.gather(made.fire(), return_exceptions=True)

    assert action.most == 2
    assert made.turns.taken == 2
    await asyncio.sleep(10)
    assert made.turns.taken == 0


@timeless
async def test_the_time_of_opening_is_exported_and_not_that_of_making() -> None:
    made = breaker(broken())
    assert made.to_json()["state"]["opened_at"] is None
    await asyncio.sleep(3)
    await fail(made)
    await asyncio.sleep(4)
    assert made.to_json()["state"]["opened_at"] == BEGIN + 3


@timeless
async def test_a_hung_trial_does_not_keep_it_half_open() -> None:
    action = broken()
    made = breaker(action, timeout=0, reset_timeout=5)
    await fail(made)
    await asyncio.sleep(5)
    action.seconds = 10_000
    trial = asyncio.ensure_future(made.fire())
    await asyncio.sleep(5)
    with pytest.raises(Unavailable):
        await made.fire()
    assert made.opened
    await asyncio.sleep(5)
    action.answer, action.seconds = "answer", 0
    assert await made.fire() == "answer"
    assert made.closed
    trial.cancel()
