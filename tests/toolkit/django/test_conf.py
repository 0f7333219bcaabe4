"""The MICROSERVICES setting: its defaults, and what is said of a mistake in it."""

from __future__ import annotations

from typing import Any

import pytest
from pytest_django import Settings

from microservices import ConfigurationError
from microservices.conf import Service, address, addresses, events_address, get_settings, load
from microservices.telemetry.logging import CallLog

made: list[Made] = []


class Made:
    """Counts how often it is made."""

    def __init__(self) -> None:
        made.append(self)


def plain() -> None:
    """A function to be named by its path."""


def test_everything_has_a_default(settings: Settings) -> None:
    settings.MICROSERVICES = {}

    assert (get_settings().clients, get_settings().servers) == ({}, {})
    assert get_settings().units_of_work == ["microservices.db.fresh_connections"]


def test_a_project_without_the_setting_has_the_defaults(settings: Settings) -> None:
    settings.MICROSERVICES = {}
    given = get_settings()
    del settings.MICROSERVICES

    assert get_settings() == given


def test_what_is_given_is_taken(settings: Settings) -> None:
    settings.MICROSERVICES = {"NAME": "gateway", "CLIENTS": {"users": {"url": "tcp://u:1"}}, "CALL_TIMEOUT": 3}

    found = get_settings()

    assert (found.name, found.call_timeout) == ("gateway", 3.0)
    assert found.clients == {"users": Service(url="tcp://u:1", health=None)}


def test_the_setting_is_read_once(settings: Settings) -> None:
    settings.MICROSERVICES = {}

    assert get_settings() is get_settings()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        pytest.param({"CLIENT": {}}, "MICROSERVICES has no 'CLIENT': did you mean 'CLIENTS'?", id="nearly a key"),
        pytest.param(
            {"call_timeout": 1}, "MICROSERVICES has no 'call_timeout': known are NAME, CLIENTS, ", id="no key"
        ),
        pytest.param({"THREADS": "8"}, "MICROSERVICES: Expected `int`, got `str` - at `$.THREADS`", id="type"),
        pytest.param({"LISTEN": 1}, "MICROSERVICES: Expected `bool`, got `int` - at `$.LISTEN`", id="no bool"),
        pytest.param(
            {"SERVER_MIDDLEWARE": [CallLog]},
            "MICROSERVICES: Expected `str`, got `type` - at `$.SERVER_MIDDLEWARE[0]`",
            id="a class for its path",
        ),
        pytest.param(
            {"CLIENTS": {"users": "tcp://u:1"}},
            "MICROSERVICES: Expected `object`, got `str` - at `$.CLIENTS",
            id="place",
        ),
        pytest.param(
            {"CLIENTS": {"users": {"url": "tcp://u:1", "port": 1}}},
            "MICROSERVICES: Object contains unknown field `port` - at `$.CLIENTS",
            id="a field of a place",
        ),
        pytest.param(
            {"CLIENTS": {"users": {"url": "tcp://u:1,tcp://v:1", "balance": "best"}}},
            "There is no chooser 'best'; there are two-choices, pending, round-robin, random.",
            id="no chooser",
        ),
        pytest.param(
            {"SERVERS": {"users": {}}},
            "MICROSERVICES: Object missing required field `url` - at `$.SERVERS",
            id="a place without a URL",
        ),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(settings: Settings, given: dict[str, Any], text: str) -> None:
    settings.MICROSERVICES = given

    with pytest.raises(ConfigurationError) as caught:
        get_settings()

    assert str(caught.value).startswith(text)


def test_a_class_is_made_once_for_all_who_name_it() -> None:
    made.clear()

    first, second = load(f"{__name__}.Made"), load(f"{__name__}.Made")

    assert first is second
    assert made == [first]


def test_a_function_is_taken_as_it_is() -> None:
    assert load(f"{__name__}.plain") is plain


@pytest.mark.parametrize("path", ["nowhere.Thing", "microservices.db.fresh_connection", "Thing"])
def test_a_path_that_leads_nowhere_is_named(path: str) -> None:
    with pytest.raises(ConfigurationError, match=f"MICROSERVICES names {path!r}: "):
        load(path)


def test_a_transport_is_told_by_a_dict_what_it_may_be_told_by_a_url() -> None:
    found = address("tcp://u:1?idle_timeout=5", {"idle_timeout": 7, "max_in_flight": 8})

    assert found.options == {"idle_timeout": "5", "max_in_flight": 8}  # the URL is nearer to whoever operates it


def test_a_service_may_be_at_several_addresses_which_are_told_the_same() -> None:
    found = addresses("tcp://u:1,tcp://[::1]:2?max_in_flight=9, tcp://w:3", {"max_in_flight": 8})

    assert [str(each) for each in found] == ["tcp://u:1", "tcp://[::1]:2", "tcp://w:3"]
    assert [each.options["max_in_flight"] for each in found] == [8, "9", 8]


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("nats://u,nats://v", "nats:// is a broker's, which deals calls out itself: give one URL."),
        ("tcp://u:1,grpc://v:1", "tcp://u:1, grpc://v:1: the instances of a service have one scheme."),
        ("tcp://u:1,v:1", "write each with its scheme, as in tcp://a:3001,tcp://b:3001."),
    ],
)
def test_not_all_addresses_can_be_those_of_one_service(url: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        addresses(url)

    assert str(caught.value).endswith(text)


def test_the_bus_has_options_of_its_own(settings: Settings) -> None:
    settings.MICROSERVICES = {"EVENTS_URL": "redis-streams://h", "EVENTS_OPTIONS": {"attempts": 3}}

    assert events_address().options == {"attempts": 3}
