"""The policies around a call, in their order: what settings say, and what is folded from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from ..exceptions import ConfigurationError
from ..handlers import Retry as Kind
from ..middleware import Middleware
from ..packets import pattern_name
from .breaker import Breaker
from .bulkhead import Bulkhead
from .cache import Cache, Coalescing
from .fallback import Fallback
from .hedge import Hedge
from .retry import Budget, Retry
from .timeout import AttemptTimeout

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Policies(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What stands around the calls to a service, or of one pattern; times in seconds, 0 for "not at all".

    The defaults, and the order, are those of operations.md section 1.
    """

    deadline: Seconds = 0
    """How long a call may take in all; without it CALL_TIMEOUT."""
    attempt_timeout: Seconds = 0
    """How long one attempt may take, so that a retry has time left."""
    retry: Kind | None = None
    """What a repeated call would do: "safe", "keyed" or "never"; without it what a handler that is here declares."""
    retries: Count = 2
    retry_delay: Seconds = 0.05
    retry_share: Share = 0.2
    retry_floor: Seconds = 3
    """Retries a target may cost: a share of its calls, and so many a second beside them."""
    capacity: Count = 100
    """How many calls a target may have at a time; 0 for any number."""
    queue: Count = 50
    breaker: bool = True
    cache: Seconds = 0
    """For how long an answer is kept; of safe patterns only."""
    cache_size: Count = 1000
    coalesce: bool = False
    hedge: bool = False
    fallback: str = ""
    """The dotted path of `fallback(data, error)`."""


OF_TARGET = ("retry_share", "retry_floor", "capacity", "queue", "breaker")
"""What all patterns of a target share, so that it cannot be set for one of them."""
ONLY_SAFE = ("cache", "coalesce", "hedge")
"""What is for safe patterns alone, and passes over the others of its target."""


def merged(*given: Mapping[str, Any]) -> Policies:
    """Return the policies of several mappings, the later ones winning. Raises ConfigurationError."""
    try:
        return msgspec.convert({key: value for each in given for key, value in each.items()}, Policies)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"policies: {error}") from error


class Plan:
    """What settings say about the calls to one target.

    `policies` are those of the target, `patterns` what single ones say beside them, by their names; `kinds`
    gives the `retry` that a pattern's handler declares, by its route. Raises ConfigurationError.
    """

    def __init__(
        self,
        target: str,
        policies: Mapping[str, Any],
        patterns: Mapping[str, Mapping[str, Any]],
        kinds: Callable[[str], Kind | None] = lambda route: None,
    ) -> None:
        self.target = target
        self.common = merged(policies)
        self._kinds = kinds
        self._patterns = {name: self._pattern(name, policies, given) for name, given in patterns.items()}

    def of(self, route: str) -> Policies:
        """Return the policies of a pattern, with its `retry` known."""
        found = self._patterns.get(pattern_name(route), self.common)
        return msgspec.structs.replace(found, retry=found.retry or self._kinds(route) or "never")

    def _pattern(self, name: str, common: Mapping[str, Any], given: Mapping[str, Any]) -> Policies:
        policies = merged(common, given)
        if of_target := [key for key in OF_TARGET if key in given]:
            raise ConfigurationError(f"{self.target} {name}: {of_target[0]} is for a service as a whole.")
        unsafe = policies.retry in ("keyed", "never")
        if unsafe and (wrong := [key for key in ONLY_SAFE if given.get(key)]):
            raise ConfigurationError(f"{self.target} {name}: {wrong[0]} is for patterns that are safe.")
        return policies


class Guard:
    """The policies of one client at work: what its target shares, and a chain for each pattern.

    `source` is what this process calls itself, and `load` gives what a dotted path names.
    """

    def __init__(self, plan: Plan, *, source: str = "", load: Callable[[str], Any]) -> None:
        self.plan = plan
        self._source = source
        self._load = load
        common = plan.common
        self.budget = Budget(common.retry_share, common.retry_floor)
        self.bulkhead = Bulkhead(plan.target, common.capacity, common.queue) if common.capacity else None
        self.breaker = Breaker(source=source) if common.breaker else None

    def chain(self, route: str) -> list[Middleware]:
        """Return the middlewares around the requests of a pattern, the outermost first."""
        policies = self.plan.of(route)
        safe = policies.retry == "safe"
        fallback = self._load(policies.fallback) if policies.fallback else None
        retry = Retry(
            self.budget,
            policies.retry or "never",
            source=self._source,
            times=policies.retries,
            delay=policies.retry_delay,
        )
        wanted: list[Middleware | None] = [
            Fallback(fallback) if fallback else None,
            self.bulkhead,
            Cache(policies.cache, policies.cache_size) if policies.cache and safe else None,
            Coalescing() if policies.coalesce and safe else None,
            retry if policies.retries else None,
            Hedge(self.budget) if policies.hedge and safe else None,
            self.breaker,
            AttemptTimeout(policies.attempt_timeout) if policies.attempt_timeout else None,
        ]
        return [middleware for middleware in wanted if middleware is not None]
