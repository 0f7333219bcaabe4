"""Reports, instances, and a clock that moves when a test says so."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from django.utils import timezone

from microservices.discovery.registry import Report
from microservices.registry.models import Instance
from microservices.registry.services import instance_reported


class Clock:
    """What `timezone.now` says."""

    def __init__(self) -> None:
        self.now = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC)

    def __call__(self) -> datetime.datetime:
        return self.now

    def ticks(self, seconds: float) -> datetime.datetime:
        """Let time pass."""
        self.now += datetime.timedelta(seconds=seconds)
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stop the registry's clock."""
    clock = Clock()
    monkeypatch.setattr(timezone, "now", clock)
    return clock


def reported(service: str = "users", instance: str = "a", **facts: Any) -> Instance | None:
    """Have an instance report itself; return what is kept of it."""
    facts = {"start": "start-1", "sequence": 1, "pid": 42, "host": "box", "version": "1.0.0"} | facts
    instance_reported(report=Report(service, instance, **facts))
    return Instance.objects.filter(service__name=service, name=instance).first()


def known(service: str = "users", instance: str = "a", **facts: Any) -> Instance:
    """Have an instance report itself, and be sure that it is kept."""
    found = reported(service, instance, **facts)
    assert found is not None
    return found
