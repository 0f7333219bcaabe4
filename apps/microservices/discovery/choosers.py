"""Which of several instances gets the next call. What an instance costs is measured elsewhere: instances.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import count
from math import gcd

from ..exceptions import ConfigurationError
from .instances import Instance

Chooser = Callable[[Sequence[Instance], float], Instance]
"""Given `lots` of two or more instances and the time, returns one of them."""

_CLEARLY = 2.0
_GOLDEN = 0.618


def lots(instances: Sequence[Instance]) -> Sequence[Instance]:
    """Return each instance as often as its weight says, well mixed: whoever draws from them draws by weight."""
    unit = gcd(*(each.weight for each in instances))
    if all(each.weight == unit for each in instances):
        return instances
    # Each at even distances, and none where the others begin.
    dealt = [
        ((turn + place * _GOLDEN % 1) * unit / each.weight, place)
        for place, each in enumerate(instances)
        for turn in range(each.weight // unit)
    ]
    return [instances[place] for _, place in sorted(dealt)]


def two_choices(rng: random.Random) -> Chooser:
    """Return a chooser of the one with less load of any two: nearly as good as the least of all, and no herd."""
    return _of_two(rng, Instance.load)


def pending(rng: random.Random) -> Chooser:
    """Return a chooser of the one with fewer calls under way, of any two."""
    return _of_two(rng, Instance.crowd)


def in_turn(rng: random.Random) -> Chooser:
    """Return a chooser of one after the other."""
    turns = count(rng.randrange(1 << 16))  # not all clients begin with the same one

    def choose(instances: Sequence[Instance], now: float) -> Instance:
        return instances[next(turns) % len(instances)]

    return choose


def any_one(rng: random.Random) -> Chooser:
    """Return a chooser of any."""

    def choose(instances: Sequence[Instance], now: float) -> Instance:
        return rng.choice(instances)

    return choose


def _of_two(rng: random.Random, cost: Callable[[Instance, float], float]) -> Chooser:
    chance = rng.random

    def choose(instances: Sequence[Instance], now: float) -> Instance:
        many = len(instances)
        first = int(chance() * many)
        second = int(chance() * (many - 1))
        one, other = instances[first], instances[second + (second >= first)]
        if one is other:  # two lots of a heavy one
            others = [each for each in instances if each is not one] or [one]
            other = others[int(chance() * len(others))]
        # The first is drawn by weight: to take a lighter or heavier one for a trifle would make them equals.
        margin = 1 if one.weight == other.weight else _CLEARLY
        return one if cost(one, now) <= margin * cost(other, now) else other

    return choose


CHOOSERS: dict[str, Callable[[random.Random], Chooser]] = {
    "two-choices": two_choices,
    "pending": pending,
    "round-robin": in_turn,
    "random": any_one,
}
"""By the name that settings have for them."""


def find(name: str) -> Callable[[random.Random], Chooser]:
    """Return what makes the chooser of this name. Raises ConfigurationError."""
    if name not in CHOOSERS:
        raise ConfigurationError(f"There is no chooser {name!r}; there are {', '.join(CHOOSERS)}.")
    return CHOOSERS[name]
