"""What settings say of the policies around a call, and the order in which they stand."""

from __future__ import annotations

from typing import Any

import pytest

from microservices.exceptions import ConfigurationError
from microservices.resilience.policies import Guard, Plan, merged


def names(guard: Guard, route: str) -> list[str]:
    return [type(middleware).__name__ for middleware in guard.chain(route)]


def guard(policies: dict[str, Any] | None = None, patterns: dict[str, Any] | None = None, kind: Any = None) -> Guard:
    plan = Plan("shop", policies or {}, patterns or {}, lambda route: kind)
    return Guard(plan, load=lambda path: lambda data, error: path)


def test_by_default_a_target_has_a_bulkhead_retries_and_a_breaker() -> None:
    assert names(guard(), "ask") == ["Bulkhead", "Retry", "Breaker"]


def test_all_of_them_stand_in_the_order_that_makes_sense_of_them() -> None:
    every = {"fallback": "own.fallback", "cache": 5, "coalesce": True, "hedge": True, "attempt_timeout": 1}

    assert names(guard(every, kind="safe"), "ask") == [
        "Fallback",
        "Bulkhead",
        "Cache",
        "Coalescing",
        "Retry",
        "Hedge",
        "Breaker",
        "AttemptTimeout",
    ]


def test_each_of_them_can_be_switched_off() -> None:
    assert names(guard({"capacity": 0, "retries": 0, "breaker": False}), "ask") == []


def test_what_is_for_safe_patterns_passes_over_the_others_of_its_target() -> None:
    every = {"cache": 5, "coalesce": True, "hedge": True}

    assert names(guard(every, kind="keyed"), "ask") == ["Bulkhead", "Retry", "Breaker"]


@pytest.mark.parametrize("policy", ["cache", "coalesce", "hedge"])
def test_for_a_pattern_that_is_not_safe_it_is_a_mistake(policy: str) -> None:
    with pytest.raises(ConfigurationError, match=f"shop ask: {policy} is for patterns that are safe"):
        Plan(
            "shop",
            {},
            {"ask": {policy: 1, "retry": "never"}} if policy == "cache" else {"ask": {policy: True, "retry": "never"}},
        )


def test_a_pattern_overrides_its_target_by_its_bare_name() -> None:
    plan = Plan("shop", {"deadline": 3, "retries": 1}, {"ask": {"deadline": 9, "retry": "safe"}})

    assert (plan.of('{"cmd":"ask"}').deadline, plan.of('{"cmd":"ask"}').retries) == (9, 1)
    assert plan.of('{"cmd":"ask"}').retry == "safe"
    assert plan.of("other").deadline == 3


def test_without_a_word_a_pattern_is_what_its_handler_declares_and_else_not_repeated() -> None:
    assert Plan("shop", {}, {}, lambda route: "keyed").of("ask").retry == "keyed"
    assert Plan("shop", {}, {}).of("ask").retry == "never"


def test_what_all_patterns_of_a_target_share_cannot_be_set_for_one() -> None:
    with pytest.raises(ConfigurationError, match="shop ask: capacity is for a service as a whole"):
        Plan("shop", {}, {"ask": {"capacity": 3}})


@pytest.mark.parametrize("wrong", [{"retrys": 1}, {"retries": -1}, {"retry": "sometimes"}, {"retry_share": 2}])
def test_a_mistake_is_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="policies: "):
        merged(wrong)


def test_the_patterns_of_a_target_share_its_bulkhead_its_budget_and_its_breaker() -> None:
    shared = guard()

    first, second = shared.chain("one"), shared.chain("two")

    assert first[0] is second[0] is shared.bulkhead
    assert first[2] is second[2] is shared.breaker
