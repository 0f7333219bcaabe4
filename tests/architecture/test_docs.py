"""What the documentation says of options is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from microservices.transports import SCHEMES, load, parse

PAGE = (Path(__file__).parents[2] / "docs" / "transports.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "memory"])
def test_every_option_of_a_transport_is_documented(scheme: str) -> None:
    address = parse(f"{scheme}://localhost:1")
    roles = [role for role in ("server", "client", "bus", "listener") if getattr(SCHEMES[scheme], role)]
    documented = set(re.findall(r"`(\w+)`", PAGE))

    options = {field.name for role in roles for field in msgspec.structs.fields(load(address, role).Options)}

    assert options - documented == set()


@pytest.mark.parametrize("scheme", ["nats", "mqtt", "amqp", "kafka"])
def test_every_option_of_a_message_is_documented(scheme: str) -> None:
    address = parse(f"{scheme}://localhost:1")
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{scheme}://` | `") and "headers" in line)
    documented = set(re.findall(r"`(\w+)`", line))

    options = {field.name for field in msgspec.structs.fields(load(address, "client").Record)}

    assert documented <= options
    assert options - documented == set() or "..." in line
