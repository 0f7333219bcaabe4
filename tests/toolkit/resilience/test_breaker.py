"""When a circuit opens, what it lets through, and how it closes again."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from microservices.exceptions import ConnectionLost, DeadlineExceeded, NoHandler, RpcException, Unavailable
from microservices.resilience.breaker import _MOST_CIRCUITS, Breaker, Circuit, Options, State, transitions
from tests.toolkit.conftest import context
from tests.toolkit.resilience.conftest import Clock, Service


def circuit(**options: Any) -> Circuit:
    return Circuit(Options(**options), jitter=lambda low, high: 1.0)


def opened(now: float = 100.0, **options: Any) -> Circuit:
    made = circuit(least_calls=1, **options)
    made.failed(entered(made, now), now)
    assert made.state is State.OPEN
    return made


def entered(made: Circuit, now: float) -> int:
    epoch = made.enter(now)
    assert epoch is not None
    return epoch


# Opening


def test_one_failure_opens_nothing() -> None:
    made = circuit()
    made.failed(entered(made, 1.0), 1.0)

    assert made.state is State.CLOSED


@pytest.mark.parametrize(("failures", "state"), [(4, State.CLOSED), (5, State.OPEN)])
def test_half_of_ten_calls_that_fail_open_it(failures: int, state: State) -> None:
    made = circuit()
    for number in range(10):
        epoch = entered(made, 1.0)
        if number < 10 - failures:
            made.succeeded(epoch, 1.0)
        else:
            made.failed(epoch, 1.0)

    assert made.state is state


def test_nine_calls_prove_nothing() -> None:
    made = circuit()
    for _ in range(9):
        made.failed(entered(made, 1.0), 1.0)

    assert made.state is State.CLOSED


@pytest.mark.parametrize(("slow", "state"), [(7, State.CLOSED), (8, State.OPEN)])
def test_calls_that_are_slow_open_it_too(slow: int, state: State) -> None:
    made = circuit()
    for number in range(10):
        made.succeeded(entered(made, 1.0), 1.0, slow=number >= 10 - slow)

    assert made.state is state


def test_what_is_older_than_the_window_is_forgotten() -> None:
    made = circuit()
    for _ in range(9):
        made.failed(entered(made, 1.0), 1.0)
    made.failed(entered(made, 11.5), 11.5)

    assert made.state is State.CLOSED
    assert made.rates(11.5) == (1, 1.0, 0.0)
    assert made.rates(1000.0)[0] == 0


def test_the_time_of_opening_is_that_of_opening() -> None:
    assert opened(123.0).opened_at == 123.0


# Half-open


def test_it_refuses_until_its_time_is_over_and_then_lets_a_few_through() -> None:
    made = opened(100.0, trials=3)

    assert made.enter(101.9) is None
    assert [made.enter(102.0) is None for _ in range(5)] == [False, False, False, True, True]
    assert made.state is State.HALF_OPEN


def test_it_closes_when_all_trials_have_passed() -> None:
    made = opened(100.0)
    trials = [entered(made, 102.0) for _ in range(3)]

    made.succeeded(trials[0], 102.1)
    made.succeeded(trials[1], 102.1)
    assert made.state is State.HALF_OPEN
    made.succeeded(trials[2], 102.1)

    assert made.state is State.CLOSED
    assert made.rates(102.1)[0] == 0


def test_one_trial_that_fails_or_is_slow_opens_it_for_longer_each_time_and_at_most_thirty_seconds() -> None:
    made, now, periods = opened(100.0), 100.0, []
    for number in range(7):
        period = made.retry_after(now)
        periods.append(period)
        now += period
        epoch = entered(made, now)
        if number % 2:
            made.failed(epoch, now)
        else:
            made.succeeded(epoch, now, slow=True)

    assert periods == [2, 4, 8, 16, 30, 30, 30]


def test_a_trial_that_hangs_does_not_keep_it_half_open() -> None:
    made = opened(100.0, trials=1, trial_timeout=10)
    hanging = entered(made, 102.0)

    assert made.enter(111.9) is None
    assert made.enter(112.0) is None
    assert made.state is State.OPEN
    made.succeeded(hanging, 113.0)
    assert made.state is State.OPEN
    assert made.enter(116.0) is not None


def test_a_trial_that_is_given_up_makes_room_for_another() -> None:
    made = opened(100.0, trials=1)
    given_up = entered(made, 102.0)

    assert made.enter(102.1) is None
    made.forgotten(given_up)

    assert made.enter(102.1) is not None


def test_trials_that_come_seldom_close_it_all_the_same() -> None:
    made = opened(100.0, open_for=2, trial_timeout=10)
    now = 103.0
    for _ in range(made.options.trials):
        made.succeeded(entered(made, now), now + 0.1)
        now += 60

    assert made.state is State.CLOSED


def test_calls_begun_before_it_opened_change_nothing() -> None:
    made = circuit(least_calls=1, trials=1)
    early, late = entered(made, 100.0), entered(made, 100.0)
    made.failed(early, 100.0)
    trial = entered(made, 102.0)

    made.succeeded(late, 102.5)
    assert made.state is State.HALF_OPEN
    made.forgotten(late)
    assert made.enter(102.5) is None
    made.succeeded(trial, 103.0)
    made.failed(late, 103.0)
    assert made.state is State.CLOSED
    assert made.rates(103.0)[0] == 0


def test_open_periods_are_spread() -> None:
    asked: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        asked.append((low, high))
        return 1.1

    made = Circuit(Options(least_calls=1), jitter=jitter)
    made.failed(entered(made, 100.0), 100.0)

    assert asked == [(0.8, 1.2)]
    assert made.retry_after(100.0) == pytest.approx(2.2)


# By hand


def test_an_operator_can_force_it_open_watch_it_and_switch_it_off() -> None:
    made = circuit(least_calls=1)

    made.force_open()
    assert made.enter(1000.0) is None
    made.disable()
    made.failed(entered(made, 1.0), 1.0)
    assert made.rates(1.0)[0] == 0
    made.observe()
    made.failed(entered(made, 1.0), 1.0)
    assert (made.state, made.rates(1.0)[:2]) == (State.OBSERVE, (1, 1.0))
    made.close()
    assert (made.state, made.rates(1.0)[0]) == (State.CLOSED, 0)


# As a model


class Model(RuleBasedStateMachine):
    """Calls that begin and end in any order, beside what must be true of a circuit at every moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.seen: list[tuple[State, State]] = []
        self.epochs = 0
        self.made = Circuit(Options(least_calls=3, trials=2), self.changed, lambda low, high: 1.0)
        self.under_way: list[tuple[int, int]] = []
        self.trials = 0

    def changed(self, old: State, new: State) -> None:
        self.seen.append((old, new))
        self.epochs += 1
        self.trials = 0

    @rule()
    def begin(self) -> None:
        before = self.made.state
        epoch = self.made.enter(self.now)
        if before is State.CLOSED:
            assert epoch is not None
        if epoch is None:
            assert self.made.state in (State.OPEN, State.HALF_OPEN, State.FORCED_OPEN)
            return
        if self.made.state is State.HALF_OPEN:
            self.trials += 1
        self.under_way.append((epoch, self.epochs))

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 1000), end=st.sampled_from(["succeeded", "slow", "failed", "forgotten"]))
    def end(self, which: int, end: str) -> None:
        epoch, begun_in = self.under_way.pop(which % len(self.under_way))
        before, epochs = self.made.state, self.epochs
        if end == "forgotten":
            self.made.forgotten(epoch)
            if begun_in == epochs and before is State.HALF_OPEN:
                self.trials -= 1
        elif end == "failed":
            self.made.failed(epoch, self.now)
        else:
            self.made.succeeded(epoch, self.now, slow=end == "slow")
        if begun_in != epochs or end == "forgotten":
            assert self.made.state is before  # begun before the last transition, or without a meaning

    @rule(seconds=st.floats(0.01, 12))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(what=st.sampled_from(["close", "force_open", "observe"]))
    def operate(self, what: str) -> None:
        if len(self.seen) % 5 == 4:
            getattr(self.made, what)()

    @invariant()
    def no_more_trials_than_may_be(self) -> None:
        assert self.trials <= 2

    @invariant()
    def only_known_ways_lead_from_state_to_state(self) -> None:
        by_itself = {
            (State.CLOSED, State.OPEN),
            (State.OPEN, State.HALF_OPEN),
            (State.HALF_OPEN, State.OPEN),
            (State.HALF_OPEN, State.CLOSED),
        }
        by_hand = {State.FORCED_OPEN, State.OBSERVE, State.CLOSED}
        assert all(step in by_itself or step[1] in by_hand for step in self.seen)

    @invariant()
    def an_open_circuit_knows_when_it_was_opened(self) -> None:
        if self.made.state is State.OPEN:
            assert self.made.opened_at is not None
            assert self.made.opened_at <= self.now


