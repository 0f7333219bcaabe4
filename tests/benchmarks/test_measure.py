"""What the figures are made of."""

from collections.abc import Callable, Iterator

import pytest

from tests.benchmarks.measure import Case, Sample, Side, measure


def running(*costs: float, answer: object = None, made: list[int] | None = None) -> Callable[[int], Sample]:
    """Make a side whose runs cost so much, one after the other and again."""
    turns: Iterator[float] = iter(costs * 20)

    def run(calls: int) -> Sample:
        if made is not None:
            made.append(calls)
        cost = next(turns)
        return Sample(rate=1000 / cost, cpu=cost, load=0.5, memory=30, p50=cost, p99=cost, answer=answer)

    return run


def test_a_row_is_the_median_and_how_it_compares_to_the_faster_nestjs() -> None:
    sides = [
        Side("NestJS 11", "", running(10)),
        Side("NestJS 12", "", running(8)),
        Side("ours", "all", running(2, 4, 9)),
    ]

    *_, ours = measure(Case("sums", 100, sides, warm_up=100), rounds=3)

    assert (ours.name, ours.on, ours.sample.cpu, ours.sample.rate) == ("ours", "all", 4, 250)
    assert (ours.cpu_ratio, ours.rate_ratio) == (2, 2)
    assert ours.spread == 1.25


def test_without_a_nestjs_the_first_side_is_what_the_others_compare_to() -> None:
    rows = measure(Case("shapes", 1, [Side("one", "", running(4)), Side("two", "", running(8))], warm_up=1), rounds=1)

    assert [row.cpu_ratio for row in rows] == [1, 0.5]


def test_sides_that_answer_differently_are_not_compared() -> None:
    sides = [Side("NestJS", "", running(1, answer=6)), Side("ours", "", running(1, answer=7))]

    with pytest.raises(RuntimeError, match="answer differently"):
        measure(Case("sums", 1, sides, warm_up=1), rounds=1)


def test_every_side_is_warm_before_the_first_round() -> None:
    made: list[int] = []

    measure(Case("sums", 4_000, [Side("NestJS", "", running(1, made=made))]), rounds=3)

    assert sum(made[:-3]) >= 12_000
    assert made[-3:] == [4_000] * 3
