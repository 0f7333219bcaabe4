"""Which instance of a service gets a call, and which gets none for a while (operations.md section 2)."""

from __future__ import annotations

import logging
import random
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Sequence

from ..exceptions import ConfigurationError
from ..instruments import Counter
from . import choosers
from .instances import WEIGHTS, Instance, Location

logger = logging.getLogger("microservices.balancer")

ejections = Counter(
    "microservices_endpoint_ejections_total",
    "How often an instance was left out for a while.",
    ("service", "target", "reason"),
)

_IN_A_ROW = 5
_LEAST_CALLS = 10
_FAILURE_RATE = 0.5
_FIRST, _MOST = 1.0, 30.0
"""For how many seconds an instance is left out at first, and at most when it fails again and again."""

# Whoever gives up says nothing of the instance.
_GIVEN_UP = (CancelledError, GeneratorExit, KeyboardInterrupt)


class Balancer:
    """Chooses among the instances of a service, and leaves out those that fail.

    Five failures in a row, or more than half of ten or more calls in ten seconds, put an instance out for a
    second, then for two, four, up to thirty; after that one call tries it. At most half of all are out: beyond
    that it is not they who are ill, and all are used. `chooser` is a name of `choosers.CHOOSERS`, `source` what
    this process calls itself. `instances` are URLs, or Locations where they differ in weight or zone; those of the
    caller's own `zone` get its calls, or as many of them as they have capacity for. Raises ConfigurationError
    for no instances, and for a weight that is not a whole number from 1 to 100.
    """

    def __init__(
        self,
        target: str,
        instances: Iterable[str | Location],
        *,
        chooser: str = "two-choices",
        zone: str = "",
        source: str = "",
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.target = target
        self.clock = clock
        self._source = source
        self._zone = zone
        rng = rng or random.Random()  # noqa: S311 - spreads calls
        self._chance = rng.random
        self._choose = choosers.find(chooser)(rng)
        now = clock()
        self.instances = {url: Instance(location, now) for url, location in _located(instances).items()}
        if not self.instances:
            raise ConfigurationError(f"{target} has no address.")
        self._panic = False
        self._usable: Sequence[Instance]
        """Those that get calls, as often as their weights say; of the own zone alone, where calls stay in it."""
        self._everywhere: Sequence[Instance]
        self._beyond: Sequence[Instance] = ()
        """Those of zones with room, to which calls go that do not stay in their own."""
        self._staying: float
        """The share of calls that stay."""
        self._review(now)

    # The instances

    def update(self, instances: Iterable[str | Location]) -> list[Instance]:
        """Take these instances for all there are, and return those that have gone; none at all is no news.

        One that is new gets its share within ten seconds, so that it is not flooded while it is cold.
        Raises ConfigurationError for a weight that is not a whole number from 1 to 100.
        """
        known, now = self.instances, self.clock()
        wanted = _located(instances)
        if not wanted:
            return []
        latency = sum(each.latency(now) for each in known.values()) / len(known)
        self.instances = {}
        for url, location in wanted.items():
            instance = known.get(url) or Instance(location, now, latency, fresh=True)
            instance.weight, instance.zone = location.weight, location.zone
            self.instances[url] = instance
        self._review(now)
        return [instance for url, instance in known.items() if url not in wanted]

    @property
    def out(self) -> list[Instance]:
        """Those that get no calls."""
        return [each for each in self.instances.values() if each.out]

    # A call

    def choose(self, tried: Sequence[str] = (), *, timed: bool = True) -> Instance:
        """Return the instance for a call that begins now; `done` must follow.

        Another than those whose URLs are `tried` already, while there is one, and then another than the last of
        them. What is not `timed` is no load, as a stream on which nothing comes for hours.
        """
        now = self.clock()
        usable = self._usable
        if now >= self._review_at:
            trial = self._review(now)
            usable = self._usable
            if trial is not None and trial.url not in tried:
                return self._try(trial, now, timed)
        if tried:
            everywhere = self._everywhere
            usable = (
                [each for each in usable if each.url not in tried]
                or [each for each in everywhere if each.url not in tried]
                or [each for each in everywhere if each.url != tried[-1]]
                or usable
            )
        elif self._staying < 1 and self._chance() >= self._staying:
            usable = self._beyond
        instance = usable[0] if len(usable) == 1 else self._choose(usable, now)
        if instance.warm_at > now and self._chance() > instance.share(now):
            warm = self._warm(usable, tried, now) or self._warm(self._everywhere, tried, now)
            if warm:
                instance = warm[0] if len(warm) == 1 else self._choose(warm, now)
        if timed:
            instance.begin(now)
        return instance

    def done(self, instance: Instance, began: float, failed: bool | None, *, timed: bool = True) -> None:
        """Note that a call has ended which began then; `failed` is None where its end says nothing of the instance."""
        now = self.clock()
        if failed is None:
            if timed:
                instance.leave()
            if instance.trying and began >= instance.out_since:
                instance.out_until = self._review_at = now  # the next call tries it
        else:
            if timed:
                instance.end(now, now - began, failed=failed)
            elif failed:
                instance.begin(now)
                instance.end(now, 0, failed=True)
            if instance.out:
                self._learn(instance, now, began, failed=failed)
            elif failed:
                self._judge(instance, now)

    def pick(self, tried: Sequence[str] = ()) -> Pick:
        """Return a context manager around a call by any client: `with balancer.pick() as picked: ...picked.url...`.

        An exception is a failure, unless it is a cancellation; what is said by `picked.failed = ...` counts more.
        """
        return Pick(self, self.choose(tried))

    @staticmethod
    def _warm(instances: Sequence[Instance], tried: Sequence[str], now: float) -> list[Instance]:
        return [each for each in instances if each.warm_at <= now and each.url not in tried]

    # Health

    def _try(self, instance: Instance, now: float, timed: bool) -> Instance:
        instance.trying = True
        instance.out_until = now + _MOST  # if its end is not heard of until then, another call tries it
        self._review(now)
        if timed:
            instance.begin(now)
        return instance

    def _learn(self, instance: Instance, now: float, began: float, *, failed: bool) -> None:
        # What began before it was left out says nothing new; where all fail, any call tries it.
        if began < instance.out_since or not (instance.trying or self._panic):
            return
        if not failed:
            logger.info("%s: %s answers again", self.target, instance.url)
            instance.admit(now)
            self._review(now)
        elif instance.trying:
            self._eject(instance, now, "trial")

    def _judge(self, instance: Instance, now: float) -> None:
        if instance.failures_in_a_row >= _IN_A_ROW:
            self._eject(instance, now, "failures-in-a-row")
            return
        calls, failures = instance.counted(now)
        if calls >= _LEAST_CALLS and failures > calls * _FAILURE_RATE:
            self._eject(instance, now, "failure-rate")

    def _eject(self, instance: Instance, now: float, reason: str) -> None:
        if now - instance.out_until > _MOST:
            instance.ejections = 0  # it was well for long
        period = min(_MOST, _FIRST * 2**instance.ejections)
        instance.ejections = min(instance.ejections + 1, 8)
        instance.out, instance.trying = True, False
        instance.out_since, instance.out_until = now, now + period
        ejections.add(self._source, self.target, reason)
        logger.warning("%s: %s is left out for %g s (%s)", self.target, instance.url, period, reason)
        self._review(now)

    def _review(self, now: float) -> Instance | None:
        """See who gets calls; return one that has been out for its time, for a call to try it."""
        everyone = list(self.instances.values())
        least = min(each.weight for each in everyone)
        for each in everyone:
            each.size = each.weight / least
        well = [each for each in everyone if not each.out]
        panic = len(everyone) > 1 and len(well) * 2 < len(everyone)
        if panic and not self._panic:
            logger.warning("%s: more than half of its instances fail; all are used", self.target)
        self._panic = panic
        usable = everyone if panic or not well else well
        self._everywhere = self._usable = choosers.lots(usable)
        self._staying = 1.0
        if self._zone and not panic:
            self._stay(usable)
        ends = [each.out_until for each in everyone if each.out]
        due = [each for each in everyone if each.out and each.out_until <= now]
        self._review_at = now if due else min(ends, default=float("inf"))
        return due[0] if due else None

    def _stay(self, usable: list[Instance]) -> None:
        # As many callers are taken to be in each zone. Where the own one has less capacity than its share, a part of
        # its calls goes to zones that have more than theirs.
        capacity = dict.fromkeys((each.zone for each in self.instances.values()), 0)
        for each in usable:
            capacity[each.zone] += each.weight
        share = sum(capacity.values()) / len(capacity)
        if own := [each for each in usable if each.zone == self._zone]:
            self._usable = choosers.lots(own)
            self._beyond = choosers.lots([each for each in usable if capacity[each.zone] > share])
            self._staying = capacity[self._zone] / share


def _located(instances: Iterable[str | Location]) -> dict[str, Location]:
    locations = [Location(each) if isinstance(each, str) else each for each in instances]
    if wrong := [each for each in locations if type(each.weight) is not int or each.weight not in WEIGHTS]:
        raise ConfigurationError(f"{wrong[0].url}: weight is a whole number from 1 to 100.")
    return {each.url: each for each in locations}


class Pick:
    """An instance for one call."""

    __slots__ = ("_balancer", "_began", "failed", "instance", "url")

    def __init__(self, balancer: Balancer, instance: Instance) -> None:
        self._balancer = balancer
        self._began = balancer.clock()
        self.instance = instance
        self.url = instance.url
        self.failed: bool | None = None
        """Whether the instance has failed, where the caller knows: an answer of 500 and above, and not of 4xx."""

    def __enter__(self) -> Pick:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = self.failed
        if failed is None and (kind is None or not issubclass(kind, _GIVEN_UP)):
            failed = kind is not None
        self._balancer.done(self.instance, self._began, failed)
