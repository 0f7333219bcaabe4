"""What callers in other processes are told of a repetition is what the handlers say."""

from __future__ import annotations

import pytest

from config import fleet
from microservices.handlers import registry
from microservices.packets import pattern_name


@pytest.mark.parametrize("service", fleet.SERVICES)
def test_the_map_says_of_each_pattern_what_its_handler_says(service: str) -> None:
    doors = [door for handler in registry.of(service) for door in handler.doors if door.kind == "request"]

    declared = {pattern_name(door.route): door.retry for door in doors if door.retry != "never"}

    assert fleet.RETRY[service] == declared
