"""Who gets a call, who gets none for a while, and who again: on a clock that stands still until it is told."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from microservices.discovery.balancer import Balancer, ejections
from microservices.discovery.choosers import CHOOSERS
from microservices.discovery.instances import Instance, Location
from microservices.exceptions import ConfigurationError

SEED = 20_26


class Clock:
    """A clock that goes on when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def over(clock: Clock, *instances: str | Location, chooser: str = "two-choices", zone: str = "") -> Balancer:
    """Return a balancer over these instances."""
    return Balancer(
        "users", instances, chooser=chooser, zone=zone, source="tests", clock=clock, rng=random.Random(SEED)
    )


def call(
    balancer: Balancer, clock: Clock, seconds: float = 0.01, failed: Callable[[str], bool] = lambda url: False
) -> str:
    """Make one call that takes so long; return the URL of who got it."""
    instance, began = balancer.choose(), clock.now
    clock.now += seconds
    balancer.done(instance, began, failed(instance.url))
    return instance.url


def fail(balancer: Balancer, url: str, times: int = 1) -> None:
    """Let calls of one instance fail."""
    for _ in range(times):
        instance, now = balancer.instances[url], balancer.clock()
        instance.begin(now)
        balancer.done(instance, now, failed=True)


def simulate(
    balancer: Balancer,
    clock: Clock,
    took: Callable[[str], float],
    failed: Callable[[str], bool],
    rate: float,
    count: int,
) -> tuple[Counter[str], Counter[str]]:
    """Begin `rate` calls a second, each of which takes its time; return who got them, and whose failed."""
    under_way: list[tuple[float, int, float, Instance]] = []
    got: Counter[str] = Counter()
    failures: Counter[str] = Counter()

    def end_until(time: float) -> None:
        while under_way and under_way[0][0] <= time:
            clock.now, _, began, instance = heapq.heappop(under_way)
            balancer.done(instance, began, failed(instance.url))

    for number in range(count):
        begins = clock.now + 1 / rate
        end_until(begins)
        clock.now = begins
        instance = balancer.choose()
        got[instance.url] += 1
        failures[instance.url] += failed(instance.url)
        heapq.heappush(under_way, (begins + took(instance.url), number, begins, instance))
    end_until(float("inf"))
    return got, failures


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_equals_get_equal_shares(clock: Clock, chooser: str) -> None:
    balancer = over(clock, "a", "b", "c", "d", chooser=chooser)

    got, _ = simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=500, count=4000)

    assert set(got) == {"a", "b", "c", "d"}
    assert max(got.values()) < 1.3 * min(got.values())


def test_one_of_four_that_is_five_times_slower_gets_little(clock: Clock) -> None:
    balancer = over(clock, "a", "b", "c", "slow")

    got, _ = simulate(balancer, clock, lambda url: 0.1 if url == "slow" else 0.02, lambda url: False, 500, 5000)

    assert 0 < got["slow"] < 0.1 * 5000


def test_one_that_stands_still_gets_hardly_anything(clock: Clock) -> None:
    balancer = over(clock, "a", "stopped")

    got, _ = simulate(
        balancer, clock, lambda url: 5.0 if url == "stopped" else 0.01, lambda url: url == "stopped", 200, 4000
    )

    assert got["stopped"] < 0.01 * 4000


def test_one_that_keeps_a_call_waiting_is_charged_for_it_before_it_has_ended(clock: Clock) -> None:
    balancer = over(clock, "a", "stopped")
    a, stopped = balancer.instances.values()
    for each in (a, stopped):
        each.begin(clock.now)
        balancer.done(each, clock.now - 0.01, failed=False)
    stopped.begin(clock.now)
    clock.now += 0.5
    for _ in range(10):
        a.begin(clock.now)

    assert {balancer.choose().url for _ in range(10)} == {"a"}


def test_one_that_fails_at_once_draws_hardly_any_calls(clock: Clock) -> None:
    balancer = over(clock, "a", "b", "c", "broken")

    _, failures = simulate(
        balancer, clock, lambda url: 0.0001 if url == "broken" else 0.02, lambda url: url == "broken", 500, 20_000
    )

    assert 0 < failures["broken"] <= 0.001 * 20_000


