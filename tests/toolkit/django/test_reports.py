"""What a process tells of itself: which services, where, how they are."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from pytest_django import Settings

from microservices import event_pattern, message_pattern
from microservices.discovery.registry import PatternReport, Report
from microservices.microservice import Microservice, get_microservice, services_here
from microservices.reports import Reporter
from microservices.transports import parse
from microservices.transports.base import Status
from microservices.transports.redis_streams import StreamsListener
from microservices.transports.tcp import TcpServer

Install = Callable[..., None]


@message_pattern({"cmd": "get_item"}, retry="safe", deadline=2)
def get_item() -> None: ...


@event_pattern("item_sold")
@event_pattern("item_lost")
def item_gone() -> None: ...


def reports(
    pages: dict[str, str] | None = None, doors: dict[str, Sequence[str]] | None = None, **given: Any
) -> dict[str, Report]:
    """Return what is told of the services that live here, by name."""
    told = Reporter(pages or {}, doors or dict.fromkeys(services_here(), ()), 1.5).reports(
        here(), draining=given.get("draining", False)
    )
    assert len({report.service for report in told}) == len(told)
    return {report.service: report for report in told}


def here() -> list[Microservice]:
    return [get_microservice(name) for name in services_here()]


def change(settings: Settings, **given: Any) -> None:
    settings.MICROSERVICES = {**settings.MICROSERVICES, **given}


def test_each_service_of_the_map_tells_its_patterns(install: Install, settings: Settings) -> None:
    install(shop=[get_item, item_gone], stock=[])
    change(settings, NAME="shop")

    told = reports()

    assert list(told) == ["shop", "stock"]
    assert told["shop"].patterns == (
        PatternReport("get_item", "request", "safe", 2),
        PatternReport("item_lost", "event", "never", None),
        PatternReport("item_sold", "event", "never", None),
    )
    assert told["stock"].patterns == ()
    assert told["shop"].started_at == 1.5


def test_a_process_with_a_name_of_its_own_tells_of_itself_too(install: Install, settings: Settings) -> None:
    install(shop=[get_item])
    change(settings, NAME="gateway")

    told = reports({"http": "http://127.0.0.1:3000"})

    assert list(told) == ["shop", "gateway"]
    assert told["gateway"].addresses == {"http": "http://127.0.0.1:3000"}
    assert told["gateway"].version == "1.0.0"
    assert told["shop"].addresses == {"health": "http://127.0.0.1:3000"}


def test_a_process_that_serves_nothing_but_its_health_pages_claims_no_http(
    install: Install, settings: Settings
) -> None:
    install(shop=[get_item], stock=[])
    change(settings, NAME="both")

    told = reports({"health": "http://127.0.0.1:9001"})

    assert list(told) == ["shop", "stock", "both"]
    assert all(report.addresses == {"health": "http://127.0.0.1:9001"} for report in told.values())


def test_an_app_beside_the_map_that_only_hears_is_no_service(install: Install, settings: Settings) -> None:
    install(shop=[get_item], listener=[item_gone])
    places = {"shop": settings.MICROSERVICES["SERVERS"]["shop"]}
    change(settings, SERVERS=places, CLIENTS=places, NAME="shop")

    assert "listener" in services_here()
    assert list(reports()) == ["shop"]


def test_a_process_that_opens_the_doors_of_some_services_tells_of_no_others(
    install: Install, settings: Settings
) -> None:
    install(shop=[get_item], stock=[])
    change(settings, NAME="both")

    assert list(reports(doors={"stock": ["tcp://127.0.0.1:3001"]})) == ["stock", "both"]


def test_an_instance_is_named_by_host_and_pid_unless_it_has_a_name(install: Install, settings: Settings) -> None:
    install(shop=[])
    change(settings, NAME="shop")
    unnamed = reports()["shop"]

    change(settings, INSTANCE="shop-1", ZONE="eu-1")
    named = reports()["shop"]

    assert unnamed.instance == f"{socket.gethostname()}-{os.getpid()}"
    assert (unnamed.host, unnamed.pid, unnamed.zone) == (socket.gethostname(), os.getpid(), "")
    assert (named.instance, named.zone, named.host) == ("shop-1", "eu-1", unnamed.host)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("tcp://127.0.0.1:3001", "tcp://127.0.0.1:3001"),
        ("tcp://0.0.0.0:3001?max_connections=5", "tcp://shop.example:3001"),
        ("tcp://[::]:3001", "tcp://shop.example:3001"),
        ("tcp://[::1]:3001", "tcp://[::1]:3001"),
        ("redis://ada:hunter2@broker:6379/1", "redis://broker:6379"),
        ("redis://broker", "redis://broker"),
    ],
)
def test_addresses_are_told_as_others_find_them_and_without_secrets(
    install: Install, settings: Settings, url: str, told: str
) -> None:
    install(shop=[])
    change(settings, NAME="shop", ADVERTISE_HOST="shop.example")

    assert reports(doors={"shop": [url]})["shop"].addresses == {told.partition(":")[0]: told}


def test_without_an_advertised_host_a_door_on_all_interfaces_is_told_by_the_hosts_name(
    install: Install, settings: Settings
) -> None:
    install(shop=[])
    change(settings, NAME="shop")

    told = reports(doors={"shop": ["tcp://0.0.0.0:3001"]})["shop"]

    assert told.addresses == {"tcp": f"tcp://{socket.gethostname()}:3001"}


@pytest.mark.parametrize(
    ("status", "draining", "state", "reason"),
    [
        (Status.CONNECTED, False, "up", ""),
        (Status.DISCONNECTED, False, "degraded", "redis-streams://broker:6379 is disconnected"),
        (Status.DISCONNECTED, True, "draining", ""),
    ],
)
def test_who_does_not_hear_the_bus_is_degraded(
    install: Install, settings: Settings, status: Status, draining: bool, state: str, reason: str
) -> None:
    install(shop=[], stock=[])
    change(settings, NAME="gateway")
    shop = get_microservice("shop")
    listener = StreamsListener(parse("redis-streams://broker:6379"), shop.dispatcher)
    listener.status = status
    shop.servers.append(listener)

    told = reports(draining=draining)

    assert (told["shop"].state, told["shop"].reason) == (state, reason)
    assert (told["gateway"].state, told["gateway"].reason) == (state, reason)
    assert told["stock"].state == ("draining" if draining else "up")


def test_a_door_that_is_closed_is_the_health_pages_business(install: Install, settings: Settings) -> None:
    install(shop=[])
    change(settings, NAME="shop")
    shop = get_microservice("shop")
    shop.servers.append(TcpServer(parse("tcp://127.0.0.1:3009"), shop.dispatcher))

    assert reports()["shop"].state == "up"
