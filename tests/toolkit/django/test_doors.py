"""Who may come in: doors without TLS, brokers without a password, and rules about single patterns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pytest_django import Settings

from microservices import ConfigurationError, RpcException, event_pattern, grpc_method, message_pattern
from microservices.checks import check_settings
from microservices.client import Client
from microservices.conf import brokers
from microservices.dispatcher import Dispatcher
from microservices.doors import Allow, Guard, Rule, open_to_all, without_password
from microservices.executor import Executor
from microservices.handlers import Handler
from microservices.lifecycle import Lifecycle
from microservices.microservice import get_microservice
from microservices.middleware import Endpoint
from microservices.supervisor.workers import hold
from microservices.transports import Address, parse
from microservices.transports.grpc import GrpcClient, GrpcServer
from microservices.transports.local import LocalClient
from microservices.transports.tcp import TcpClient, TcpServer
from tests.toolkit.conftest import Answers, context, packet
from tests.toolkit.django.test_checks import told
from tests.toolkit.transports.certificates import Authority

Install = Callable[..., None]
Losses = Callable[[str, str], int]

OPEN = (
    "tcp://0.0.0.0:3001 takes calls from other hosts without TLS: anybody there may make them. "
    "Use tcps://, bind 127.0.0.1, or set INSECURE_DOORS where the network keeps others out."
)
UNKNOWN = (
    "redis://events:6379 is used without a password: anybody who reaches it may forge messages. "
    "Give the URL a user and a password, or set INSECURE_BROKERS where the network keeps others out."
)


# Doors without TLS


@pytest.mark.parametrize(
    ("url", "refused"),
    [
        ("tcp://127.0.0.1:3001", False),
        ("tcp://127.9.9.9:3001", False),
        ("tcp://localhost:3001", False),
        ("tcp://[::1]:3001", False),
        ("grpc://127.0.0.1:5000", False),
        ("tcps://0.0.0.0:3001", False),
        ("grpcs://0.0.0.0:5000", False),
        ("redis://redis:6379", False),  # no door: nobody connects to this process
        ("tcp://0.0.0.0:3001", True),
        ("tcp://[::]:3001", True),
        ("tcp://10.0.0.7:3001", True),
        ("tcp://users:3001", True),
        ("tcp://127.0.0.1.example.org:3001", True),
        ("grpc://0.0.0.0:5000", True),
    ],
)
def test_a_door_that_others_can_reach_needs_tls(url: str, refused: bool) -> None:
    assert bool(list(open_to_all([parse(url)]))) is refused


@pytest.mark.parametrize(
    ("url", "refused"),
    [
        ("redis://127.0.0.1", False),
        ("nats://localhost:4222", False),
        ("redis://:secret@redis", False),
        ("rediss://shop:secret@redis", False),
        ("nats://token@nats", False),
        ("nats://shop:secret@nats", False),
        ("amqp://shop:secret@rabbit", False),
        ("kafka://shop:secret@one,two", False),
        ("mqtts://broker?certfile=own.pem&keyfile=own.key", False),
        ("tcp://users:3001", False),  # no broker
        ("memory://", False),
        ("redis://redis", True),
        ("rediss://redis", True),  # TLS alone tells nothing of who connects
        ("redis://shop@redis", True),
        ("nats://nats", True),
        ("mqtt://shop@broker", True),
        ("amqp://rabbit", True),
        ("amqp://guest:guest@rabbit", True),
        ("kafka://127.0.0.1,two", True),
    ],
)
def test_a_broker_elsewhere_needs_a_password(settings: Settings, url: str, refused: bool) -> None:
    settings.MICROSERVICES = {"EVENTS_URL": url} if parse(url).scheme == "memory" else {"CLIENTS": {"x": {"url": url}}}

    assert bool(list(without_password(brokers()))) is refused


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"SERVERS": {"users": {"url": "tcp://0.0.0.0:3001"}}}, [("E010", OPEN)]),
        ({"SERVERS": {"users": {"url": "tcp://0.0.0.0:3001"}}, "LISTEN": False}, []),
        ({"SERVERS": {"users": {"url": "tcp://0.0.0.0:3001"}}, "INSECURE_DOORS": True}, []),
        ({"CLIENTS": {"users": {"url": "tcp://0.0.0.0:3001"}}}, []),  # others' doors are theirs
        ({"SERVERS": {"users": {"url": "tcp://127.0.0.1:1", "grpc": "grpc://users:5000"}}}, [("E010", None)]),
        ({"EVENTS_URL": "redis://events"}, [("E012", UNKNOWN)]),
        ({"EVENTS_URL": "redis://:secret@events"}, []),
        ({"EVENTS_URL": "redis://events", "INSECURE_BROKERS": True}, []),
        ({"CLIENTS": {"users": {"url": "nats://nats"}}}, [("E012", None)]),
        ({"CLIENTS": {"users": {"url": "nats://nats"}}, "INSECURE_DOORS": True}, [("E012", None)]),
    ],
)
def test_what_others_could_reach_is_e010_and_e012_unless_told(
    settings: Settings, given: dict[str, Any], found: list[tuple[str, str | None]]
) -> None:
    settings.MICROSERVICES = given

    assert [
        (id, text if known else None) for (id, text), (_, known) in zip(told(check_settings()), found, strict=True)
    ] == (found)
    settings.DEBUG = True
    assert check_settings() == []


@pytest.mark.parametrize("insecure", [{}, {"url": "tcp://0.0.0.0:{port}"}, {"events_url": "redis://events"}])
@pytest.mark.asyncio
async def test_a_process_does_not_start_with_what_a_skipped_check_would_tell(
    install: Install, free_port: int, insecure: dict[str, str]
) -> None:
    urls = {name: url.format(port=free_port) for name, url in insecure.items()}
    install(**urls, shop=[answer])
    process = Lifecycle()

    if not insecure:
        await process.start()
    else:
        with pytest.raises(ConfigurationError, match="INSECURE_"):
            await process.start()
    await process.drain()
    await process.stop()


@pytest.mark.asyncio
async def test_a_process_where_no_service_lives_looks_at_its_brokers_too(install: Install, settings: Settings) -> None:
    install()
    settings.MICROSERVICES = {
        **settings.MICROSERVICES,
        "CLIENTS": {"users": {"url": "nats://nats"}},
        "LISTEN": True,
    }
    process = Lifecycle()

    with pytest.raises(ConfigurationError, match="nats://nats:4222 is used without a password"):
        await process.start()
    await process.drain()
    await process.stop()


@pytest.mark.parametrize("told_twice", [False, True])
def test_a_supervisor_holds_no_socket_for_what_its_workers_would_refuse(
    install: Install, settings: Settings, free_port: int, told_twice: bool
) -> None:
    install(url=f"tcp://0.0.0.0:{free_port}", shop=[answer])
    settings.MICROSERVICES = {**settings.MICROSERVICES, "INSECURE_DOORS": told_twice}

    if told_twice:
        for bound in hold("127.0.0.1", None, None).values():
            bound.close()
    else:
        with pytest.raises(ConfigurationError, match="INSECURE_DOORS"):
            hold("127.0.0.1", None, None)


# Rules


@message_pattern({"cmd": "answer"})
async def answer() -> int:
    """Answer in a task."""
    return 42


@message_pattern("at_once", inline=True)
def at_once() -> int:
    """Answer on the loop."""
    return 43


@message_pattern("in_thread")
@grpc_method("Numbers", "Square")
def in_thread() -> dict[str, int]:
    """Answer in a thread, and by gRPC."""
    return {"value": 44}


@message_pattern("open")
async def unruled() -> int:
    """Answer everybody."""
    return 45


HANDLERS = [Handler(function) for function in (answer, at_once, in_thread, unruled)]


def guarded(rules: Mapping[str, Sequence[str]], *more: Any) -> Dispatcher:
    """Return a service with these rules."""
    return Dispatcher("shop", HANDLERS, Executor(2), [Allow("shop", rules, HANDLERS), *more])


@pytest.mark.parametrize(
    ("rule", "facts", "may"),
    [
        ([], {"transport": "local"}, True),
        ([], {"transport": "tcp", "peer": "127.0.0.1:5"}, False),
        ([], {"transport": "redis"}, False),
        (["broker"], {"transport": "redis"}, True),
        (["broker"], {"transport": "kafka"}, True),
        (["broker"], {"transport": "tcp", "peer": "127.0.0.1:5"}, False),
        (["127.0.0.0/8"], {"transport": "tcp", "peer": "127.0.0.1:5"}, True),
        (["127.0.0.0/8"], {"transport": "redis", "peer": "127.0.0.1:5"}, False),
        (["127.0.0.1"], {"transport": "grpc", "peer": "127.0.0.1:5"}, True),
        (["10.0.0.0/8", "127.0.0.1"], {"transport": "tcp", "peer": "127.0.0.1:5"}, True),
        (["10.0.0.0/8"], {"transport": "tcp", "peer": "127.0.0.1:5"}, False),
        (["10.0.0.0/8"], {"transport": "tcp", "peer": "::ffff:10.1.2.3:5"}, True),
        (["10.0.0.0/8"], {"transport": "grpc", "peer": "[::ffff:10.1.2.3]:5"}, True),
        (["fd00::/8"], {"transport": "tcp", "peer": "fd00::1:5"}, True),
        (["fd00::/8"], {"transport": "grpc", "peer": "[fd00::1]:5"}, True),
        (["fd00::/8"], {"transport": "tcp", "peer": "127.0.0.1:5"}, False),
        (["127.0.0.1"], {"transport": "tcp", "peer": ":0"}, False),
        (["127.0.0.1"], {"transport": "tcp", "peer": "nonsense"}, False),
        (["cert:orders"], {"transport": "tcp", "peer": "127.0.0.1:5"}, False),
    ],
)
def test_a_rule_admits_whom_it_names(rule: list[str], facts: dict[str, Any], may: bool) -> None:
    assert Rule(rule).admits(context(**facts)) is may


@pytest.mark.parametrize("entry", ["10.0.0.1/8", "10.0.0.0/40", "users", "cert:", "brokers", "", "*"])
def test_a_rule_that_names_nobody_is_refused(entry: str) -> None:
    with pytest.raises(ConfigurationError, match="is no network, no cert:NAME and not 'broker'"):
        Rule([entry])


@pytest.mark.parametrize(
    ("allow", "texts"),
    [
        ({"answer": ["10.0.0.0/8"], "Numbers/Square": []}, []),
        ({"answr": ["broker"]}, ["allow['answr']: there is no such pattern; did you mean 'answer'?"]),
        (
            {"x": []},
            ["allow['x']: there is no such pattern; known are Numbers/Square, answer, at_once, in_thread, open."],
        ),
        ({"open": ["users"]}, ["allow['open']: 'users' is no network, no cert:NAME and not 'broker'."]),
    ],
)
def test_a_rule_that_nobody_could_have_meant_is_e013_and_no_start(
    install: Install, settings: Settings, allow: dict[str, list[str]], texts: list[str]
) -> None:
    install(shop=[answer, at_once, in_thread, unruled])
    place = {"url": "tcp://127.0.0.1:1", "allow": allow}
    settings.MICROSERVICES = {**settings.MICROSERVICES, "SERVERS": {"shop": place}}

    assert told(check_settings()) == [("E013", f"MICROSERVICES SERVERS['shop'] {text}") for text in texts]
    if texts:
        with pytest.raises(ConfigurationError, match="shop: allow"):
            get_microservice("shop")
    else:
        assert get_microservice("shop").dispatcher.service == "shop"


def test_nothing_stands_before_a_pattern_without_a_rule() -> None:
    allow = Allow("shop", {"answer": ["127.0.0.1"]}, HANDLERS)

    standing = {door.route: allow.at(handler, door) for handler in HANDLERS for door in handler.doors}

    assert [route for route, guard in standing.items() if guard is not None] == ['{"cmd":"answer"}']


def test_a_rule_goes_for_all_doors_of_its_handler_unless_they_have_their_own() -> None:
    def ruled(rules: Mapping[str, Sequence[str]]) -> dict[str, bool]:
        allow = Allow("shop", rules, HANDLERS)
        here = context(transport="tcp", peer="127.0.0.1:5")
        found = {}
        for door in HANDLERS[2].doors:
            guard = allow.at(HANDLERS[2], door)
            found[door.kind] = guard is None or guard._admits(here)
        return found

    assert ruled({"in_thread": []}) == {"request": False, "grpc": False}
    assert ruled({"Numbers/Square": []}) == {"request": False, "grpc": False}
    assert ruled({"Numbers/Square": [], "in_thread": ["127.0.0.1"]}) == {"request": True, "grpc": False}


@asynccontextmanager
async def over_tcp(dispatcher: Dispatcher, **options: str) -> AsyncIterator[TcpServer]:
    """Serve over TCP, with TLS where there is a certificate."""
    server = TcpServer(Address("tcps" if options else "tcp", "127.0.0.1", 0, options), dispatcher)
    await server.listen()
    try:
        async with asyncio.timeout(10):
            yield server
    finally:
        await server.close(0)


async def outcome(proxy: Any, pattern: Any, data: Any = None) -> Any:
    """Return an answer, or the code of a refusal."""
    client = Client("shop", lambda: proxy)
    try:
        return await client.send(pattern, data, timeout=5)
    except RpcException as error:
        return error.code
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("pattern", "result"), [({"cmd": "answer"}, 42), ("at_once", 43), ("in_thread", {"value": 44})]
)
@pytest.mark.asyncio
async def test_a_peer_of_another_network_hears_403_and_others_their_answer(
    pattern: Any, result: Any, losses: Losses
) -> None:
    name = pattern if isinstance(pattern, str) else pattern["cmd"]
    outcomes = []
    for network in ("127.0.0.0/8", "10.0.0.0/8"):
        async with over_tcp(guarded({name: [network]})) as server:
            outcomes.append(await outcome(TcpClient(parse(f"tcp://127.0.0.1:{server.port}"), "shop"), pattern))
            outcomes.append(await outcome(TcpClient(parse(f"tcp://127.0.0.1:{server.port}"), "shop"), "open"))

    assert outcomes == [result, 45, "forbidden", 45]
    assert losses("allow", "forbidden") == 1


@pytest.mark.asyncio
async def test_this_process_may_call_whatever_it_likes() -> None:
    rules: dict[str, list[str]] = {"answer": [], "at_once": []}

    assert await outcome(LocalClient(guarded(rules)), {"cmd": "answer"}) == 42
    assert await outcome(LocalClient(guarded(rules)), "at_once") == 43


@pytest.mark.asyncio
async def test_a_peer_is_known_by_its_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    dispatcher = guarded({"answer": ["cert:orders"]})
    async with over_tcp(dispatcher, **authority.issue("shop")._asdict(), cafile=authority.cafile) as server:
        outcomes = []
        for name in ("orders", "users"):
            options = {**authority.issue(name)._asdict(), "cafile": authority.cafile}
            address = Address("tcps", "127.0.0.1", server.port, options)
            outcomes.append(await outcome(TcpClient(address, "shop"), {"cmd": "answer"}))

    assert outcomes == [42, "forbidden"]


@pytest.mark.asyncio
async def test_a_peer_without_a_certificate_is_nobody(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    # The server asks for none, so that a name in one would be anybody's word.
    async with over_tcp(guarded({"answer": ["cert:orders"]}), **authority.issue("shop")._asdict()) as server:
        options = {**authority.issue("orders")._asdict(), "cafile": authority.cafile}
        address = Address("tcps", "127.0.0.1", server.port, options)
        assert await outcome(TcpClient(address, "shop"), {"cmd": "answer"}) == "forbidden"


@pytest.fixture
def numbers_proto(tmp_path: Path) -> list[str]:
    """Folders with a .proto file."""
    source = """
    syntax = "proto3";
    package numbers;
    service Numbers { rpc Square (Number) returns (Number) {} }
    message Number { int64 value = 1; }
    """
    (tmp_path / "numbers.proto").write_text(source, encoding="utf-8")
    return [str(tmp_path)]


@pytest.mark.parametrize(
    ("rule", "caller", "result"),
    [
        ("127.0.0.0/8", "orders", {"value": 44}),
        ("10.0.0.0/8", "orders", "forbidden"),
        ("cert:orders", "orders", {"value": 44}),
        ("cert:orders", "users", "forbidden"),
    ],
)
@pytest.mark.asyncio
async def test_grpc_knows_its_peers_likewise(
    numbers_proto: list[str], tmp_path: Path, rule: str, caller: str, result: Any
) -> None:
    authority = Authority(tmp_path)
    trust = {"cafile": authority.cafile, "proto_path": numbers_proto}
    address = Address("grpcs", "127.0.0.1", 0, {**trust, **authority.issue("shop")._asdict()})
    server = GrpcServer(address, guarded({"in_thread": [rule]}))
    await server.listen()
    try:
        own = address._replace(port=server.port, options={**trust, **authority.issue(caller)._asdict()})
        async with asyncio.timeout(20):
            assert await outcome(GrpcClient(own, "shop"), "Numbers/Square", {"value": 1}) == result
    finally:
        await server.close(0)


@pytest.mark.parametrize(("rule", "told_of"), [(["broker"], ["gone"]), (["10.0.0.0/8"], [])])
@pytest.mark.asyncio
async def test_an_event_of_somebody_else_is_not_heard(rule: list[str], told_of: list[str]) -> None:
    heard: list[str] = []

    @event_pattern("gone")
    async def gone() -> None:
        heard.append("gone")

    handlers = [Handler(gone)]
    dispatcher = Dispatcher("shop", handlers, Executor(1), [Allow("shop", {"gone": rule}, handlers)])
    task = dispatcher.dispatch(packet("gone", id=None), Answers(), transport="redis", peer="")
    assert task is not None
    failures = await task

    assert heard == told_of
    assert [error.status_code for error in failures] == [403] * (not told_of)


@pytest.mark.asyncio
async def test_a_refusal_is_seen_by_the_middlewares_outside_and_not_by_those_inside() -> None:
    seen: list[str] = []

    def noting(name: str) -> Callable[[Endpoint], Endpoint]:
        def middleware(endpoint: Endpoint) -> Endpoint:
            async def noted(data: Any, context: Any) -> Any:
                seen.append(name)
                return await endpoint(data, context)

            return noted

        return middleware

    middlewares = [noting("outside"), Allow("shop", {"answer": []}, HANDLERS), noting("inside")]
    dispatcher = Dispatcher("shop", HANDLERS, Executor(1), middlewares)
    answers = Answers()
    task = dispatcher.dispatch(packet({"cmd": "answer"}), answers, transport="tcp", peer="127.0.0.1:5")
    assert task is not None
    await task

    assert seen == ["outside"]
    assert answers.packets[0]["err"]["code"] == "forbidden"


def test_a_guard_leaves_inline_handlers_inline() -> None:
    guard = Guard("shop", Rule(["127.0.0.1"]))

    call = guard.in_place(lambda data, context: data)

    assert call(1, context(transport="local")) == 1
    with pytest.raises(RpcException) as caught:
        call(1, context(transport="redis"))
    assert caught.value.status_code == 403
