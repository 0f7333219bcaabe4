"""Which of several instances gets the next call. What an instance costs is measured elsewhere: instances.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import count
from math import gcd
from operator import itemgetter

from ..exceptions import ConfigurationError
from .instances import Instance

Chooser = Callable[[Sequence[Instance], float], Instance]
"""Given two or more `lots` and the time, returns the instance of one of them."""


def lots(instances: Sequence[Instance]) -> Sequence[Instance]:
    """Return each instance as often as its weight says, well mixed: whoever draws from them draws by weight."""
    unit = gcd(*(each.weight for each in instances))
    if all(each.weight == unit for each in instances):
        return instances
    dealt = ((turn * unit / each.weight, each) for each in instances for turn in range(each.weight // unit))
    return [each for _, each in sorted(dealt, key=itemgetter(0))]


def two_choices(rng: random.Random) -> Chooser:
    """Return a chooser of the one with less load of any two: nearly as good as the least of all, and no herd."""
    chance = rng.random

    def choose(instances: Sequence[Instance], now: float) -> Instance:
        many = len(instances)
        first = int(chance() * many)
        second = int(chance() * (many - 1))
        one, other = instances[first], instances[second + (second >= first)]
        return one if one.load(now) <= other.load(now) else other

    return choose


def pending(rng: random.Random) -> Chooser:
    """Return a chooser of the one with fewer calls under way for its weight, of any two."""

    def choose(instances: Sequence[Instance], now: float) -> Instance:
        one, other = rng.sample(instances, 2)
        return one if one.pending * other.weight <= other.pending * one.weight else other

    return choose


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
