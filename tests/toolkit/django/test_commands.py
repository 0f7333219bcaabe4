"""The commands, as a shell sees them: what they print where, and the code they end with."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from pytest_django import Settings

import manage
from microservices import RpcContext, RpcException, event_pattern, message_pattern
from microservices.dispatcher import Dispatcher
from microservices.management.commands.send import read_data, read_metadata, read_pattern
from microservices.microservice import get_microservice
from microservices.transports import Address
from microservices.transports.tcp import TcpServer

Install = Callable[..., None]
Scratch = Callable[..., str]
Capture = pytest.CaptureFixture[str]


@message_pattern({"cmd": "echo"})
async def echo(data: Any) -> Any:
    return data


@message_pattern("who")
async def who(data: Any, ctx: RpcContext) -> str:
    return ctx.transport


@message_pattern("told")
async def told(data: Any, ctx: RpcContext) -> str:
    return ctx.metadata["tenant"]


@message_pattern("count")
async def count(data: int) -> AsyncIterator[int]:
    for number in range(data):
        yield number


@message_pattern("refuse")
async def refuse() -> None:
    error = {"pointer": "/name", "message": "Too long.", "code": "invalid"}
    raise RpcException({"statusCode": 404, "code": "item-gone", "message": "Gone.", "errors": [error]})


@message_pattern("late")
async def late() -> None:
    await asyncio.Event().wait()


def ending(*arguments: Any, **options: Any) -> int:
    """Run `manage.py ARGUMENTS` here and return the code that it ends with."""
    try:
        call_command(*arguments, **options)
    except CommandError as error:
        return error.returncode
    except SystemExit as error:
        return int(str(error.code))
    return 0


@pytest.fixture
def shop(install: Install, free_port: int) -> None:
    """A service of this process whose door is closed."""
    install(url=f"tcp://127.0.0.1:{free_port}", shop=[echo, who, told, count, refuse, late])


@asynccontextmanager
async def listening(dispatcher: Dispatcher) -> AsyncIterator[int]:
    """Open a TCP door to a service and give its port."""
    server = TcpServer(Address("tcp", "127.0.0.1", 0, {}), dispatcher)
    await server.listen()
    try:
        yield server.port
    finally:
        await server.close(1)


# patterns


def test_patterns_prints_a_table_of_every_door(capsys: Capture) -> None:
    call_command("patterns")

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["SERVICE", "PATTERN", "KIND", "RETRY", "DEADLINE", "DOORS", "HANDLER"]
    doors = ["tcp,", "grpc", "UsersService/FindOne"]
    assert lines[1] == ["users", "get_user", "request", "safe", "5", "s", *doors, "users.handlers.get_user"]


def test_the_columns_of_patterns_stand_below_their_names(capsys: Capture) -> None:
    call_command("patterns", "--service", "users")

    header, *rows = capsys.readouterr().out.splitlines()
    start = header.index("HANDLER")
    assert rows
    assert all(row[start - 1] == " " and row[start:].startswith("users.handlers.") for row in rows)


def test_patterns_as_json_tells_the_same_to_programs(capsys: Capture, install: Install) -> None:
    @message_pattern({"cmd": "get", "v": 2}, retry="keyed", deadline=1.5)
    async def get() -> None: ...

    @event_pattern("made")
    async def made() -> None: ...

    install(shop=[get, made])

    call_command("patterns", "--json", "--service", "shop")

    name = f"{__name__}.{test_patterns_as_json_tells_the_same_to_programs.__qualname__}.<locals>"
    assert json.loads(capsys.readouterr().out) == [
        {
            "service": "shop",
            "pattern": "cmd=get,v=2",
            "kind": "request",
            "retry": "keyed",
            "deadline": "1.5 s",
            "doors": "tcp",
            "handler": f"{name}.get",
        },
        {
            "service": "shop",
            "pattern": "made",
            "kind": "event",
            "retry": "-",
            "deadline": "-",
            "doors": "bus",
            "handler": f"{name}.made",
        },
    ]


def test_patterns_of_one_service_leaves_out_the_others(capsys: Capture, install: Install) -> None:
    install(shop=[echo], stock=[who])

    call_command("patterns", "--service", "stock")

    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["SERVICE", "stock"]


def test_patterns_leaves_out_services_that_do_not_live_here(capsys: Capture, install: Install) -> None:
    install(shop=[echo])  # beside the handlers of users, which SERVERS names no more

    call_command("patterns")

    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["SERVICE", "shop"]


def test_patterns_of_an_unknown_service_is_a_wrong_usage_that_names_the_known() -> None:
    with pytest.raises(
        CommandError,
        match=r"No service 'user' has handlers here; known: registry, users, orders, payments, notifications\.",
    ) as caught:
        call_command("patterns", "--service", "user")

    assert caught.value.returncode == 2


# send: what it is given


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("get_user", {"cmd": "get_user"}),
        ('"get_user"', "get_user"),
        ('{"cmd": "get_user", "v": 2}', {"cmd": "get_user", "v": 2}),
        ("5", 5),
        ("users.get", {"cmd": "users.get"}),
    ],
)
def test_a_bare_word_is_a_cmd_and_json_is_the_pattern_itself(text: str, pattern: Any) -> None:
    assert read_pattern(text) == pattern


def test_data_is_json_or_a_file_or_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data.json"
    file.write_text('{"name": "Zoë"}', encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("[1, 2]"))

    assert read_data('{"id": 1}') == {"id": 1}
    assert read_data(f"@{file}") == {"name": "Zoë"}
    assert read_data("-") == [1, 2]


@pytest.mark.parametrize("text", ["{", "@/no/such/file", "@{file}"])
def test_data_that_is_no_json_is_a_wrong_usage(tmp_path: Path, text: str) -> None:
    file = tmp_path / "latin.json"
    file.write_bytes('"Zoë"'.encode("latin-1"))

    with pytest.raises(CommandError, match="The data is no JSON") as caught:
        read_data(text.replace("{file}", str(file)))

    assert caught.value.returncode == 2


def test_metadata_is_split_at_its_first_equals_sign() -> None:
    assert read_metadata("token=a=b") == ("token", "a=b")
    assert read_metadata("empty=") == ("empty", "")


@pytest.mark.parametrize("text", ["token", "=value"])
def test_metadata_without_a_name_and_a_value_is_a_wrong_usage(text: str) -> None:
    with pytest.raises(CommandError, match="-H takes NAME=VALUE") as caught:
        read_metadata(text)

    assert caught.value.returncode == 2


# send: how it goes


@pytest.mark.usefixtures("shop")
def test_send_calls_a_service_of_this_process_when_nobody_listens_and_says_so(capsys: Capture) -> None:
    code = ending("send", "shop", "echo", '{"id": 1}')

    out, err = capsys.readouterr()
    assert (code, out) == (0, '{"id":1}\n')
    assert err.startswith("ok  shop in this process  ")


@pytest.mark.asyncio
async def test_send_goes_by_the_wire_where_the_map_has_somebody_who_listens(capsys: Capture, install: Install) -> None:
    install(shop=[who])
    async with listening(get_microservice("shop").dispatcher) as port:
        install(url=f"tcp://127.0.0.1:{port}", shop=[who])

        code = await asyncio.to_thread(ending, "send", "shop", '"who"')

    out, err = capsys.readouterr()
    assert (code, out) == (0, '"tcp"\n')
    assert f"ok  shop tcp://127.0.0.1:{port}  " in err


@pytest.mark.asyncio
async def test_send_reaches_any_address(capsys: Capture, install: Install) -> None:
    install(shop=[echo])
    dispatcher = get_microservice("shop").dispatcher
    install(other=[])
    async with listening(dispatcher) as port:
        code = await asyncio.to_thread(ending, "send", f"tcp://127.0.0.1:{port}", "echo", "7")

    out, err = capsys.readouterr()
    assert (code, out) == (0, "7\n")
    assert f"tcp://127.0.0.1:{port}" in err


@pytest.mark.usefixtures("shop")
def test_send_prints_each_value_of_a_stream_on_a_line(capsys: Capture) -> None:
    code = ending("send", "shop", '"count"', "3")

    assert (code, capsys.readouterr().out) == (0, "0\n1\n2\n")


@pytest.mark.usefixtures("shop")
def test_letters_of_all_languages_are_printed_as_they_are(capsys: Capture) -> None:
    call_command("send", "shop", "echo", '{"name": "Zo\\u00eb 😀"}')

    assert capsys.readouterr().out == '{"name":"Zoë 😀"}\n'


@pytest.mark.usefixtures("shop")
def test_the_key_of_send_becomes_the_idempotency_key_of_the_data(capsys: Capture) -> None:
    code = ending("send", "shop", "echo", '{"id": 1}', "--key", "abc")

    assert (code, capsys.readouterr().out) == (0, '{"id":1,"idempotency_key":"abc"}\n')


@pytest.mark.usefixtures("shop")
def test_metadata_travels_beside_the_data(capsys: Capture) -> None:
    code = ending("send", "shop", '"told"', "-H", "tenant=north", "-H", "other=1")

    assert (code, capsys.readouterr().out) == (0, '"north"\n')


@pytest.mark.usefixtures("shop")
def test_count_sends_it_so_many_times_and_reports_each(capsys: Capture) -> None:
    code = ending("send", "shop", "echo", "1", "--count", "3")

    out, err = capsys.readouterr()
    assert (code, out) == (0, "1\n1\n1\n")
    assert [line.split()[0] for line in err.splitlines() if line.startswith("ok")] == ["ok"] * 3


def test_one_failure_among_many_is_a_failure(install: Install, free_port: int) -> None:
    turns: Iterator[int] = iter(range(3))

    @message_pattern({"cmd": "flaky"})
    async def flaky() -> None:
        if next(turns) == 1:
            raise RpcException("Not now.")

    install(url=f"tcp://127.0.0.1:{free_port}", shop=[flaky])

    assert ending("send", "shop", "flaky", "--count", "3") == 4


@pytest.mark.usefixtures("shop")
def test_raw_prints_nothing_but_the_answer(capsys: Capture) -> None:
    call_command("send", "shop", "echo", "1", "--raw")

    out, err = capsys.readouterr()
    assert out == "1\n"
    assert "ok" not in err


# send: how it ends


@pytest.mark.usefixtures("shop")
def test_an_error_of_the_service_ends_with_4_and_tells_its_fields(capsys: Capture) -> None:
    code = ending("send", "shop", '"refuse"')

    out, err = capsys.readouterr()
    assert (code, out) == (4, "")
    assert 'error 404 item-gone "Gone."\n  /name: Too long.  shop in this process' in err


@pytest.mark.usefixtures("shop")
def test_a_pattern_that_nobody_handles_ends_with_4(capsys: Capture) -> None:
    code = ending("send", "shop", "nothing")

    assert code == 4
    assert "error 502 no-handler" in capsys.readouterr().err


@pytest.mark.usefixtures("shop")
def test_no_answer_in_time_ends_with_3(capsys: Capture) -> None:
    code = ending("send", "shop", '"late"', "--timeout", "0.05")

    assert code == 3
    assert "timeout" in capsys.readouterr().err


def test_an_address_where_nobody_listens_ends_with_1(capsys: Capture, free_port: int) -> None:
    code = ending("send", f"tcp://127.0.0.1:{free_port}", "echo")

    assert code == 1
    assert f"cannot be reached at tcp://127.0.0.1:{free_port}" in capsys.readouterr().err


def test_a_service_that_lives_elsewhere_and_is_down_ends_with_1(
    install: Install, settings: Settings, free_port: int
) -> None:
    install(url=f"tcp://127.0.0.1:{free_port}", shop=[echo])
    settings.MICROSERVICES = {**settings.MICROSERVICES, "SERVERS": {}}

    assert ending("send", "shop", "echo") == 1


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param(["shoe", "echo"], "There is no service 'shoe'; known: shop, or give a URL.", id="service"),
        pytest.param(["tpc://127.0.0.1:3001", "echo"], "Did you mean tcp://?", id="scheme"),
        pytest.param(["memory://", "echo"], "memory:// cannot call a service", id="no way to call"),
        pytest.param(["shop", "null"], "None can never match", id="pattern"),
        pytest.param(["shop", "echo", "{"], "The data is no JSON", id="data"),
        pytest.param(["shop", "echo", "[]", "--key", "abc"], "--key needs an object", id="key"),
        pytest.param(["shop", "echo", "-H", "tenant"], "-H takes NAME=VALUE, not 'tenant'.", id="metadata"),
    ],
)
def test_a_wrong_usage_ends_with_2_and_says_what_would_be_right(arguments: list[str], text: str) -> None:
    with pytest.raises(CommandError) as caught:
        call_command("send", *arguments)

    assert text in str(caught.value)
    assert caught.value.returncode == 2


# migratefleet


@pytest.mark.django_db(databases="__all__")
def test_migratefleet_says_nothing_when_all_is_up_to_date(capsys: Capture) -> None:
    call_command("migratefleet")

    assert capsys.readouterr().out == ""


@pytest.mark.django_db(databases="__all__")
def test_migratefleet_names_the_databases_that_it_migrates(capsys: Capture, scratch: Scratch) -> None:
    alias = scratch()

    call_command("migratefleet")
    first = capsys.readouterr().out
    call_command("migratefleet")
    second = capsys.readouterr().out

    assert (first, second) == ("Migrating scratch.\n", "")
    assert "django_migrations" in connections[alias].introspection.table_names()


@pytest.mark.django_db(databases="__all__")
def test_migratefleet_seeds_when_it_is_asked_to(capsys: Capture) -> None:
    call_command("migratefleet", "--seed")

    printed = capsys.readouterr().out
    assert "30 users written." in printed
    assert "20 products written." in printed


# The commands that run processes refuse before they start any


def test_runfleet_refuses_names_that_are_not_on_the_map() -> None:
    with pytest.raises(CommandError, match=r"No usres, nobody on the map; known: gateway, users, orders,") as caught:
        call_command("runfleet", "users", "usres", "nobody")

    assert caught.value.returncode == 2


def test_runmicroservice_refuses_names_that_are_not_on_the_map() -> None:
    with pytest.raises(CommandError, match=r"There is no service 'usres'; known: users, orders,") as caught:
        call_command("runmicroservice", "users", "usres")

    assert caught.value.returncode == 2


def test_runmicroservice_refuses_a_service_that_services_leaves_out(settings: Settings) -> None:
    settings.MICROSERVICES = {**settings.MICROSERVICES, "SERVERS": {}}

    with pytest.raises(CommandError, match="users does not live here: SERVICES leaves it out") as caught:
        call_command("runmicroservice", "users")

    assert caught.value.returncode == 2


def test_runmicroservice_needs_a_health_port(install: Install) -> None:
    install(shop=[echo])

    with pytest.raises(CommandError, match="shop has no health port: give it one with --health-port"):
        call_command("runmicroservice", "shop")


@pytest.mark.parametrize("arguments", [["serve", "--port"], ["runmicroservice", "users", "--health-port"]])
def test_a_taken_port_is_an_error_that_names_it(taken_port: int, arguments: list[str]) -> None:
    with pytest.raises(CommandError, match=f"HTTP cannot listen on 127.0.0.1:{taken_port}: Address already in use"):
        call_command(*arguments, str(taken_port))


# manage.py


@pytest.mark.parametrize(
    ("given", "services"),
    [
        (["manage.py", "runmicroservice", "users"], "users"),
        (["manage.py", "runmicroservice", "--health-port", "9001", "users"], "users"),
        (["manage.py", "runmicroservice", "usres"], None),
        (["manage.py", "patterns", "--service", "users"], None),
        (["manage.py"], None),
    ],
)
def test_manage_makes_runmicroservice_a_process_of_just_that_service(
    monkeypatch: pytest.MonkeyPatch, given: list[str], services: str | None
) -> None:
    monkeypatch.setattr(os, "environ", environ := {"PATH": os.environ["PATH"]})

    manage.live_here(given)

    assert environ.get("SERVICES") == services


def test_manage_leaves_services_alone_where_the_shell_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICES", "gateway,users")

    manage.live_here(["manage.py", "runmicroservice", "users"])

    assert os.environ["SERVICES"] == "gateway,users"


# emit


def test_emit_hands_an_event_to_the_bus_and_says_so(capsys: Capture, install: Install, tmp_path: Path) -> None:
    heard: list[Any] = []

    @event_pattern("made")
    async def made(data: Any, context: RpcContext) -> None:
        heard.append((data, context.metadata["id"]))

    install(shop=[made])
    file = tmp_path / "made.json"
    file.write_text('{"size": 3}', encoding="utf-8")

    call_command("emit", "made", f"@{file}", "-H", "id=7")

    assert heard == [({"size": 3}, "7")]
    assert capsys.readouterr().err.startswith("handed over  memory://")


def test_emit_tells_by_its_exit_code_that_the_bus_is_away(capsys: Capture, install: Install, free_port: int) -> None:
    install(shop=[], events_url=f"redis-streams://127.0.0.1:{free_port}")

    with pytest.raises(SystemExit) as caught:
        call_command("emit", "made", "{}")

    assert caught.value.code == 1
    assert "error 503" in capsys.readouterr().err


def test_emit_of_what_is_no_json_is_a_wrong_usage() -> None:
    with pytest.raises(CommandError, match="no JSON") as caught:
        call_command("emit", "made", "{")

    assert caught.value.returncode == 2
