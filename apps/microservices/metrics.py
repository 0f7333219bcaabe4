"""The page /metrics: what this process counts, how full its bounds are, and where its breakers stand."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache
from itertools import accumulate

from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern, path
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from . import instruments
from .client import clients
from .conf import get_settings, load
from .instruments import Bound
from .lifecycle import lifecycle
from .microservice import get_executor
from .packets import pattern_name
from .resilience.breaker import State

# operations.md section 4 has numbers for the first five; one that only observes lets everything through.
_STATES = {
    State.CLOSED: 0,
    State.HALF_OPEN: 1,
    State.OPEN: 2,
    State.FORCED_OPEN: 3,
    State.DISABLED: 4,
    State.OBSERVE: 4,
}


class Readings(Collector):
    """Reads everything when it is asked, so that nothing is kept up to date for nobody."""

    def collect(self) -> Iterator[Metric]:
        """Yield the counters, the bounds, and the policies of the clients on the running loop."""
        for counter in instruments.counters:
            counted = CounterMetricFamily(counter.name, counter.help, labels=counter.labels)
            for labels, value in counter.samples().items():
                counted.add_metric(labels, value)
            yield counted
        for histogram in instruments.histograms:
            measured = HistogramMetricFamily(histogram.name, histogram.help, labels=histogram.labels)
            for labels, (counts, total) in histogram.samples().items():
                bounds = [*map(str, histogram.buckets), "+Inf"]
                measured.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)
            yield measured
        yield from self._bounds()
        yield from self._policies()
        info = GaugeMetricFamily("microservices_build_info", "Always 1.", labels=("service", "python"))
        info.add_metric((get_settings().name, platform.python_version()), 1)
        yield info

    @staticmethod
    def _bounds() -> Iterator[Metric]:
        labels = ("service", "place")
        used = GaugeMetricFamily("microservices_bound_used", "How much of a bound is taken.", labels=labels)
        limit = GaugeMetricFamily("microservices_bound_limit", "How much it may be.", labels=labels)
        for service, bound in _bounds():
            used.add_metric((service, bound.place), bound.used)
            limit.add_metric((service, bound.place), bound.limit)
        yield used
        yield limit

    @staticmethod
    def _policies() -> Iterator[Metric]:
        source = get_settings().name
        states = GaugeMetricFamily(
            "microservices_breaker_state",
            "0 closed, 1 half-open, 2 open, 3 forced open, 4 disabled.",
            labels=("service", "target", "pattern"),
        )
        budgets = GaugeMetricFamily(
            "microservices_retry_budget_ratio", "Which part of it is left.", labels=("service", "target")
        )
        for target, client in clients.used.items():
            guard = client.guard
            if guard is None:
                continue
            budgets.add_metric((source, target), guard.budget.ratio)
            circuits = {} if guard.breaker is None else guard.breaker.circuits
            for (_, route), circuit in circuits.items():
                states.add_metric((source, target, pattern_name(route)), _STATES[circuit.state])
        yield states
        yield budgets


def _bounds() -> Iterator[tuple[str, Bound]]:
    settings = get_settings()
    for microservice in lifecycle.microservices:
        yield from ((microservice.name, bound) for bound in microservice.bounds)
    for target, client in clients.used.items():
        yield from ((target, bound) for bound in client.bounds)
    shared = [load(path) for path in {*settings.client_middleware, *settings.server_middleware}]
    for part in (get_executor(), *lifecycle.bounded, *shared):
        yield from ((settings.name, bound) for bound in getattr(part, "bounds", ()))


async def metrics(request: HttpRequest) -> HttpResponse:
    """Answer in the form that Accept asks for: Prometheus's own, or OpenMetrics."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return HttpResponse(encode(_registry()), content_type=content_type)


def metrics_urls() -> list[URLPattern]:
    """Return the route of the page."""
    return [path("metrics", metrics, name="metrics")]


@cache
def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Readings())
    ProcessCollector(registry=registry)
    return registry