Model.TestCase.settings = settings(derandomize=True, max_examples=100, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase


# As a middleware


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (Unavailable("away"), True),
        (ConnectionLost(), True),
        (DeadlineExceeded(), True),
        (NoHandler(), True),
        (RpcException("Internal server error"), True),
        (RpcException({"statusCode": 404, "message": "gone"}), False),
        (RpcException({"statusCode": 429, "message": "quota"}), False),
        # Refusals of a limit, here or there.
        (Unavailable("full", code="overloaded"), False),
        (RpcException({"statusCode": 503, "code": "overloaded", "message": "busy"}), False),
    ],
)
async def test_what_counts_as_a_failure(clock: Clock, error: RpcException, counts: bool) -> None:
    breaker = Breaker(Options(least_calls=1), clock=clock)

    with pytest.raises(type(error)):
        await breaker(Service([error]))(None, context())

    assert breaker.circuits["shop", "ask"].state is (State.OPEN if counts else State.CLOSED)


@pytest.mark.asyncio
async def test_a_trial_has_a_deadline_of_its_own(clock: Clock) -> None:
    shop = Service([RpcException("broken")])
    breaker = Breaker(Options(least_calls=1, trial_timeout=3), clock=clock)
    endpoint = breaker(shop)
    for seconds in (0, 40):
        clock.now += seconds
        call = context()
        call.cap_deadline(60)
        with pytest.raises(RpcException):
            await endpoint(None, call)

    (_, first), (_, trial) = shop.calls
    assert first.deadline is not None
    assert trial.deadline is not None
    assert 2 < trial.deadline - time.monotonic() <= 3
    assert first.deadline - time.monotonic() > 50


