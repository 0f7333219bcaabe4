"""How many requests and WebSockets a process takes at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from microservices.gate import Gate
from microservices.instruments import dropped
from tests.toolkit.django.conftest import turn

pytestmark = pytest.mark.asyncio

Message = dict[str, Any]


class Pages:
    """An application whose answers wait until they may go."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        await self.may_answer.wait()
        await send({"type": "answer"})


def ask(gate: Gate, path: str, kind: str = "http") -> asyncio.Task[list[Message]]:
    """Ask for a page; the task gives what was answered."""
    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    async def asking() -> list[Message]:
        await gate({"type": kind, "path": path, "headers": []}, nothing_more, send)
        return told

    return asyncio.create_task(asking())


async def nothing_more() -> Message:
    raise AssertionError("the body of a refused request was read")


async def test_so_many_are_worked_on_so_many_wait_and_the_rest_is_refused() -> None:
    pages = Pages()
    gate = Gate(pages, "gateway", requests=2)
    before = dropped.value("gateway", "http", "overloaded")

    asked = [ask(gate, f"/{number}") for number in range(5)]
    await turn()
    full = [(bound.place, bound.used, bound.limit) for bound in gate.bounds]
    (start, body), path = asked[4].result(), "/4"
    pages.may_answer.set()
    answers = await asyncio.gather(*asked[:4])

    assert full == [("http", 2, 2), ("http-queue", 2, 2), ("http-bodies", 0, 2), ("websockets", 0, 1000)]
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
    problem = msgspec.json.decode(body["body"])
    assert (problem["code"], problem["instance"], problem["retryable"]) == ("overloaded", path, True)
    assert answers == [[{"type": "answer"}]] * 4
    assert pages.asked == ["/0", "/1", "/2", "/3"]
    assert dropped.value("gateway", "http", "overloaded") == before + 1
    assert gate.bounds[0].used == 0


async def test_who_does_not_get_its_turn_in_time_is_told() -> None:
    pages = Pages()
    gate = Gate(pages, "gateway", requests=1, patience=0.01)
    running = ask(gate, "/slow")

    start, _ = await ask(gate, "/next")
    pages.may_answer.set()
    await running
    after = await ask(gate, "/later")

    assert start["status"] == 503
    assert after == [{"type": "answer"}]


async def test_who_gives_up_leaves_its_place_to_others() -> None:
    pages = Pages()
    gate = Gate(pages, "gateway", requests=1)
    running, waiting, third = ask(gate, "/running"), ask(gate, "/waiting"), None
    await turn()
    waiting.cancel()
    await turn()
    third = ask(gate, "/third")
    await turn()
    running.cancel()
    pages.may_answer.set()

    assert await third == [{"type": "answer"}]
    assert pages.asked == ["/running", "/third"]
    assert gate.bounds[0].used == 0


@pytest.mark.parametrize("page", ["/livez", "/readyz", "/startupz", "/health", "/metrics"])
async def test_a_crowd_does_not_hide_a_process_from_its_operators(page: str) -> None:
    pages = Pages()
    gate = Gate(pages, "gateway", requests=1)
    crowd = [ask(gate, "/crowd") for _ in range(2)]
    await turn()

    asked = ask(gate, page)
    await turn()
    pages.may_answer.set()

    assert await asked == [{"type": "answer"}]
    assert pages.asked[1] == page
    await asyncio.gather(*crowd)


async def test_one_websocket_too_many_is_told_to_try_later() -> None:
    pages = Pages()
    gate = Gate(pages, "gateway", sockets=1)
    first = ask(gate, "/ws", "websocket")
    await turn()

    second = await ask(gate, "/ws", "websocket")
    pages.may_answer.set()
    await first
    third = await ask(gate, "/ws", "websocket")

    assert second == [{"type": "websocket.close", "code": 1013}]
    assert third == [{"type": "answer"}]


async def test_without_a_limit_all_are_taken() -> None:
    pages = Pages()
    gate = Gate(pages, "gateway", requests=0, sockets=0)
    asked = [ask(gate, "/", kind) for kind in ("http", "websocket") for _ in range(500)]
    await turn()
    pages.may_answer.set()

    assert all(answer == [{"type": "answer"}] for answer in await asyncio.gather(*asked))
    assert gate.bounds == []


class Upload:
    """What a sender sends, piece by piece; what is not sent is waited for."""

    def __init__(self, *pieces: bytes, whole: bool = True) -> None:
        self._waiting: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        if whole:
            self._waiting[-1]["more_body"] = False
        self.read = 0

    async def __call__(self) -> Message:
        if not self._waiting:
            await asyncio.Event().wait()
        self.read += 1
        return self._waiting.pop(0)


class Reader:
    """An application that tells what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def post(gate: Gate, receive: Any, length: int | None = None, path: str = "/orders") -> tuple[int, Message]:
    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    header = (b"transfer-encoding", b"chunked") if length is None else (b"content-length", b"%d" % length)
    await gate({"type": "http", "path": path, "headers": [header]}, receive, send)
    return told[0]["status"], msgspec.json.decode(told[1]["body"]) if len(told) > 1 else {}


async def test_a_body_comes_in_one_piece() -> None:
    reader = Reader()

    status, _ = await post(Gate(reader, "gateway"), Upload(b"in ", b"pieces"))

    assert (status, reader.bodies) == (200, [b"in pieces"])


async def test_a_slow_sender_takes_nobodys_place() -> None:
    pages = Pages()
    pages.may_answer.set()
    gate = Gate(pages, "gateway", requests=1)
    slow = asyncio.create_task(post(gate, Upload(b"never ", whole=False)))
    await turn()

    page = await ask(gate, "/page")
    status, problem = await post(gate, Upload(b"me, too"))
    slow.cancel()

    assert page == [{"type": "answer"}]
    assert (status, problem["code"]) == (503, "overloaded")
    await asyncio.wait([slow])
    assert gate.bounds[2].used == 0


@pytest.mark.parametrize("path", ["/orders", "/metrics"])
async def test_a_body_that_is_too_large_is_refused_before_it_is_read(path: str) -> None:
    gate = Gate(Reader(), "gateway", body=8)
    upload = Upload(b"123456789")

    status, problem = await post(gate, upload, 9, path)

    assert (status, problem["code"], problem["retryable"]) == (413, "body-too-large", False)
    assert upload.read == 0


async def test_a_body_that_does_not_tell_its_length_is_read_up_to_the_limit() -> None:
    gate = Gate(Reader(), "gateway", body=8)
    upload = Upload(b"12345", b"6789", b"and so on", b"and so on")

    status, problem = await post(gate, upload)

    assert (status, problem["code"]) == (413, "body-too-large")
    assert upload.read == 2


async def test_a_body_must_come_within_its_time() -> None:
    status, problem = await post(Gate(Reader(), "gateway", body_time=0.01), Upload(b"never ", whole=False), 9)

    assert (status, problem["code"]) == (408, "body-too-slow")


async def test_who_leaves_while_it_sends_is_told_nothing() -> None:
    reader = Reader()

    async def leave() -> Message:
        return {"type": "http.disconnect"}

    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    headers = [(b"content-length", b"5")]
    await Gate(reader, "gateway")({"type": "http", "path": "/", "headers": headers}, leave, send)

    assert (reader.bodies, told) == ([], [])


async def test_without_a_limit_the_application_reads_for_itself() -> None:
    reader = Reader()

    status, _ = await post(Gate(reader, "gateway", body=0), Upload(b"123456789"))

    assert (status, reader.bodies) == (200, [b"123456789"])
