"""Which calls are made again, when, and how many of them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microservices.exceptions import ConnectionLost, DeadlineExceeded, RpcException, Unavailable
from microservices.handlers import Retry as Kind
from microservices.resilience.retry import Budget, Retry, retries
from tests.toolkit.conftest import context
from tests.toolkit.resilience.conftest import Clock, Service

KEY = {"idempotency_key": "k1"}


def away() -> RpcException:
    return Unavailable("shop cannot be reached")


def refused(code: str) -> RpcException:
    return Unavailable("refused here", code=code)


def told(status: int, code: str) -> RpcException:
    return RpcException({"statusCode": status, "code": code, "message": code})


def retry(clock: Clock, kind: Kind = "safe", **options: Any) -> Retry:
    return Retry(Budget(clock=clock), kind, source="test", sleep=clock.sleep, jitter=lambda low, high: high, **options)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "data", "error", "calls"),
    [
        ("safe", None, ConnectionLost(), 3),
        ("safe", None, told(503, "overloaded"), 3),
        ("safe", None, DeadlineExceeded(), 3),
        ("safe", None, told(404, "not-found"), 1),
        ("safe", None, RpcException("Internal server error"), 1),
        ("keyed", KEY, ConnectionLost(), 3),
        ("keyed", {"idempotency_key": ""}, ConnectionLost(), 1),
        ("keyed", None, ConnectionLost(), 1),
        ("never", KEY, ConnectionLost(), 1),
        ("never", KEY, DeadlineExceeded(), 1),
        # What was never sent may be sent whatever it is.
        ("never", None, away(), 3),
        # What was refused here, by a limit or a breaker, is not asked for again.
        ("safe", None, refused("overloaded"), 1),
        ("safe", None, refused("circuit-open"), 1),
        ("safe", None, refused("closed"), 1),
    ],
)
async def test_what_may_be_repeated_depends_on_the_pattern_and_on_the_error(
    clock: Clock, kind: Kind, data: Any, error: RpcException, calls: int
) -> None:
    shop = Service([error])

    with pytest.raises(type(error)):
        await retry(clock, kind)(shop)(data, context())

    assert len(shop.calls) == calls


@pytest.mark.asyncio
async def test_the_first_answer_ends_it_and_the_pauses_grow(clock: Clock) -> None:
    shop = Service([ConnectionLost(), ConnectionLost(), "answer"])

    assert await retry(clock)(shop)(None, context()) == "answer"
    assert clock.slept == [0.05, 0.1]
    assert retries.value("test", "shop", "succeeded") == 1


@pytest.mark.asyncio
async def test_a_pause_is_anywhere_between_nothing_and_its_length(clock: Clock) -> None:
    asked: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    shop = Service([ConnectionLost()])
    with pytest.raises(ConnectionLost):
        await Retry(Budget(clock=clock), "safe", sleep=clock.sleep, jitter=jitter)(shop)(None, context())

    assert asked == [(0, 0.05), (0, 0.1)]


@pytest.mark.asyncio
async def test_no_pause_reaches_beyond_the_deadline(clock: Clock) -> None:
    shop = Service([ConnectionLost()])

    with pytest.raises(ConnectionLost):
        await retry(clock, delay=60)(shop)(None, context(deadline=time.monotonic() + 5))

    assert len(shop.calls) == 1
    assert not clock.slept


@pytest.mark.asyncio
async def test_an_error_that_was_retried_below_is_not_retried_again(clock: Clock) -> None:
    shop = Service([ConnectionLost()])

    with pytest.raises(ConnectionLost) as raised:
        await retry(clock)(retry(clock)(shop))(None, context())

    assert len(shop.calls) == 3
    assert raised.value.error["retried"] is True


@pytest.mark.asyncio
async def test_an_error_of_the_second_attempt_that_may_not_pass_is_raised_as_it_is(clock: Clock) -> None:
    gone = told(404, "not-found")
    shop = Service([ConnectionLost(), gone])

    with pytest.raises(RpcException) as raised:
        await retry(clock)(shop)(None, context())

    assert raised.value is gone
    assert len(shop.calls) == 2


@pytest.mark.asyncio
async def test_an_empty_budget_fails_at_once(clock: Clock) -> None:
    budget, made = Budget(0.2, 0, clock), 0

    for _ in range(10):
        shop = Service([ConnectionLost()])
        with pytest.raises(ConnectionLost):
            await Retry(budget, "safe", source="poor", sleep=clock.sleep)(shop)(None, context())
        made += len(shop.calls)

    # Of ten calls two were made again: a fifth.
    assert made == 12
    assert retries.value("poor", "shop", "no-budget") > 0


@pytest.mark.asyncio
async def test_without_retries_there_is_no_middleware_at_all(clock: Clock) -> None:
    shop = Service(["answer"])

    assert retry(clock, times=0)(shop) is shop


def test_a_budget_forgets_what_is_ten_seconds_old(clock: Clock) -> None:
    budget = Budget(0.5, 0, clock)
    for _ in range(4):
        budget.deposit()

    assert [budget.take() for _ in range(3)] == [True, True, False]
    clock.now += 9
    assert not budget.take()
    clock.now += 1
    assert budget.left == 0
    budget.deposit()
    budget.deposit()
    assert budget.take()


@given(
    st.lists(st.tuples(st.sampled_from(["call", "retry", "wait"]), st.floats(0.1, 15)), max_size=80),
)
@settings(derandomize=True, max_examples=200, deadline=None)
def test_in_no_ten_seconds_are_there_more_retries_than_their_share(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    budget = Budget(0.2, 1, clock)
    calls: list[float] = []
    taken: list[float] = []
    for step, seconds in steps:
        if step == "call":
            budget.deposit()
            calls.append(clock.now)
        elif step == "retry" and budget.take():
            taken.append(clock.now)
        else:
            clock.now += seconds

        recent = [at for at in taken if int(at) > int(clock.now) - 10]
        assert len(recent) <= 10 + 0.2 * len(calls)
