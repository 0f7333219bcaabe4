"""Doors that anybody could reach are not opened, and patterns may be for some peers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_django import Settings

from microservices import message_pattern
from microservices.checks import check_settings
from microservices.client import Client
from microservices.dispatcher import Dispatcher
from microservices.doors import Allow, Rule
from microservices.exceptions import ConfigurationError, RpcException
from microservices.lifecycle import Lifecycle
from microservices.microservice import get_microservice
from microservices.transports import Address
from microservices.transports.tcp import TcpClient, TcpServer
from tests.toolkit.conftest import context, service
from tests.toolkit.django.test_checks import told
from tests.toolkit.transports.certificates import Authority

Install = Callable[..., None]

ELSEWHERE = "tcp://192.0.2.1:3001"
BROKER = "redis://192.0.2.2:6379"


@message_pattern("ask")
async def ask() -> str:
    return "answered"


@pytest.mark.parametrize(
    ("url", "events_url", "found"),
    [
        ("tcp://0.0.0.0:3001", "memory://", ["E010"]),
        ("grpc://users:5000", "memory://", ["E010"]),
        (ELSEWHERE, BROKER, ["E010", "E012"]),
        ("tcp://127.0.0.1:3001", "nats://127.0.0.1:4222,192.0.2.1:4222", ["E012"]),
        ("tcp://[::1]:3001", "redis://localhost", []),
        ("tcp://localhost:3001", "redis://:secret@192.0.2.2", []),
    ],
)
def test_doors_without_tls_and_brokers_without_a_password_are_told_of(
    install: Install, settings: Settings, url: str, events_url: str, found: list[str]
) -> None:
    install(url, events_url, shop=[ask])

    assert [id for id, _ in told(check_settings())] == found
    settings.DEBUG = True
    assert told(check_settings()) == []


def test_they_may_be_told_to_be_fine(install: Install, settings: Settings) -> None:
    install(ELSEWHERE, BROKER, shop=[ask])
    settings.MICROSERVICES = {**settings.MICROSERVICES, "INSECURE_DOORS": True, "INSECURE_BROKERS": True}

    assert told(check_settings()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("url", "events_url", "reason"),
    [(ELSEWHERE, "memory://", "without TLS"), ("tcp://127.0.0.1:1", BROKER, "without a password")],
)
async def test_a_process_does_not_start_with_them_even_where_checks_are_skipped(
    install: Install, url: str, events_url: str, reason: str
) -> None:
    install(url, events_url, shop=[ask])
    owner = Lifecycle()

    with pytest.raises(ConfigurationError, match=f"shop: .*{reason}"):
        await owner.start()
    await owner.drain()
    await owner.stop()


# Who may call


@pytest.mark.parametrize(
    ("rule", "facts", "admitted"),
    [
        (["10.0.0.0/8"], {"transport": "tcp", "peer": "10.1.2.3:4000"}, True),
        (["10.0.0.0/8"], {"transport": "tcp", "peer": "11.1.2.3:4000"}, False),
        (["10.0.0.0/8"], {"transport": "grpc", "peer": "10.1.2.3:4000"}, True),
        (["10.0.0.0/8"], {"transport": "tcp", "peer": "::ffff:10.1.2.3:4000"}, True),
        (["fd00::/8"], {"transport": "grpc", "peer": "[fd00::1]:4000"}, True),
        (["10.0.0.0/8"], {"transport": "tcp", "peer": ""}, False),
        (["10.0.0.0/8"], {"transport": "nats", "peer": "nats://10.1.2.3:4222"}, False),
        (["broker"], {"transport": "nats", "peer": "nats://10.1.2.3:4222"}, True),
        (["broker"], {"transport": "tcp", "peer": "10.1.2.3:4000"}, False),
        (["cert:orders"], {"transport": "tcp", "peer": "10.1.2.3:4000"}, False),
        ([], {"transport": "local", "peer": ""}, True),
    ],
)
def test_a_rule_admits_whom_it_names(rule: list[str], facts: dict[str, Any], admitted: bool) -> None:
    assert Rule(rule).admits(context(**facts)) is admitted


def test_a_rule_that_cannot_be_read_is_e013(install: Install, settings: Settings) -> None:
    install("tcp://127.0.0.1:3001", shop=[ask])
    place = settings.MICROSERVICES["SERVERS"]["shop"]
    rules = {"ask": ["10.0.0.0/33"], "asc": ["broker"]}
    settings.MICROSERVICES = {**settings.MICROSERVICES, "SERVERS": {"shop": {**place, "allow": rules}}}

    assert told(check_settings()) == [
        (
            "E013",
            "MICROSERVICES SERVERS['shop'] allow['ask']: '10.0.0.0/33' is no network, no cert:NAME and not 'broker'.",
        ),
        ("E013", "MICROSERVICES SERVERS['shop'] allow['asc']: there is no such pattern; did you mean 'ask'?"),
    ]


@pytest.mark.asyncio
async def test_who_is_not_named_is_forbidden_and_other_patterns_are_everybodys(
    install: Install, settings: Settings, free_port: int
) -> None:
    @message_pattern("open", inline=True)
    def open_to_all() -> str:
        return "open"

    @message_pattern({"cmd": "secret"}, inline=True)
    def secret() -> str:
        return "secret"

    url = f"tcp://127.0.0.1:{free_port}"
    install(url, shop=[open_to_all, secret])
    place = settings.MICROSERVICES["SERVERS"]["shop"]
    answers = []
    for rule in (["192.0.2.0/24"], ["127.0.0.0/8"]):
        settings.MICROSERVICES = {
            **settings.MICROSERVICES,
            "SERVERS": {"shop": {**place, "allow": {"secret": rule}}},
        }
        microservice = get_microservice("shop")
        await microservice.listen()
        client = Client("shop", lambda: TcpClient(Address("tcp", "127.0.0.1", free_port, {}), "shop"))
        answers.append(await client.send("open"))
        try:
            answers.append(await client.send({"cmd": "secret"}))
        except RpcException as error:
            answers.append((error.status_code, error.code))
        await client.close()
        await microservice.close(0)

    assert answers == ["open", (403, "forbidden"), "open", "secret"]


@pytest.mark.asyncio
async def test_a_clients_certificate_says_who_it_is(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    ends = {
        name: {**authority.issue(name)._asdict(), "cafile": authority.cafile} for name in ("shop", "orders", "users")
    }
    dispatcher: Dispatcher = service(ask, middlewares=[Allow("shop", {"ask": ["cert:orders"]})])
    server = TcpServer(Address("tcps", "127.0.0.1", 0, ends["shop"]), dispatcher)
    await server.listen()
    answers = []
    for name in ("orders", "users"):
        address = Address("tcps", "127.0.0.1", server.port, ends[name])
        client = Client("shop", lambda address=address: TcpClient(address, "shop"))  # type: ignore[misc]
        try:
            answers.append(await client.send("ask"))
        except RpcException as error:
            answers.append(error.code)
        await client.close()
    await server.close(0)

    assert answers == ["answered", "forbidden"]


def test_the_rules_of_what_nobody_rules_are_kept_within_bounds() -> None:
    allow = Allow("shop", {"ask": ["broker"]})
    call = allow.in_place(lambda data, context: "answered")

    for number in range(2000):
        assert call(None, context(pattern=f"other.{number}", transport="nats")) == "answered"

    assert len(allow._found) == 1024
