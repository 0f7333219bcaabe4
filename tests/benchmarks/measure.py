"""Cases in turn, round after round: what each side costs, and how that compares."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

WARM_UP = 12_000


class Sample(NamedTuple):
    """What one run of a side took."""

    rate: float
    """Calls a second."""
    cpu: float
    """Microseconds on a core a call, of what is measured."""
    load: float
    """The part of its core that the other end of the calls was busy: near 1, that end is what is measured."""
    memory: float
    """Resident megabytes."""
    p50: float | None = None
    """Milliseconds."""
    p99: float | None = None
    answer: object = None


class Side(NamedTuple):
    """One of those that are compared."""

    name: str
    on: str
    """What it does for each call beside the work."""
    run: Callable[[int], Sample]
    """Makes as many calls."""


class Case(NamedTuple):
    """One way to call all sides."""

    name: str
    calls: int
    sides: Sequence[Side]
    warm_up: int = WARM_UP


class Row(NamedTuple):
    """The medians of one side, and how it compares to the faster NestJS, else to the first side: above 1 is better."""

    name: str
    on: str
    sample: Sample
    rate_ratio: float
    cpu_ratio: float
    spread: float
    """The largest deviation of its CPU from the median, as a part of that."""


def measure(case: Case, rounds: int) -> list[Row]:
    """Run all sides of a case in turn, and return their medians. Raises RuntimeError where they answer differently."""
    answers: dict[str, object] = {}
    warm_up = case.warm_up
    for side in case.sides:
        answers[side.name] = side.run(min(warm_up, case.calls)).answer
        for _ in range(warm_up // case.calls):  # a case with few calls needs several runs to warm up
            side.run(case.calls)
    if len({repr(answer) for answer in answers.values()}) > 1:
        raise RuntimeError(f"{case.name}: the sides answer differently: {answers}")
    samples: dict[str, list[Sample]] = {side.name: [] for side in case.sides}
    for _ in range(rounds):
        for side in case.sides:
            samples[side.name].append(side.run(case.calls))
    medians = {name: _median(taken) for name, taken in samples.items()}
    peers = [sample for name, sample in medians.items() if name.startswith("NestJS")] or [medians[case.sides[0].name]]
    return [
        Row(
            side.name,
            side.on,
            median := medians[side.name],
            median.rate / max(peer.rate for peer in peers),
            min(peer.cpu for peer in peers) / median.cpu,
            max(abs(sample.cpu - median.cpu) for sample in samples[side.name]) / median.cpu,
        )
        for side in case.sides
    ]


def _median(samples: Sequence[Sample]) -> Sample:
    def of(name: str) -> float | None:
        values = [value for sample in samples if (value := getattr(sample, name)) is not None]
        return statistics.median(values) if values else None

    return Sample(*(of(name) for name in Sample._fields[:-1]))  # type: ignore[arg-type]