def test_five_failures_in_a_row_put_an_instance_out_for_a_second(clock: Clock) -> None:
    before = ejections.value("tests", "users", "failures-in-a-row")
    balancer = over(clock, "a", "b")

    fail(balancer, "a", 4)
    assert balancer.out == []
    fail(balancer, "a")

    assert [each.url for each in balancer.out] == ["a"]
    assert {call(balancer, clock) for _ in range(50)} == {"b"}
    assert ejections.value("tests", "users", "failures-in-a-row") == before + 1


def test_more_than_half_of_ten_calls_put_it_out_too(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    a = balancer.instances["a"]

    for failed in [True, True, False] * 3:
        a.begin(clock.now)
        balancer.done(a, clock.now, failed)
    assert balancer.out == []  # nine calls
    fail(balancer, "a")

    assert balancer.out == [a]


def test_failures_of_more_than_ten_seconds_ago_are_forgotten(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    a = balancer.instances["a"]
    for failed in [True, True, False] * 3:
        a.begin(clock.now)
        balancer.done(a, clock.now, failed)

    clock.now += 11
    fail(balancer, "a")

    assert balancer.out == []


def test_one_call_tries_it_after_its_time_and_the_time_grows_to_thirty_seconds(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    fail(balancer, "a", 5)

    periods = []
    for _ in range(7):
        began = clock.now
        while "a" not in (urls := [call(balancer, clock, 0.1, lambda url: url == "a") for _ in range(2)]):
            assert urls == ["b", "b"]
        periods.append(clock.now - began)

    assert [round(period) for period in periods] == [1, 2, 4, 8, 16, 30, 30]


def test_while_one_call_tries_it_no_other_does(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    fail(balancer, "a", 5)
    clock.now += 1

    trial = balancer.choose()
    others = {call(balancer, clock) for _ in range(20)}
    balancer.done(trial, clock.now, failed=False)

    assert trial.url == "a"
    assert others == {"b"}
    assert balancer.out == []


def test_a_trial_that_is_given_up_is_followed_by_another(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    fail(balancer, "a", 5)
    clock.now += 1
    trial = balancer.choose()

    balancer.done(trial, clock.now, failed=None)

    assert balancer.choose() is trial


def test_a_trial_whose_end_is_not_heard_of_is_followed_by_another(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    fail(balancer, "a", 5)
    clock.now += 1
    trial = balancer.choose()

    clock.now += 29
    assert balancer.choose().url == "b"
    clock.now += 1
    assert balancer.choose() is trial


def test_what_is_not_timed_tries_it_too_and_is_no_load(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    fail(balancer, "a", 5)
    clock.now += 1

    trial = balancer.choose(timed=False)
    balancer.done(trial, clock.now, failed=False, timed=False)
    assert (trial.url, balancer.out) == ("a", [])

    for _ in range(5):
        balancer.done(trial, clock.now, failed=False, timed=False)
        balancer.done(trial, clock.now, failed=True, timed=False)
    assert [each.pending for each in balancer.instances.values()] == [0, 0]
    assert balancer.out == [trial]


def test_a_trial_does_not_go_where_the_call_has_just_been(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    fail(balancer, "a", 5)
    clock.now += 1

    assert balancer.choose(["a"]).url == "b"
    assert balancer.choose().url == "a"


def test_calls_that_began_before_it_was_put_out_do_not_bring_it_back(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    a, b = balancer.instances.values()
    a.begin(clock.now)
    fail(balancer, "a", 5)
    fail(balancer, "b", 5)  # all are used
    clock.now += 0.1

    balancer.done(a, clock.now - 5, failed=False)

    assert balancer.out == [a, b]


def test_where_more_than_half_fail_all_are_used(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    balancer = over(clock, "a", "b", "c")

    fail(balancer, "a", 5)
    assert {call(balancer, clock) for _ in range(50)} == {"b", "c"}
    fail(balancer, "b", 5)

    assert {call(balancer, clock, 0.001, lambda url: url != "c") for _ in range(50)} == {"a", "b", "c"}
    assert "more than half of its instances fail; all are used" in caplog.text


def test_an_instance_alone_is_used_whatever_it_does(clock: Clock) -> None:
    balancer = over(clock, "a")

    assert {call(balancer, clock, 0.01, lambda url: True) for _ in range(50)} == {"a"}


def test_whoever_answers_while_all_are_used_is_in_again(clock: Clock) -> None:
    balancer = over(clock, "a", "b")
    fail(balancer, "a", 5)
    fail(balancer, "b", 5)

    call(balancer, clock)

    assert len(balancer.out) == 1


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_a_new_instance_comes_to_its_share_in_ten_seconds(clock: Clock, chooser: str) -> None:
    balancer = over(clock, "a", "b", "c", chooser=chooser)
    simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=500, count=500)

    balancer.update(["a", "b", "c", "new"])
    first, _ = simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=500, count=500)
    simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=500, count=4500)
    later, _ = simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=500, count=2000)

    assert 0 < first["new"] < 0.15 * 500
    assert later["new"] > 0.2 * 2000


@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("rate", [5, 400])
def test_calls_are_dealt_by_weight_in_quiet_and_in_a_crowd(clock: Clock, chooser: str, rate: float) -> None:
    balancer = over(clock, Location("small", 2), Location("large", 6), Location("middle", 4), chooser=chooser)

    got, _ = simulate(balancer, clock, lambda url: 0.05, lambda url: False, rate, count=6000)

    assert got["small"] == pytest.approx(1000, rel=0.15)
    assert got["middle"] == pytest.approx(2000, rel=0.15)
    assert got["large"] == pytest.approx(3000, rel=0.15)


def test_weights_are_well_mixed_where_calls_go_in_turn(clock: Clock) -> None:
    balancer = over(clock, Location("small", 10), Location("large", 30), chooser="round-robin")

    got = [call(balancer, clock) for _ in range(12)]

    assert got.count("small") == 3
    assert ["large"] * 4 not in [got[at : at + 4] for at in range(9)]

    light = "abcdefgh"
    balancer = over(clock, *light, Location("large", 8), chooser="round-robin")
    got = [call(balancer, clock) for _ in range(32)]
    assert got.count("large") == 16
    assert ["large"] * 4 not in [got[at : at + 4] for at in range(29)]


@pytest.mark.parametrize("weight", [0, -1, 101, 1.5, 3.0, True])
def test_a_weight_that_is_none_is_told_of(clock: Clock, weight: Any) -> None:
    balancer = over(clock, "a")

    with pytest.raises(ConfigurationError, match="a: weight is a whole number from 1 to 100"):
        over(clock, Location("a", weight))
    with pytest.raises(ConfigurationError, match="b: weight"):
        balancer.update(["a", Location("b", weight)])
    assert list(balancer.instances) == ["a"]


@pytest.mark.parametrize("chooser", ["two-choices", "pending"])
@pytest.mark.parametrize("weights", [(1, 3), (1, 10), (2, 2, 3), (3, 1)])
def test_one_that_stands_still_gets_hardly_anything_whatever_it_weighs(
    clock: Clock, chooser: str, weights: tuple[int, ...]
) -> None:
    *others, weight = weights
    stopped = Location("stopped", weight)
    balancer = over(clock, *(Location(f"{place}", each) for place, each in enumerate(others)), stopped, chooser=chooser)

    got, _ = simulate(
        balancer, clock, lambda url: 5.0 if url == "stopped" else 0.01, lambda url: url == "stopped", 200, 4000
    )

    assert got["stopped"] < 0.02 * 4000


def test_a_heavy_one_that_is_five_times_slower_gets_little(clock: Clock) -> None:
    balancer = over(clock, "a", Location("slow", 3))

    got, _ = simulate(balancer, clock, lambda url: 0.1 if url == "slow" else 0.02, lambda url: False, 200, 4000)

    assert 0 < got["slow"] < 0.25 * 4000


def test_only_what_weights_are_to_one_another_counts(clock: Clock) -> None:
    def dealt(*weights: int) -> Counter[str]:
        balancer = over(clock, *(Location(name, weight) for name, weight in zip("ab", weights, strict=True)))
        return simulate(balancer, clock, lambda url: 0.05, lambda url: False, 400, 1000)[0]

    assert dealt(1, 1) == dealt(100, 100)
    assert dealt(1, 2) == dealt(50, 100)


def test_another_weight_counts_at_once(clock: Clock) -> None:
    balancer = over(clock, "a", "b", chooser="round-robin")
    before = balancer.instances["a"]

    assert balancer.update([Location("a", 9), "b"]) == []

    assert balancer.instances["a"] is before
    assert [call(balancer, clock) for _ in range(10)].count("a") == 9


def test_a_heavy_one_that_is_new_or_gone_leaves_calls_to_the_others(clock: Clock) -> None:
    balancer = over(clock, "a", Location("b", 5))
    balancer.update(["a", Location("b", 5), Location("new", 50)])

    got, _ = simulate(balancer, clock, lambda url: 0.01, lambda url: False, rate=50, count=100)
    assert got["new"] < 70
    assert balancer.choose(["new"]).url in ("a", "b")
    assert {balancer.choose(["a", "b"]).url for _ in range(9)} == {"new"}
    balancer.update([Location("new", 50)])
    assert balancer.choose(["new"]).url == "new"


EAST_AND_WEST = [Location("e1", zone="east"), Location("e2", zone="east"), *(Location(w, zone="west") for w in "wxy")]


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_calls_stay_in_their_zone_while_it_is_enough_for_them(clock: Clock, chooser: str) -> None:
    balancer = over(clock, *EAST_AND_WEST, chooser=chooser, zone="west")

    got, _ = simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=100, count=600)

    assert set(got) == {"w", "x", "y"}


def test_a_zone_that_is_too_small_gets_what_it_has_capacity_for(clock: Clock) -> None:
    # Half of all calls come from the east, where two of five instances are: a fifth of them goes west.
    balancer = over(clock, *EAST_AND_WEST, zone="east")

    got, _ = simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=100, count=6000)

    assert got["e1"] + got["e2"] == pytest.approx(4800, rel=0.05)
    assert got["w"] + got["x"] + got["y"] == pytest.approx(1200, rel=0.2)


def test_no_zone_has_more_to_do_than_another(clock: Clock) -> None:
    zones = {"a": 1, "b": 1, "c": 4}
    locations = [Location(f"{zone}{number}", zone=zone) for zone, many in zones.items() for number in range(many)]
    got: Counter[str] = Counter()

    for zone in zones:
        balancer = over(clock, *locations, zone=zone)
        got += simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=100, count=4000)[0]

    assert {url: calls / 2000 for url, calls in got.items()} == {
        url: pytest.approx(1, rel=0.1) for url, *_ in locations
    }


def test_one_that_is_new_in_its_zone_is_not_flooded(clock: Clock) -> None:
    far = Location("far", zone="west")
    balancer = over(clock, far, zone="east")
    balancer.update([far, Location("near", zone="east")])

    shares = []
    for _ in range(5):
        got, _ = simulate(balancer, clock, lambda url: 0.002, lambda url: False, rate=100, count=220)
        shares.append(got["near"] / 220)

    assert shares[0] < 0.3
    assert shares == sorted(shares)
    assert [call(balancer, clock) for _ in range(20)] == ["near"] * 20


def test_calls_leave_their_zone_as_its_instances_fail_and_stay_as_they_are_back(clock: Clock) -> None:
    balancer = over(clock, *EAST_AND_WEST, zone="west")

    fail(balancer, "w", 5)
    got, _ = simulate(balancer, clock, lambda url: 0.001, lambda url: False, rate=400, count=300)
    assert set(got) == {"x", "y"}

    fail(balancer, "x", 5)
    got, _ = simulate(balancer, clock, lambda url: 0.0001, lambda url: False, rate=4000, count=900)
    assert set(got) == {"e1", "e2", "y"}
    assert got["y"] == pytest.approx(600, rel=0.1)

    clock.now += 20
    simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=100, count=50)
    got, _ = simulate(balancer, clock, lambda url: 0.02, lambda url: False, rate=100, count=2000)
    assert set(got) == {"w", "x", "y"}


def test_another_attempt_leaves_the_zone_when_all_of_it_has_been_tried(clock: Clock) -> None:
    balancer = over(clock, Location("near", zone="east"), Location("far", zone="west"), zone="east")

    assert balancer.choose().url == "near"
    assert balancer.choose(["near"]).url == "far"
    assert balancer.choose(["near", "far"]).url == "near"


def test_where_more_than_half_fail_no_zone_is_preferred(clock: Clock) -> None:
    balancer = over(clock, *EAST_AND_WEST, zone="west")

    for url in "wxy":
        fail(balancer, url, 5)
    got, _ = simulate(balancer, clock, lambda url: 0.02, lambda url: url in "wxy", rate=100, count=50)

    assert {"e1", "e2"} < set(got)


def test_a_zone_in_which_there_is_nobody_changes_nothing(clock: Clock) -> None:
    balancer = over(clock, *EAST_AND_WEST, zone="north")

    assert {call(balancer, clock) for _ in range(100)} == {"e1", "e2", "w", "x", "y"}


def test_those_who_have_gone_are_told_and_get_no_calls(clock: Clock) -> None:
    balancer = over(clock, "a", "b")

    assert [each.url for each in balancer.update(["b", "c"])] == ["a"]
    assert {call(balancer, clock) for _ in range(50)} == {"b", "c"}


def test_a_source_that_turns_empty_keeps_its_last_good_list(clock: Clock) -> None:
    balancer = over(clock, "a", "b")

    assert balancer.update([]) == []
    assert {call(balancer, clock) for _ in range(50)} == {"a", "b"}


def test_another_attempt_goes_elsewhere_while_there_is_another(clock: Clock) -> None:
    balancer = over(clock, "a", "b", "c", chooser="random")

    def next_ones(*tried: str) -> set[str]:
        return {balancer.choose(tried).url for _ in range(20)}

    assert next_ones("a") == {"b", "c"}
    assert next_ones("a", "c") == {"b"}
    assert next_ones("b", "c", "a") == {"b", "c"}
    assert next_ones("gone") == {"a", "b", "c"}
    assert over(clock, "a").choose(["a"]).url == "a"


def test_a_failure_is_charged_a_second_and_forgotten_as_time_goes_by(clock: Clock) -> None:
    instance = Instance(Location("a"), clock.now)
    for seconds, failed, latency in ((0.01, False, 0.01), (0.01, True, 1.0), (0.01, False, 1.0)):
        instance.begin(clock.now)
        instance.end(clock.now, seconds, failed=failed)
        assert instance.latency(clock.now) == latency

    assert instance.latency(clock.now + 10) == pytest.approx(0.37, abs=0.01)


def test_a_chooser_that_is_not_known_is_told_of(clock: Clock) -> None:
    with pytest.raises(ConfigurationError, match="no chooser 'best'; there are two-choices, "):
        over(clock, "a", chooser="best")
    with pytest.raises(ConfigurationError, match="users has no address"):
        over(clock)


@pytest.mark.asyncio
async def test_any_client_can_pick(clock: Clock) -> None:
    balancer = over(clock, "http://a", "http://b")

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "a":
            raise httpx.ConnectError("refused")
        return httpx.Response(200)

    failed = 0
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        for _ in range(200):
            clock.now += 0.01
            try:
                with balancer.pick() as picked:
                    response = await http.get(f"{picked.url}/users")
                    picked.failed = response.status_code >= 500
            except httpx.ConnectError:
                failed += 1

    assert 0 < failed <= 5
    assert [instance.pending for instance in balancer.instances.values()] == [0, 0]


def test_who_gives_up_says_nothing_of_the_instance(clock: Clock) -> None:
    balancer = over(clock, "a", "b")

    for _ in range(20):
        with pytest.raises(asyncio.CancelledError), balancer.pick():
            raise asyncio.CancelledError
    assert balancer.out == []

    for _ in range(20):
        with balancer.pick() as picked:
            picked.failed = True
    assert balancer.out != []


def test_what_a_caller_says_of_an_answer_counts_more_than_an_exception(clock: Clock) -> None:
    balancer = over(clock, "a", "b")

    def call(failed: bool | None) -> None:
        with balancer.pick() as picked:
            picked.failed = failed
            raise LookupError

    for _ in range(20):
        with pytest.raises(LookupError):
            call(failed=False)
    assert balancer.out == []

    for _ in range(20):
        with pytest.raises(LookupError):
            call(failed=None)
    assert balancer.out != []
