"""Addresses: which transport, where, with which options."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from microservices.exceptions import ConfigurationError
from microservices.transports import Address, load, parse, read_options, tcp
from microservices.transports.local import MemoryBus
from microservices.transports.tcp import TcpClient, TcpServer

APPS = Path(__file__).parents[3] / "apps"


class Options(msgspec.Struct):
    """What a URL may set."""

    idle_timeout: float = 300
    max_connections: int = 1024


def test_a_url_is_split_into_its_parts() -> None:
    address = parse("tcp://[::1]:3001?idle_timeout=1.5&max_connections=5")

    assert address == Address("tcp", "::1", 3001, {"idle_timeout": "1.5", "max_connections": "5"})
    assert parse("memory://") == Address("memory", "", 0, {})


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("tpc://127.0.0.1:3001", r"Did you mean tcp://\?"),
        ("http2://127.0.0.1:3001", "Known: memory://, tcp://, .*grpcs://"),
        ("127.0.0.1", "Unknown transport"),
        ("", "Unknown transport"),
        ("tcp://127.0.0.1", "must name a host and a port"),
        ("tcp://:3001", "must name a host and a port"),
        ("tcp://127.0.0.1:many", "Port could not be cast"),
        ("tcp://127.0.0.1:70000", "out of range"),
        ("tcp://127.0.0.1:3001,127.0.0.1:3002", "several addresses"),
    ],
)
def test_a_wrong_url_is_explained(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        parse(url)


def test_weight_and_zone_of_an_instance_are_no_options_of_its_transport() -> None:
    address = parse("tcp://127.0.0.1:3001?idle_timeout=1&weight=3&zone=west")

    assert address == Address("tcp", "127.0.0.1", 3001, {"idle_timeout": "1"}, weight=3, zone="west")
    assert parse("redis://127.0.0.1?zone=west").options == {"zone": "west"}
    assert load(address, "client") is TcpClient
    with pytest.raises(ConfigurationError, match="weight and zone are for callers"):
        load(address, "server")


@pytest.mark.parametrize("weight", ["0", "-1", "1.5", "101", "much", ""])
def test_a_wrong_weight_is_explained(weight: str) -> None:
    with pytest.raises(ConfigurationError, match=f"weight={weight}': weight is a whole number from 1 to 100"):
        parse(f"tcp://127.0.0.1:3001?weight={weight}")


def test_an_address_is_shown_without_its_options() -> None:
    assert str(parse("tcp://127.0.0.1:3001?idle_timeout=1")) == "tcp://127.0.0.1:3001"
    assert str(parse("memory://")) == "memory://"


def test_options_are_read_as_what_they_are() -> None:
    options = read_options(Options, parse("tcp://127.0.0.1:3001?idle_timeout=1.5"))

    assert options == Options(idle_timeout=1.5)


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("idle_timeot=1", "unknown option 'idle_timeot'; did you mean 'idle_timeout'"),
        ("zzz=1", "known are idle_timeout, max_connections"),
        ("max_connections=many", "tcp://127.0.0.1:3001: .*max_connections"),
        ("max_connections=1.5", "max_connections"),
    ],
)
def test_a_wrong_option_is_explained(query: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        read_options(Options, parse(f"tcp://127.0.0.1:3001?{query}"))


def test_the_defaults_of_tcp_are_those_that_are_documented() -> None:
    options = read_options(tcp.Options, parse("tcp://127.0.0.1:3001"))

    assert (options.max_buffer_size, options.max_send_buffer_size) == (1024 * 1024, 1024 * 1024)
    assert (options.incomplete_message_timeout, options.idle_timeout) == (10, 300)
    assert (options.max_in_flight, options.max_connections) == (256, 1024)


def test_a_scheme_names_a_class_for_each_part_that_it_plays() -> None:
    tcp, memory = parse("tcp://127.0.0.1:3001"), parse("memory://")

    assert (load(tcp, "server"), load(tcp, "client"), load(memory, "bus")) == (TcpServer, TcpClient, MemoryBus)


def test_a_part_that_a_scheme_cannot_play_is_explained() -> None:
    with pytest.raises(ConfigurationError, match="memory:// cannot serve a service; use tcp://, tcps://, redis://"):
        load(parse("memory://"), "server")
    with pytest.raises(ConfigurationError, match="tcp:// cannot carry events; use memory://"):
        load(parse("tcp://127.0.0.1:3001"), "bus")


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://[::1", "is no URL: Invalid IPv6 URL"),
        ("redis://u:p@h1:1,u:p@h2:2", "stand once, before the first host"),
    ],
)
def test_an_odd_url_is_explained(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        parse(url)


@pytest.mark.parametrize("url", ["redis://user:pa/ss@host", "redis://user:pa#ss@host", "redis://user:pa?ss@host"])
def test_a_password_that_should_be_percent_encoded_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(url)

    assert "pa" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["tcp", "redis", "redis-streams", "mqtt", "amqp"])
def test_files_for_tls_are_refused_where_there_is_none(scheme: str) -> None:
    address = parse(f"{scheme}://localhost:1?cafile=ca.pem")

    with pytest.raises(ConfigurationError, match="is without TLS, and has no use for cafile"):
        load(address, "bus" if "-" in scheme else "client")(address, "shop")


@pytest.mark.parametrize(
    ("scheme", "driver", "extra"),
    [
        ("redis", "hiredis", "redis"),
        ("amqp", "pamqp", "rmq"),
        ("kafka", "aiokafka", "kafka"),
        ("grpc", "grpc", "grpc"),
    ],
)
def test_a_driver_that_is_missing_is_told_with_what_brings_it(scheme: str, driver: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{driver!r}] = None\n"
        "from microservices.transports import load, parse\n"
        f"load(parse('{scheme}://h:1'), 'server')\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=APPS)

    assert f"ConfigurationError: {scheme}:// needs {driver}" in done.stderr
    assert f"pip install 'django-hybrid-microservices[{extra}]'" in done.stderr
