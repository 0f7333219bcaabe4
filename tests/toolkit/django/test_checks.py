"""The system checks: each fires on its mistake, and none on the shop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.core import checks
from pytest_django import Settings

from microservices import event_pattern, grpc_method, message_pattern
from microservices.checks import (
    check_connections,
    check_imports,
    check_patterns,
    check_relations,
    check_rpcs,
    check_settings,
)

Install = Callable[..., None]
Package = Callable[..., str]

USERS = {"url": "tcp://127.0.0.1:3001", "health": 9001}


def told(messages: list[checks.CheckMessage]) -> list[tuple[str | None, str]]:
    """What the checks say, without their prefix."""
    return [(str(message.id).removeprefix("microservices."), message.msg) for message in messages]


def test_the_shop_has_none_of_these_mistakes() -> None:
    assert checks.run_checks(tags=["microservices"]) == []


def test_a_model_that_relates_to_one_of_another_service_is_e001(settings: Settings) -> None:
    # Django's own models stand for those of a service.
    settings.MICROSERVICES = {"SERVERS": {"auth": USERS}}

    found = told(check_relations())

    assert sorted(found) == [
        ("E001", "admin.LogEntry.user relates to auth.User of another service."),
        ("E001", "auth.Permission.content_type relates to contenttypes.ContentType of another service."),
    ]


def test_a_service_that_imports_another_ones_code_is_e002(package: Package, settings: Settings) -> None:
    name = package(
        services="""
        import json
        from users.models import User
        from microservices import clients
        from . import models
        from .users import nobody

        def late():
            import users.services as theirs
        """,
        models="",
        users="nobody = None",
    )
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, name]
    settings.MICROSERVICES = {"SERVERS": {"users": USERS, name: {"url": "tcp://127.0.0.1:3002"}}}

    found = check_imports()

    assert told(found) == [
        ("E002", f"services.py:3 of {name} imports users.models, which is another service."),
        ("E002", f"services.py:9 of {name} imports users.services, which is another service."),
    ]
    assert found[0].hint == "Ask it by message: clients['users']."


def test_a_pattern_that_two_functions_answer_is_e003(install: Install) -> None:
    @message_pattern({"cmd": "get", "v": 1})
    async def one() -> None: ...

    @message_pattern([{"v": 1, "cmd": "get"}, "other"])
    async def two() -> None: ...

    install(shop=[one, two])

    found = told(check_patterns())

    prefix = f"{__name__}.{test_a_pattern_that_two_functions_answer_is_e003.__qualname__}.<locals>"
    assert found == [("E003", f'{prefix}.one and {prefix}.two both answer {{"cmd":"get","v":1}}.')]


def test_an_event_may_be_heard_twice_and_share_its_name_with_a_request(install: Install) -> None:
    @event_pattern("made")
    async def one() -> None: ...

    @event_pattern("made")
    async def two() -> None: ...

    @message_pattern("made")
    async def three() -> None: ...

    install(shop=[one, two, three])

    assert check_patterns() == []


def test_two_services_may_answer_the_same_pattern(install: Install) -> None:
    @message_pattern("get")
    async def get() -> None: ...

    @message_pattern("get")
    async def get_as_well() -> None: ...

    install(shop=[get], stock=[get_as_well])

    assert check_patterns() == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"CLIENT": {}}, "MICROSERVICES has no 'CLIENT': did you mean 'CLIENTS'?"),
        ({"THREADS": "many"}, "MICROSERVICES: Expected `int`, got `str` - at `$.THREADS`"),
    ],
)
def test_settings_that_cannot_be_read_are_e004_and_stop_no_other_check(
    settings: Settings, given: dict[str, Any], text: str
) -> None:
    settings.MICROSERVICES = given

    found = checks.run_checks(tags=["microservices"])

    assert told(found) == [("E004", text)]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        pytest.param(
            {"CLIENTS": {"users": {"url": "tpc://127.0.0.1:3001"}}},
            "MICROSERVICES CLIENTS['users']: Unknown transport 'tpc' in 'tpc://127.0.0.1:3001'. Did you mean tcp://?",
            id="nearly a scheme",
        ),
        pytest.param(
            {"EVENTS_URL": "carrier-pigeon://roof"},
            "MICROSERVICES EVENTS_URL: Unknown transport 'carrier-pigeon' in 'carrier-pigeon://roof'. "
            "Known: memory://, tcp://, tcps://, redis://, rediss://, redis-streams://, rediss-streams://, "
            "nats://, mqtt://, mqtts://, amqp://, amqps://, kafka://, grpc://, grpcs://.",
            id="no scheme at all",
        ),
        pytest.param(
            {"CLIENTS": {"users": {"url": "redis://127.0.0.1?wildcard=true"}}},
            "MICROSERVICES CLIENTS['users']: redis://127.0.0.1:6379: unknown option 'wildcard'; "
            "did you mean 'wildcards'?",
            id="no such option",
        ),
        pytest.param(
            {"SERVERS": {"users": {"url": "tcp://127.0.0.1:3001", "options": {"max_in_flight": 0}}}},
            "MICROSERVICES SERVERS['users']: tcp://127.0.0.1:3001: Expected `int` >= 1 - at `$.max_in_flight`",
            id="no such value",
        ),
        pytest.param(
            {"EVENTS_URL": "nats://127.0.0.1", "EVENTS_OPTIONS": {"streams": "events"}},
            "MICROSERVICES EVENTS_URL: nats://127.0.0.1:4222: unknown option 'streams'; did you mean 'stream'?",
            id="no such option of the bus",
        ),
        pytest.param(
            {"CLIENTS": {"users": {"url": "tcps://127.0.0.1:3001?cafile=/no/ca.pem"}}},
            "MICROSERVICES CLIENTS['users']: TLS cannot be set up with /no/ca.pem: "
            "[Errno 2] No such file or directory.",
            id="no certificate",
        ),
        pytest.param(
            {"EVENTS_URL": "tcp://127.0.0.1:3001"},
            "MICROSERVICES EVENTS_URL: tcp:// cannot carry events; "
            "use memory://, redis://, rediss://, redis-streams://, rediss-streams://, "
            "nats://, mqtt://, mqtts://, amqp://, amqps://, kafka://.",
            id="no bus",
        ),
        pytest.param(
            {"CLIENTS": {"users": {"url": "amqp://a,amqp://b"}}},
            "MICROSERVICES CLIENTS['users']: amqp:// is a broker's, which deals calls out itself: give one URL.",
            id="several brokers",
        ),
        pytest.param(
            {"SERVERS": {"users": {"url": "tcp://127.0.0.1:3001,tcp://127.0.0.1:3002"}}},
            "MICROSERVICES SERVERS['users']: 'tcp://127.0.0.1:3001,tcp://127.0.0.1:3002' holds several addresses, "
            "where there can be one.",
            id="a server at several addresses",
        ),
        pytest.param(
            {"SERVERS": {"users": {"url": "memory://"}}},
            "MICROSERVICES SERVERS['users']: memory:// cannot serve a service; "
            "use tcp://, tcps://, redis://, rediss://, "
            "nats://, mqtt://, mqtts://, amqp://, amqps://, kafka://, grpc://, grpcs://.",
            id="no server",
        ),
        pytest.param(
            {"SERVERS": {"users": {"url": "tcp://127.0.0.1"}}},
            "MICROSERVICES SERVERS['users']: 'tcp://127.0.0.1' must name a host and a port, as in tcp://127.0.0.1:3001.",
            id="no port",
        ),
        pytest.param(
            {"SERVERS": {"users": {"url": "tcp://127.0.0.1:70000"}}},
            "MICROSERVICES SERVERS['users']: 'tcp://127.0.0.1:70000': Port out of range 0-65535.",
            id="no such port",
        ),
    ],
)
def test_an_address_that_cannot_be_used_is_e006(settings: Settings, given: dict[str, Any], text: str) -> None:
    settings.MICROSERVICES = given

    assert told(check_settings()) == [("E006", text)]


@pytest.mark.parametrize(
    ("services", "text"),
    [
        pytest.param(
            {"users": USERS, "orders": {"url": "tcp://127.0.0.1:3001"}},
            "users and orders both use 127.0.0.1:3001.",
            id="two doors",
        ),
        pytest.param(
            {"users": USERS, "orders": {"url": "tcp://127.0.0.1:3002", "health": 9001}},
            "users and orders both use 127.0.0.1:9001.",
            id="two health ports",
        ),
        pytest.param(
            {"users": USERS, "orders": {"url": "tcp://127.0.0.1:9001"}},
            "users and orders both use 127.0.0.1:9001.",
            id="a door and a health port",
        ),
        pytest.param(
            {"users": {"url": "tcp://127.0.0.1:3001", "health": 3001}},
            "users uses 127.0.0.1:3001 twice.",
            id="one service's own two",
        ),
        pytest.param(
            {"users": {**USERS, "grpc": "grpc://127.0.0.1:5000"}, "orders": {"url": "tcp://127.0.0.1:5000"}},
            "users and orders both use 127.0.0.1:5000.",
            id="a door and a gRPC port",
        ),
    ],
)
def test_a_port_that_is_used_twice_is_e007(settings: Settings, services: dict[str, Any], text: str) -> None:
    settings.MICROSERVICES = {"CLIENTS": services, "SERVERS": services}

    assert told(check_settings()) == [("E007", text)]


def test_a_grpc_address_may_be_the_address_itself(settings: Settings) -> None:
    grpc = "grpc://127.0.0.1:5000"
    settings.MICROSERVICES = {"CLIENTS": {"users": {"url": grpc, "grpc": grpc}}}

    assert check_settings() == []


@pytest.mark.parametrize(
    ("door", "text"),
    [
        (
            ("UsersService", "FindNone"),
            "users.UsersService has no RPC 'FindNone'; it has FindOne, FindAll, CreateUser.",
        ),
        (("OrdersService", "WatchOrders"), "orders.OrdersService has no RPC 'WatchOrders'"),
        (("NoService", "FindOne"), "The service 'NoService' of the .proto files is not clear: none has it"),
    ],
)
def test_a_grpc_method_that_no_proto_file_has_is_e009(install: Install, door: tuple[str, str], text: str) -> None:
    @grpc_method(*door)
    def find() -> None: ...

    install(shop=[find])

    [(id, told_text)] = told(check_rpcs())
    assert id == "E009"
    assert text in told_text


def test_a_pattern_that_is_mapped_to_an_rpc_which_is_not_there_is_e009(settings: Settings) -> None:
    place = {"url": "grpc://127.0.0.1:5000", "rpcs": {"get_user": "UsersService/Get"}}
    settings.MICROSERVICES = {**settings.MICROSERVICES, "CLIENTS": {"users": place}, "SERVERS": {}}

    [(id, text)] = told(check_rpcs())
    assert (id, text.partition(" rpcs:")[0]) == ("E009", "MICROSERVICES CLIENTS['users']")


def test_services_on_hosts_of_their_own_may_use_the_same_port(settings: Settings) -> None:
    settings.MICROSERVICES = {
        "CLIENTS": {
            "users": {"url": "tcp://users:3000", "health": 9000},
            "orders": {"url": "tcp://orders:3000", "health": 9000},
        }
    }

    assert check_settings() == []


@pytest.mark.parametrize("given", [{"CONN_MAX_AGE": 0}, {}])
def test_a_service_whose_database_keeps_no_connections_is_w008(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, given: dict[str, int]
) -> None:
    kept = {name: value for name, value in settings.DATABASES["users"].items() if name != "CONN_MAX_AGE"}
    monkeypatch.setitem(settings.DATABASES, "users", kept | given)

    found = told(check_connections())

    assert found == [("W008", "DATABASES['users'] has CONN_MAX_AGE = 0: every message opens a connection.")]


@pytest.mark.parametrize("seconds", [600, None])
def test_a_database_that_keeps_its_connections_is_fine(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, seconds: int | None
) -> None:
    monkeypatch.setitem(settings.DATABASES, "users", settings.DATABASES["users"] | {"CONN_MAX_AGE": seconds})

    assert check_connections() == []
