"""The work that goes on behind the list: what it does each second, and on which thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from microservices.lifecycle import lifecycle
from microservices.registry import services, sweep
from microservices.registry.models import Instance
from microservices.registry.probe import Outcome

pytestmark = pytest.mark.asyncio


class Enough(Exception):
    """Ends a sweep."""


class Calls:
    """Takes the place of services.py and of probe.py, and notes what they are asked."""

    def __init__(self, suspects: list[Instance]) -> None:
        self.suspects = suspects
        self.threads: set[threading.Thread] = set()
        self.since: list[Any] = []
        self.probed: list[Any] = []
        self.trimmed = 0

    def swept(self, *, now: Any, listening_since: Any) -> list[Instance]:
        self.threads.add(threading.current_thread())
        self.since.append(listening_since)
        return self.suspects

    def noted(self, *, instance: Instance, passed: bool, text: str) -> None:
        self.threads.add(threading.current_thread())
        self.probed.append((instance.name, passed, text))

    def trim(self, *, now: Any) -> int:
        self.threads.add(threading.current_thread())
        self.trimmed += 1
        return 0


async def rounds(count: int, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sweep so many times; return the pauses in between."""
    monkeypatch.setattr(services, "instances_swept", calls.swept)
    monkeypatch.setattr(services, "instance_probed", calls.noted)
    monkeypatch.setattr(services, "journal_trimmed", calls.trim)

    async def probe_all(addresses: list[dict[str, str]], allowed: Any) -> list[Outcome]:
        return [Outcome(False, each["health"]) for each in addresses]

    monkeypatch.setattr(sweep, "probe_all", probe_all)
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == count:
            raise Enough

    with pytest.raises(Enough):
        await sweep.sweep(pause)
    return pauses


async def test_each_second_the_silent_are_looked_for_and_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls([Instance(name="a", addresses={"health": "A"}), Instance(name="b", addresses={"health": "B"})])

    pauses = await rounds(2, calls, monkeypatch)

    assert pauses == [1, 1]
    assert calls.probed == [("a", False, "A"), ("b", False, "B")] * 2
    assert len(set(calls.since)) == 1


async def test_no_query_is_made_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls([Instance(name="a", addresses={"health": "A"})])

    await rounds(1, calls, monkeypatch)

    assert calls.threads
    assert threading.current_thread() not in calls.threads


async def test_the_journal_is_trimmed_at_the_start_and_not_with_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls([])

    await rounds(5, calls, monkeypatch)

    assert calls.trimmed == 1


async def test_a_process_that_installs_the_registry_sweeps_once() -> None:
    assert lifecycle.background.count(sweep.sweep) == 1
