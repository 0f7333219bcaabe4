"""The WebSocket of a browser, from its handshake to its close."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Set
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator
from channels.layers import get_channel_layer
from channels.testing import WebsocketCommunicator
from pytest_django import Settings

from config.asgi import application
from gateway import sockets
from gateway.routing import websocket_urlpatterns
from gateway.sockets import NotificationsSocket
from microservices.instruments import dropped
from microservices.lifecycle import State, lifecycle

pytestmark = pytest.mark.asyncio

ADA = "0199f6a2-1111-7000-8000-00000000000a"
HOME = [(b"origin", b"http://localhost")]


@pytest.fixture(autouse=True)
def _layer(settings: Settings) -> None:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}


def browser(path: str = "/ws/notifications", headers: list[tuple[bytes, bytes]] | None = None) -> WebsocketCommunicator:
    return WebsocketCommunicator(application, path, HOME if headers is None else headers)


async def browser_of(user_id: str) -> WebsocketCommunicator:
    """Return a browser that has named its user and heard that this was understood."""
    one = browser()
    assert (await one.connect())[0]
    await one.send_json_to({"user_id": user_id})
    assert await one.receive_json_from() == {"type": "ready"}
    return one


async def notify(user_id: str, **notification: Any) -> None:
    await get_channel_layer().group_send(f"user.{user_id}", {"type": "notify", "notification": notification})


async def closed_with(one: ApplicationCommunicator) -> Any:
    output = await one.receive_output(5)
    return output["type"], output.get("code")


async def hang_up(one: WebsocketCommunicator) -> None:
    await one.disconnect()
    assert lifecycle.on_drain == set()


async def test_a_browser_hears_the_notifications_of_its_user() -> None:
    one = await browser_of(ADA)

    await notify(ADA, id="1", title="Welcome")

    assert await one.receive_json_from() == {
        "type": "notification",
        "notification": {"id": "1", "title": "Welcome"},
    }
    await hang_up(one)


async def test_a_browser_hears_nothing_that_is_for_another_user() -> None:
    one = await browser_of(ADA)

    await notify("0199", id="1")

    assert await one.receive_nothing()
    await hang_up(one)


async def test_all_browsers_of_a_user_hear_it() -> None:
    both = [await browser_of(ADA), await browser_of(ADA)]

    await notify(ADA, id="1")

    assert [(await one.receive_json_from())["notification"]["id"] for one in both] == ["1", "1"]
    for one in both:
        await one.disconnect()


async def test_a_browser_that_has_gone_leaves_nothing_behind() -> None:
    one = await browser_of(ADA)
    layer = get_channel_layer()
    during = set(layer.groups)

    await hang_up(one)

    assert during == {f"user.{ADA}"}
    assert (layer.groups, layer.channels) == ({}, {})


@pytest.mark.parametrize(
    "said",
    [
        "ada",
        "null",
        '"0199"',
        "[]",
        "{}",
        '{"user_id": 1}',
        '{"user_id": ""}',
        '{"user_id": "0199.*"}',
        '{"user_id": "0199\\n"}',
        '{"user_id": "ada lovelace"}',
        json.dumps({"user_id": "0" * 37}),
        '{"user_id": "0199", "more": ' + "[" * 4000,
        b"\xff",
    ],
)
async def test_a_first_message_that_names_nobody_closes_the_socket(said: str | bytes) -> None:
    one = browser()
    await one.connect()

    if isinstance(said, str):
        await one.send_to(text_data=said)
    else:
        await one.send_to(bytes_data=said)

    assert await closed_with(one) == ("websocket.close", 4401)
    await hang_up(one)


async def test_a_browser_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "PATIENCE_TO_BE_NAMED", 0.05)
    one = browser()
    await one.connect()

    assert await closed_with(one) == ("websocket.close", 4401)
    await one.wait()
    assert lifecycle.on_drain == set()


async def test_a_browser_that_has_named_its_user_may_stay_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "PATIENCE_TO_BE_NAMED", 0.05)
    one = await browser_of(ADA)

    assert await one.receive_nothing(0.2)
    await hang_up(one)


async def test_a_message_over_4_kib_closes_the_socket() -> None:
    one = browser()
    await one.connect()

    await one.send_to(text_data=json.dumps({"user_id": "0199", "more": "x" * 4096}))

    assert await closed_with(one) == ("websocket.close", 1009)
    await hang_up(one)


async def test_a_second_message_closes_the_socket() -> None:
    one = await browser_of(ADA)

    await one.send_json_to({"user_id": "0199"})

    assert await closed_with(one) == ("websocket.close", 1008)
    await hang_up(one)


# The handshake


@pytest.mark.parametrize("origin", [b"http://localhost", b"http://127.0.0.1:3000", b"https://localhost"])
async def test_a_page_of_an_allowed_host_may_open_it(origin: bytes) -> None:
    one = browser(headers=[(b"origin", origin)])

    assert (await one.connect())[0]
    await hang_up(one)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"origin", b"https://evil.example")],
        [(b"origin", b"null")],
        [(b"origin", b"http://localhost.evil.example")],
    ],
    ids=["none", "foreign", "null", "lookalike"],
)
async def test_any_other_page_may_not(headers: list[tuple[bytes, bytes]]) -> None:
    one = browser(headers=headers)

    assert not (await one.connect())[0]


async def test_an_unknown_path_is_refused() -> None:
    one = browser("/ws/elsewhere")

    assert not (await one.connect())[0]


async def test_no_path_holds_an_id() -> None:
    assert [str(pattern.pattern) for pattern in websocket_urlpatterns] == ["ws/notifications", ""]


# The end of the process


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    monkeypatch.setattr(lifecycle, "state", lifecycle.state)
    monkeypatch.setattr(lifecycle, "microservices", ())
    return lifecycle.drain


async def test_a_process_that_drains_closes_its_sockets_within_two_seconds(drained: Callable[[], Any]) -> None:
    both = [await browser_of(ADA), await browser_of(ADA)]

    async with asyncio.timeout(2):
        await drained()

    assert [await closed_with(one) for one in both] == [("websocket.close", 1012)] * 2
    for one in both:
        await one.disconnect()


async def test_a_server_that_keeps_the_standard_codes_to_itself_closes_with_one_of_the_shops(
    drained: Callable[[], Any],
) -> None:
    deaf = Deaf(refuses={1012})
    await deaf.until_sent(2)

    await drained()
    deaf.inbox.put_nowait({"type": "websocket.disconnect", "code": 4012})
    await deaf.socket

    assert deaf.sent[-1] == {"type": "websocket.close", "code": 4012}


async def test_a_process_that_drains_takes_no_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "state", State.DRAINING)
    one = browser()

    assert not (await one.connect())[0]


# A browser that does not read


class Deaf:
    """The server's side of a connection whose peer stops to read."""

    def __init__(self, refuses: Set[int] = frozenset()) -> None:
        self.refuses = refuses
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.inbox.put_nowait({"type": "websocket.connect"})
        self.inbox.put_nowait({"type": "websocket.receive", "text": json.dumps({"user_id": ADA})})
        scope = {"type": "websocket", "path": "/ws/notifications", "headers": []}
        self.socket = asyncio.create_task(NotificationsSocket.as_asgi()(scope, self.inbox.get, self.send))

    async def send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        if message.get("code") in self.refuses:
            raise Exception("invalid close code")
        self.sent.append(message)

    async def until_sent(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.sent) < count:  # noqa: ASYNC110 - the socket sets no event
                await asyncio.sleep(0)

    def told(self) -> list[str]:
        messages = [json.loads(message["text"]) for message in self.sent if message["type"] == "websocket.send"]
        return [message["notification"]["id"] for message in messages if message["type"] == "notification"]


