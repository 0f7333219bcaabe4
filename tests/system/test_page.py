"""The page of the shop and its WebSocket: a real server, a real client and a real browser."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.system.shop import Shop, fleet, runserver, serve_alone, until

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
PATIENCE = 20_000  # ms

Start = Callable[[Shop], object]


@contextmanager
def listen(shop: Shop, user_id: str) -> Iterator[ClientConnection]:
    """Open a WebSocket as the shop's own page does, and wait until it listens for a user."""
    with connect(address(shop), origin=shop.url, proxy=None) as socket:
        socket.send(json.dumps({"user_id": user_id}))
        assert json.loads(socket.recv(10)) == {"type": "ready"}
        yield socket


def address(shop: Shop) -> str:
    return f"ws://127.0.0.1:{shop.http_port}/ws/notifications"


def some_user(shop: Shop) -> str:
    return str(httpx.get(f"{shop.url}/api/users", timeout=20).json()["data"][0]["id"])


def order(shop: Shop, user_id: str) -> httpx.Response:
    product = next(
        product
        for product in httpx.get(f"{shop.url}/api/products", timeout=20).json()["data"]
        if product["available"] > 0
    )
    body = {
        "user_id": user_id,
        "lines": [{"product_id": product["id"], "quantity": 1}],
        "payment_token": "tok_ok",
    }
    return httpx.post(f"{shop.url}/api/orders", json=body, timeout=20)


def heard(socket: ClientConnection, kind: str) -> dict[str, Any]:
    """Return the next notification of a kind."""
    while True:
        message = json.loads(socket.recv(10))
        assert message["type"] == "notification"
        if message["notification"]["kind"] == kind:
            return dict(message["notification"])


def closed_with(socket: ClientConnection) -> int | None:
    """Read to the end and return the code in the server's last frame."""
    try:
        while True:
            socket.recv(10)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


@pytest.mark.parametrize("start", [serve_alone, runserver, fleet], ids=lambda start: start.__name__)
def test_an_order_is_told_to_the_browser_of_its_user(shop: Shop, start: Start) -> None:
    start(shop)
    user = some_user(shop)

    with listen(shop, user) as socket:
        placed = order(shop, user)
        told = heard(socket, "order_confirmed")

    assert placed.status_code == 201, placed.text
    assert placed.json()["number"] in told["title"]
    inbox = httpx.get(f"{shop.url}/api/notifications", params={"user_id": user}, timeout=20).json()["data"]
    assert told["id"] in [notification["id"] for notification in inbox]


@pytest.mark.parametrize("start", [serve_alone, runserver], ids=lambda start: start.__name__)
@pytest.mark.parametrize("origin", ["https://evil.example", None], ids=["foreign", "missing"])
def test_a_foreign_page_is_refused(shop: Shop, start: Start, origin: str | None) -> None:
    start(shop)

    with pytest.raises(InvalidStatus) as caught, connect(address(shop), origin=origin, proxy=None):
        pass

    assert caught.value.response.status_code == 403


def test_a_message_over_4_kib_is_not_read(shop: Shop) -> None:
    serve_alone(shop)

    with connect(address(shop), origin=shop.url, proxy=None) as socket:
        socket.send("x" * 4097)

        assert closed_with(socket) == 1009


@pytest.mark.parametrize(
    ("start", "code"),
    [(serve_alone, 1012), (runserver, 4012)],  # daphne lets no application send 1012
    ids=["serve_alone", "runserver"],
)
def test_a_process_that_ends_closes_its_sockets_so_that_they_come_back(shop: Shop, start: Start, code: int) -> None:
    start(shop)
    [process] = shop.processes
    with ExitStack() as stack:
        sockets = [stack.enter_context(listen(shop, some_user(shop))) for _ in range(3)]

        process.signal(signal.SIGTERM)

        assert [closed_with(socket) for socket in sockets] == [code] * 3
    assert process.wait() == 0, process.output
    assert "Traceback" not in process.output


def test_a_process_without_the_gateway_has_no_websocket(shop: Shop) -> None:
    process = shop.start("runmicroservice", "users")
    shop.until_ready(process, shop.health_port)

    url = f"ws://127.0.0.1:{shop.health_port}/ws/notifications"
    with pytest.raises(InvalidStatus) as caught, connect(url, origin=shop.url, proxy=None):
        pass

    assert caught.value.response.status_code == 404


def test_the_page_is_made_of_the_shops_own_files_only(shop: Shop) -> None:
    serve_alone(shop)

    page = httpx.get(shop.url, timeout=20)
    script = httpx.get(f"{shop.url}/static/gateway/shop.js", timeout=20)
    style = httpx.get(f"{shop.url}/static/gateway/shop.css", timeout=20)

    assert (page.status_code, script.status_code, style.status_code) == (200, 200, 200)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for text in (page.text, style.text):
        assert "http://" not in text
        assert "https://" not in text
    assert "innerHTML" not in script.text


# In Chromium


@pytest.fixture
def tab(shop: Shop) -> Iterator[Any]:
    """The shop's page in a browser; whatever the browser complains about fails the test."""
    if CHROMIUM is None:
        missing = "chromium is not installed"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    serve_alone(shop)
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        page = browser.new_page(viewport={"width": 1360, "height": 900}, locale="en-GB")
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.complaints = complaints
        page.goto(shop.url)
        page.wait_for_selector('#connection[data-state="live"]')
        yield page
        browser.close()


def test_an_order_on_the_page_is_answered_and_told(tab: Any) -> None:
    tab.locator("#products input:enabled").first.fill("2")
    tab.keyboard.press("Enter")

    tab.wait_for_selector('#result[data-kind="done"]')
    tab.wait_for_selector('.notification[data-kind="order_confirmed"].fresh')
    assert "is confirmed" in tab.locator("#result").text_content()
    assert tab.locator("#products input").first.input_value() == "0"
    assert tab.complaints == []


def test_a_declined_card_is_told_as_a_problem(tab: Any) -> None:
    tab.locator("#products input:enabled").first.fill("1")
    tab.get_by_label("A declined card").check()
    tab.get_by_role("button", name="Place order").click()

    tab.wait_for_selector('#result[data-kind="problem"]')
    tab.wait_for_selector('.notification[data-kind="order_cancelled"].fresh')
    assert [complaint for complaint in tab.complaints if "402" not in complaint] == []


def test_the_page_comes_back_after_a_restart_and_catches_up(tab: Any, shop: Shop) -> None:
    [process] = shop.processes
    user = tab.locator("#user").input_value()

    process.stop()
    tab.wait_for_selector('#connection[data-state="lost"]')
    serve_alone(shop)
    tab.wait_for_selector('#connection[data-state="live"]')
    order(shop, user)

    tab.wait_for_selector('.notification[data-kind="order_confirmed"]')


def test_another_user_is_told_other_things(tab: Any, shop: Shop) -> None:
    user = tab.locator("#user").input_value()
    order(shop, user)
    tab.wait_for_selector('.notification[data-kind="order_confirmed"]')

    tab.locator("#user").select_option(index=1)

    tab.wait_for_selector('#connection[data-state="live"]')
    until(lambda: tab.locator(".notification").count() == 0, "an empty list for the other user")


def test_every_field_has_a_label(tab: Any) -> None:
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('input, select')].filter((field) => !field.labels.length).length"
    )

    assert unnamed == 0
