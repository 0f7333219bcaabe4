"""The events that the registry hears."""

from __future__ import annotations

import msgspec
import pytest

from microservices.discovery.registry import EVENTS, Report
from microservices.handlers import registry
from microservices.registry.consumers import RegistryConsumer
from microservices.registry.models import Instance

pytestmark = pytest.mark.django_db(databases=["default"])


def test_the_registry_hears_the_events_of_instances_in_each_of_its_processes() -> None:
    doors = {door.name: door.delivery for handler in registry.of("registry") for door in handler.doors}

    assert doors == dict.fromkeys(EVENTS, "each")


@pytest.mark.parametrize(
    ("event", "state"), [("instance_up", "up"), ("instance_draining", "draining"), ("instance_down", "down")]
)
def test_each_of_them_is_noted(event: str, state: str) -> None:

    [handler] = [h for h in registry.of("registry") if h.function.__name__ == event]
    consumer = RegistryConsumer()
    consumer.instance_up(Report("users", "a", start="s", sequence=1))
    body = {"service": "users", "instance": "a", "start": "s", "sequence": 2, "state": state, "later": True}

    handler.function(consumer, handler.convert(msgspec.Raw(msgspec.json.encode(body))))

    assert Instance.objects.get().state == state
    assert Instance.objects.get().sequence == 2
