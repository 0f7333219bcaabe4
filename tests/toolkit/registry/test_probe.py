"""How an instance is asked whether it is there, and where nobody is asked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from microservices.conf import PRIVATE_NETWORKS
from microservices.registry.probe import networks, probe, probe_all

pytestmark = pytest.mark.asyncio

PRIVATE = networks(PRIVATE_NETWORKS)


class Peer:
    """A server that says `answer` to whoever connects, and keeps what it was asked."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.asked: list[bytes] = []
        self.port = 0
        self.over = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n") if self.answer else b"")
        writer.write(self.answer)
        if not self.answer:
            await self.over.wait()
        writer.close()


@asynccontextmanager
async def listening(answer: bytes) -> AsyncIterator[Peer]:
    peer = Peer(answer)
    server = await asyncio.start_server(peer, "127.0.0.1", 0)
    peer.port = server.sockets[0].getsockname()[1]
    try:
        yield peer
    finally:
        peer.over.set()
        server.close()


def resolving(to: str) -> Callable[..., Awaitable[Any]]:
    """Make every name lead to one address."""

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (to, port))]

    return getaddrinfo


@pytest.mark.parametrize(
    ("answer", "passed", "text"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True, "/readyz 200 in "),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False, "/readyz 503 in "),
        (b"SSH-2.0-OpenSSH\r\n", False, "its health page speaks no HTTP"),
        (b"HTTP/1.1 <b>\r\n", False, "its health page speaks no HTTP"),
    ],
)
async def test_a_health_page_is_asked_whether_the_process_is_ready(answer: bytes, passed: bool, text: str) -> None:
    async with listening(answer) as peer:
        outcome = await probe({"tcp": "tcp://127.0.0.1:1", "health": f"http://127.0.0.1:{peer.port}"}, PRIVATE)

    assert (outcome.passed, outcome.text[: len(text)]) == (passed, text)
    assert peer.asked[0].startswith(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % peer.port)


async def test_a_redirect_is_an_answer_and_not_followed() -> None:
    async with listening(b"HTTP/1.1 200 OK\r\n\r\n") as other:
        moved = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\n\r\n" % other.port
        async with listening(moved) as peer:
            outcome = await probe({"health": f"http://127.0.0.1:{peer.port}"}, PRIVATE)

    assert not outcome.passed
    assert outcome.text.startswith("/readyz 302")
    assert other.asked == []


async def test_without_a_page_a_door_that_opens_is_enough() -> None:
    async with listening(b"") as peer:
        outcome = await probe({"tcp": f"tcp://127.0.0.1:{peer.port}"}, PRIVATE)

    assert outcome.passed
    assert outcome.text.startswith(f"tcp://127.0.0.1:{peer.port} opened in ")


@pytest.mark.parametrize(
    "addresses",
    [{}, {"redis": "redis://127.0.0.1:6379"}, {"gopher": "gopher://127.0.0.1:70"}],
    ids=["nothing", "a broker's", "unknown"],
)
async def test_an_address_that_says_nothing_of_the_instance_is_not_asked(addresses: dict[str, str]) -> None:
    outcome = await probe(addresses, PRIVATE)

    assert outcome == (False, "it has no address that could be asked")


@pytest.mark.parametrize("url", ["http://127.0.0.1", "http://127.0.0.1:99999", "http://[::1", "http://:80"])
async def test_what_is_no_url_is_a_failure_in_words(url: str) -> None:
    outcome = await probe({"health": url}, PRIVATE)

    assert not outcome.passed
    assert url in outcome.text


async def test_who_refuses_is_a_failure_in_words(unused_tcp_port: int) -> None:
    outcome = await probe({"health": f"http://127.0.0.1:{unused_tcp_port}"}, PRIVATE)

    assert not outcome.passed
    assert outcome.text.startswith(f"http://127.0.0.1:{unused_tcp_port}: ")


async def test_who_takes_too_long_has_failed() -> None:
    async with listening(b"") as peer:
        outcome = await probe({"health": f"http://127.0.0.1:{peer.port}"}, PRIVATE, limit=0.05)

    assert outcome == (False, f"http://127.0.0.1:{peer.port}: no answer within 0.05 s")


@pytest.mark.parametrize(
    "ip",
    ["169.254.169.254", "8.8.8.8", "::ffff:169.254.169.254", "fe80::1%lo", "0.0.0.0"],  # noqa: S104 - not bound to
)
async def test_nobody_outside_of_the_networks_is_asked_by_whatever_name(
    monkeypatch: pytest.MonkeyPatch, ip: str
) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolving(ip))
    asked: list[Any] = []

    async def connect(*args: Any, **_: Any) -> Any:
        asked.append(args)
        raise OSError

    monkeypatch.setattr(asyncio, "open_connection", connect)

    outcome = await probe({"health": "http://metadata:80"}, PRIVATE)

    assert outcome == (False, "metadata lies outside of PROBE_NETWORKS: not asked")
    assert asked == []


async def test_a_name_is_resolved_once_and_its_number_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(b"HTTP/1.1 200 OK\r\n\r\n") as peer:
        loop, looked_up = asyncio.get_running_loop(), []
        real = loop.getaddrinfo

        async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
            looked_up.append(host)
            return await (resolving("127.0.0.1") if host == "users" else real)(host, port, **options)

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        outcome = await probe({"health": f"http://users:{peer.port}"}, PRIVATE)

    assert outcome.passed
    assert looked_up.count("users") == 1
    assert b"Host: users:%d\r\n" % peer.port in peer.asked[0]


async def test_several_are_asked_at_the_same_time_and_told_in_their_order() -> None:
    async with listening(b"HTTP/1.1 200 OK\r\n\r\n") as well, listening(b"HTTP/1.1 503 No\r\n\r\n") as ill:
        pages = [{"health": f"http://127.0.0.1:{peer.port}"} for peer in (well, ill, well)]

        outcomes = await probe_all(pages, PRIVATE)

    assert [outcome.passed for outcome in outcomes] == [True, False, True]
