"""The health pages: who is asked for what, and what they give away."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from asgiref.sync import async_to_sync
from django.test import Client, RequestFactory
from health_check import HealthCheck
from health_check.exceptions import ServiceWarning
from pytest_django import Settings

from microservices import clients, health
from microservices.health import Brokers, Doors, HealthView, Instances, Migrated, OnPurpose, ServiceDatabase, Started
from microservices.lifecycle import State, lifecycle
from microservices.microservice import get_microservice
from microservices.transports import Address, parse
from microservices.transports.base import Status
from microservices.transports.redis import RedisServer
from microservices.transports.tcp import TcpServer

Install = Callable[..., None]
Scratch = Callable[..., str]

PAGES = ["/readyz", "/health"]
databases = pytest.mark.django_db(databases="__all__")


def asked(rf: RequestFactory, *checks: Any) -> tuple[int, dict[str, Any]]:
    """Ask a page with these checks; return its status and its details."""
    answer = async_to_sync(HealthView.as_view(checks=checks))(rf.get("/health"))
    return answer.status_code, msgspec.json.decode(answer.content)["details"]


@pytest.fixture
def _ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "state", State.READY)


@databases
@pytest.mark.usefixtures("_ready")
@pytest.mark.parametrize("page", PAGES)
def test_a_process_that_takes_calls_tells_each_of_its_checks(client: Client, page: str) -> None:
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)

    answer = client.get(page)

    body = answer.json()
    assert (answer.status_code, answer["Content-Type"]) == (200, "application/json")
    assert set(body) - {"services"} == {"status", "timestamp", "uptime", "details"}
    assert body["status"] == "ok"
    assert before <= datetime.datetime.fromisoformat(body["timestamp"]) <= datetime.datetime.now(datetime.UTC)
    assert 0 < body["uptime"] <= round(lifecycle.uptime, 3)
    assert body["details"] == {
        "process": {"status": "up"},
        "doors": {"status": "up"},
        "load": {"status": "up"},
        "database default": {"status": "up"},
        **{f"database {name}": {"status": "up"} for name in ("users", "orders", "payments", "notifications")},
        **({key: {"status": "up"} for key in ("brokers", "instances")} if page == "/health" else {}),
    }


@databases
def test_startupz_is_503_until_the_process_has_once_been_ready(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "state", State.STARTING)
    monkeypatch.setattr(lifecycle, "started", False)
    before = client.get("/startupz")
    monkeypatch.setattr(lifecycle, "started", True)
    monkeypatch.setattr(lifecycle, "state", State.DRAINING)  # what has started stays so
    after = client.get("/startupz")

    assert (before.status_code, before.json()["details"]["start"]["status"]) == (503, "down")
    assert (after.status_code, after.json()["details"]["migrations users"]) == (200, {"status": "up"})


def test_a_database_without_its_tables_is_told_by_the_number_of_migrations(
    rf: RequestFactory, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_migrated", set())

    status, details = asked(rf, (Migrated, {"alias": scratch()}))
    health._probing.cache_clear()  # its thread has a connection that the next test must not find

    assert status == 503
    assert details["migrations scratch"]["message"].endswith("migrations are not applied")


@pytest.mark.usefixtures("_ready")
@pytest.mark.parametrize("status", [Status.CONNECTED, Status.DISCONNECTED])
def test_a_broker_that_is_away_is_told_and_makes_nothing_unready(
    rf: RequestFactory, install: Install, monkeypatch: pytest.MonkeyPatch, status: Status
) -> None:
    install(shop=[])
    shop = get_microservice("shop")
    listener = RedisServer(parse("redis://127.0.0.1:6379"), shop.dispatcher)
    listener.status = status
    shop.servers.append(listener)
    monkeypatch.setattr(lifecycle, "microservices", [shop])

    answer = async_to_sync(HealthView.as_view(checks=[Brokers], tells_services=True))(rf.get("/health"))

    body = msgspec.json.decode(answer.content)
    away = {"status": "up", "message": "Warning: shop redis://127.0.0.1:6379: disconnected"}
    assert answer.status_code == 200
    assert body["details"]["brokers"] == ({"status": "up"} if status is Status.CONNECTED else away)
    assert body["services"] == [{"name": "shop", "transports": {"redis://127.0.0.1:6379": str(status)}}]


@pytest.mark.usefixtures("_ready")
def test_an_instance_that_is_left_out_is_told_and_makes_nothing_unready(rf: RequestFactory, settings: Settings) -> None:
    settings.MICROSERVICES = {"CLIENTS": {"users": {"url": "tcp://127.0.0.1:1,tcp://127.0.0.1:2"}}}

    async def ask_before_and_after() -> list[dict[str, Any]]:
        balancer = clients["users"].balancer
        assert balancer is not None
        page = HealthView.as_view(checks=[Instances])
        answers = [await page(rf.get("/health"))]
        for _ in range(5):
            balancer.done(balancer.choose(["tcp://127.0.0.1:2"]), balancer.clock(), failed=True)
        answers.append(await page(rf.get("/health")))
        assert [answer.status_code for answer in answers] == [200, 200]
        return [msgspec.json.decode(answer.content)["details"]["instances"] for answer in answers]

    before, after = async_to_sync(ask_before_and_after)()

    assert before == {"status": "up"}
    assert after == {"status": "up", "message": "Warning: left out: users tcp://127.0.0.1:1"}


@pytest.mark.usefixtures("_ready")
def test_faults_on_purpose_are_told_and_make_nothing_unready(rf: RequestFactory, settings: Settings) -> None:
    settings.DEBUG = True
    settings.MICROSERVICES = {
        "CLIENTS": {"users": {"url": "tcp://127.0.0.1:1"}},
        "FAULTS": {"users": {"get_user": {"drop": 0.5}}},
    }

    answer = async_to_sync(HealthView.as_view(checks=[OnPurpose]))(rf.get("/health"))

    assert answer.status_code == 200
    told = {"status": "up", "message": "Warning: on purpose: users/get_user"}
    assert msgspec.json.decode(answer.content)["details"]["faults"] == told


@databases
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("state", [State.STARTING, State.DRAINING, State.STOPPED])
def test_a_process_that_takes_no_calls_is_503_and_says_where_it_stands(
    client: Client, monkeypatch: pytest.MonkeyPatch, page: str, state: State
) -> None:
    monkeypatch.setattr(lifecycle, "state", state)

    answer = client.get(page)

    assert (answer.status_code, answer.json()["status"]) == (503, "error")
    assert answer.json()["details"]["process"] == {"status": "down", "message": f"Unavailable: {state}"}
    assert answer.json()["details"]["database users"] == {"status": "up"}


@pytest.mark.usefixtures("_ready")
@pytest.mark.parametrize("page", PAGES)
def test_a_process_that_cannot_use_its_databases_is_503(client: Client, page: str) -> None:
    # Without the django_db mark every connection refuses to open.
    answer = client.get(page)

    assert (answer.status_code, answer.json()["status"]) == (503, "error")
    assert answer.json()["details"]["process"] == {"status": "up"}
    assert answer.json()["details"]["database users"] == {
        "status": "down",
        "message": "Unavailable: not usable: RuntimeError",
    }


@pytest.mark.parametrize("state", list(State))
def test_livez_looks_at_nothing_but_the_event_loop(
    client: Client, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    monkeypatch.setattr(lifecycle, "state", state)

    answer = client.get("/livez")

    assert answer.status_code == 200
    assert (answer.json()["status"], answer.json()["details"]) == ("ok", {})


@pytest.mark.usefixtures("_ready")
@pytest.mark.parametrize(("status", "code"), [(Status.CONNECTED, 200), (Status.CLOSED, 503)])
def test_a_door_that_has_closed_is_named(
    rf: RequestFactory, install: Install, monkeypatch: pytest.MonkeyPatch, status: Status, code: int
) -> None:
    install(url="tcp://127.0.0.1:3009", shop=[])
    shop = get_microservice("shop")
    door = TcpServer(Address("tcp", "127.0.0.1", 3009, {}), shop.dispatcher)
    door.status = status
    shop.servers.append(door)
    monkeypatch.setattr(lifecycle, "microservices", [shop])

    answered, details = asked(rf, Started, Doors)

    down = {"status": "down", "message": "Unavailable: shop tcp://127.0.0.1:3009: closed"}
    assert answered == code
    assert details == {"process": {"status": "up"}, "doors": {"status": "up"} if code == 200 else down}


def test_doors_that_are_meant_to_be_closed_are_none(
    rf: RequestFactory, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(shop=[])
    monkeypatch.setattr(lifecycle, "microservices", [get_microservice("shop")])

    assert asked(rf, Doors) == (200, {"doors": {"status": "up"}})


def test_what_is_wrong_with_a_database_stays_in_the_log(
    rf: RequestFactory, scratch: Scratch, caplog: pytest.LogCaptureFixture
) -> None:
    alias = scratch(NAME="/no/such/folder/db.sqlite3", USER="tiger", PASSWORD="hunter2")

    with caplog.at_level(logging.WARNING, "health_check"):
        status, details = asked(rf, (ServiceDatabase, {"alias": alias}))

    assert status == 503
    assert details == {"database scratch": {"status": "down", "message": "Unavailable: not usable: OperationalError"}}
    assert "unable to open database file" in caplog.text


def test_a_warning_is_told_and_makes_nothing_unready(rf: RequestFactory) -> None:
    @dataclasses.dataclass(repr=False)
    class Disk(HealthCheck):
        def __repr__(self) -> str:
            return "disk"

        def run(self) -> None:
            raise ServiceWarning("nearly full")

    assert asked(rf, Disk) == (200, {"disk": {"status": "up", "message": "Warning: nearly full"}})


def test_a_database_that_comes_back_is_up_again(rf: RequestFactory, scratch: Scratch) -> None:
    broken, _ = asked(rf, (ServiceDatabase, {"alias": scratch(NAME="/no/such/folder/db.sqlite3")}))
    health._probing.cache_clear()  # its thread has the old alias's connection
    mended, _ = asked(rf, (ServiceDatabase, {"alias": scratch()}))

    assert (broken, mended) == (503, 200)


@databases
@pytest.mark.usefixtures("_ready")
def test_probes_may_ask_for_the_head_alone_and_nothing_may_be_sent(client: Client) -> None:
    head = client.head("/readyz")
    post = client.post("/readyz")

    assert (head.status_code, head.content) == (200, b"")
    assert post.status_code == 405


@pytest.mark.parametrize("page", ["/livez", *PAGES])
def test_no_cache_on_the_way_may_keep_an_answer(client: Client, page: str) -> None:
    answer = client.get(page)

    assert "no-store" in answer["Cache-Control"]