@pytest.mark.asyncio
async def test_an_open_breaker_asks_nobody_and_says_when_it_will(clock: Clock) -> None:
    shop = Service([ConnectionLost(), "answer"])
    breaker = Breaker(Options(least_calls=1, trials=1), clock=clock, jitter=lambda low, high: 1.0)
    endpoint = breaker(shop)
    with pytest.raises(ConnectionLost):
        await endpoint(None, context())

    clock.now += 0.5
    with pytest.raises(Unavailable, match="shop ask has failed too often") as refused:
        await endpoint(None, context())
    assert (refused.value.code, refused.value.error["retryAfter"], refused.value.retry_after) == (
        "circuit-open",
        1.5,
        2,
    )
    assert len(shop.calls) == 1
    clock.now += 1.5
    assert await endpoint(None, context()) == "answer"
    assert breaker.circuits["shop", "ask"].state is State.CLOSED


@pytest.mark.asyncio
async def test_rejections_do_not_dilute_the_rate(clock: Clock) -> None:
    shop = Service([Unavailable("full", code="overloaded")])
    breaker = Breaker(clock=clock)
    for _ in range(50):
        with pytest.raises(Unavailable):
            await breaker(shop)(None, context())

    assert breaker.circuits["shop", "ask"].rates(clock.now)[0] == 0


@pytest.mark.asyncio
async def test_half_of_the_deadline_is_slow(clock: Clock) -> None:
    async def endpoint(data: float, context: Any) -> None:
        clock.now += data

    breaker = Breaker(Options(least_calls=3), clock=clock)

    await breaker(endpoint)(2.4, context(deadline=clock.now + 5))
    await breaker(endpoint)(2.6, context(deadline=clock.now + 5))
    assert breaker.circuits["shop", "ask"].rates(clock.now) == (2, 0, 0.5)

    await breaker(endpoint)(100.0, context())
    assert breaker.circuits["shop", "ask"].rates(clock.now) == (1, 0, 0)


@pytest.mark.asyncio
async def test_a_call_that_is_given_up_says_nothing(clock: Clock) -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    breaker = Breaker(Options(least_calls=1), clock=clock)
    call = asyncio.create_task(breaker(shop)(None, context()))
    await asyncio.sleep(0)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert breaker.circuits["shop", "ask"].rates(clock.now)[0] == 0


@pytest.mark.asyncio
async def test_each_pattern_has_a_circuit_of_its_own_until_there_are_too_many(clock: Clock) -> None:
    breaker = Breaker(Options(least_calls=1), clock=clock)
    failing = breaker(Service([ConnectionLost()]))
    with pytest.raises(ConnectionLost):
        await failing(None, context())
    assert await breaker(Service(["answer"]))(None, context(pattern="other")) == "answer"

    for number in range(_MOST_CIRCUITS + 50):
        await breaker(Service(["answer"]))(None, context(pattern=str(number)))

    assert len(breaker.circuits) <= _MOST_CIRCUITS + 1


@pytest.mark.asyncio
async def test_transitions_are_counted_and_told_once_each(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    breaker = Breaker(Options(least_calls=1), source="gateway", clock=clock)
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionLost):
        await breaker(Service([ConnectionLost()]))(None, context(service="users", pattern='{"cmd":"get_user"}'))

    assert transitions.value("gateway", "users", "get_user", "closed", "open") == 1
    assert caplog.messages == ["gateway: calls of users get_user: open, was closed"]