async def test_a_browser_that_reads_too_slowly_misses_the_oldest_and_it_is_counted() -> None:
    deaf = Deaf()
    await deaf.until_sent(2)  # accepted, and ready
    before = dropped.value("gateway", "websocket", "slow-reader")

    deaf.reads.clear()
    for number in range(100):
        await notify(ADA, id=str(number))
        await asyncio.sleep(0.001)
    missed = dropped.value("gateway", "websocket", "slow-reader") - before
    deaf.reads.set()
    await deaf.until_sent(2 + 100 - missed)
    deaf.inbox.put_nowait({"type": "websocket.disconnect", "code": 1000})
    await deaf.socket

    assert missed == 100 - sockets.MAX_WAITING - 1  # one was on its way
    assert deaf.told() == ["0", *map(str, range(100 - sockets.MAX_WAITING, 100))]


async def test_a_browser_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "PATIENCE_TO_BE_READ", 0.05)
    monkeypatch.setattr(sockets, "PATIENCE_TO_PART", 0.05)
    deaf = Deaf()
    await deaf.until_sent(2)

    deaf.reads.clear()
    await notify(ADA, id="1")

    async with asyncio.timeout(5):
        await deaf.socket
    assert (lifecycle.on_drain, get_channel_layer().groups) == (set(), {})
