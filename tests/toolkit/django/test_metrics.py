"""The page /metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from django.test import AsyncClient
from prometheus_client.parser import text_string_to_metric_families

from microservices import RpcContext, RpcException, clients, message_pattern
from microservices.instruments import dropped
from microservices.lifecycle import lifecycle

Install = Callable[..., None]

pytestmark = pytest.mark.asyncio


@message_pattern("ask", retry="safe")
async def ask(data: Any, context: RpcContext) -> Any:
    if data == "fail":
        raise RpcException({"statusCode": 500, "message": "broken"})
    return data


@pytest_asyncio.fixture
async def shop(install: Install, free_port: int, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A process with one service behind a door."""
    install(url=f"tcp://127.0.0.1:{free_port}", shop=[ask])
    monkeypatch.setattr(lifecycle, "background", [])
    monkeypatch.setattr(lifecycle, "bounded", [])  # the gates of applications that other tests have made
    await lifecycle.start()
    yield
    await lifecycle.drain()
    await lifecycle.stop()


class Readings:
    """What the page has told: `readings(name, label=...)` gives the values whose labels are these, by the others."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        told = [(sample.name, *sorted(sample.labels.items())) for sample in self._samples]
        assert len(told) == len(set(told)), "a sample is told twice"

    def __call__(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        return {
            tuple(value for label, value in sorted(sample.labels.items()) if label not in labels): sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }


async def read() -> Readings:
    answer = await AsyncClient().get("/metrics")
    assert answer.status_code == 200
    assert answer["content-type"].startswith("text/plain; version=")
    return Readings(answer.content.decode())


async def test_what_is_dropped_is_counted_by_its_place_and_reason() -> None:
    lost = {"service": "shop", "place": "tcp", "reason": "no-packet"}
    before = (await read())("microservices_dropped_total", **lost).get((), 0)

    dropped.add("shop", "tcp", "no-packet")

    assert (await read())("microservices_dropped_total", **lost) == {(): before + 1}


@pytest.mark.usefixtures("shop")
async def test_every_bound_tells_how_full_it_is() -> None:
    await clients["shop"].send("ask", 1)

    readings = await read()

    used, limit = (readings(f"microservices_bound_{what}", service="shop") for what in ("used", "limit"))
    assert used.keys() == limit.keys()
    assert {place for (place,) in limit} == {
        *("tcp", "tcp-connections", "limiter", "limiter-queue"),
        *("threads", "pending", "connecting", "bulkhead", "bulkhead-queue"),
    }
    assert limit["tcp-connections",] == 1024
    assert all(used[place] <= limit[place] for place in limit)


@pytest.mark.usefixtures("shop")
async def test_breakers_and_budgets_tell_where_they_stand() -> None:
    await clients["shop"].send("ask", 1)
    healthy = await read()
    for _ in range(10):
        with pytest.raises(RpcException):
            await clients["shop"].send("ask", "fail")
    failing = await read()

    circuit = {"target": "shop", "pattern": "ask"}
    assert list(healthy("microservices_breaker_state", **circuit).values()) == [0]
    assert list(failing("microservices_breaker_state", **circuit).values()) == [2]
    assert list(healthy("microservices_retry_budget_ratio", target="shop").values()) == [1]
    turned = failing("microservices_breaker_transitions_total", **circuit, **{"from": "closed", "to": "open"})
    assert sum(turned.values()) >= 1


async def test_whoever_asks_for_openmetrics_is_given_that() -> None:
    answer = await AsyncClient().get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})

    assert answer["content-type"].startswith("application/openmetrics-text")
    assert answer.content.endswith(b"# EOF\n")
