"""The list of the fleet in the admin: who is up, who has stopped, and who was killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.brokers import Valkey
from tests.system.shop import MANAGE, ROOT, Process, Shop, fleet, gateway_alone, serve, until, users_alone

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
PATIENCE = 20_000  # ms
ALL = {"gateway", "users", "orders", "payments", "notifications"}


@pytest.fixture
def shop(shop: Shop) -> Shop:
    """A shop with an operator."""
    subprocess.run(
        [*MANAGE, "seed_operators"], env={**os.environ, **shop.env}, cwd=ROOT, check=True, capture_output=True
    )
    return shop


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A bus of this test's own."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


class Row(NamedTuple):
    """An instance as the admin lists it."""

    state: str
    reason: str
    name: str
    service: str
    addresses: str


class Operator:
    """Somebody who is signed in to the admin."""

    def __init__(self, shop: Shop) -> None:
        self._url = f"{shop.url}/admin"
        with httpx.Client(timeout=20, follow_redirects=True) as http:
            page = http.get(f"{self._url}/login/").text
            token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
            assert token, page
            form = {"csrfmiddlewaretoken": token[1], "username": "admin", "password": "admin", "next": "/admin/"}
            signed_in = http.post(f"{self._url}/login/", data=form, headers={"Referer": f"{self._url}/login/"})
            assert "Log out" in signed_in.text
            self._cookies = dict(http.cookies)

    def instances(self) -> dict[str, Row]:
        """Read the list of instances, by service."""
        page = self._read("/registry/instance/")
        found = {}
        for cells in re.findall(r'<tr><td class="action-checkbox">.*?</tr>', page, re.DOTALL):
            state, reason = re.search(r'data-state="(\w+)"', cells), re.search(r'registry-reason">(.*?)<', cells)
            columns = {name: _text(cell) for name, cell in re.findall(r"field-([\w]+)[^>]*>(.*?)</t[dh]>", cells)}
            assert state
            row = Row(
                state[1], unescape(reason[1]) if reason else "", *(columns[c] for c in ("name", "service", "where"))
            )
            found[row.service] = row
        return found

    def _read(self, path: str) -> str:
        return httpx.get(f"{self._url}{path}", cookies=self._cookies, timeout=20).raise_for_status().text

    def states(self) -> dict[str, str]:
        """Read the state of each service's instance."""
        return {name: row.state for name, row in self.instances().items()}


def _text(cell: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", cell)).split())


def test_every_service_of_the_fleet_shows_up_with_its_addresses(shop: Shop) -> None:
    fleet(shop)
    operator = Operator(shop)

    until(lambda: operator.states() == dict.fromkeys(ALL, "up"), "five services that are up", 8)

    rows = operator.instances()
    assert rows["gateway"].addresses == f"http 127.0.0.1:{shop.http_port}"
    assert f"tcp 127.0.0.1:{shop.users_port}" in rows["users"].addresses
    assert f"health 127.0.0.1:{shop.health_port}" in rows["users"].addresses
    assert len({row.name for row in rows.values()}) == len(ALL)


def test_a_process_that_stops_is_down_at_once(shop: Shop, valkey: Valkey) -> None:
    operator, users = two_processes(shop, valkey)

    users.signal(signal.SIGTERM)
    assert users.wait() == 0, users.output
    until(lambda: operator.states()["users"] == "down", "users down", 2)

    assert operator.instances()["users"].reason == "stopped"
    assert operator.states()["gateway"] == "up"


def test_a_process_that_is_killed_is_suspected_and_then_down(shop: Shop, valkey: Valkey) -> None:
    operator, users = two_processes(shop, valkey)

    users.signal(signal.SIGKILL)
    until(lambda: operator.states()["users"] == "suspect", "users suspected", 14)
    until(lambda: operator.states()["users"] == "down", "users down", 10)

    assert "no beat for" in operator.instances()["users"].reason
    assert operator.states()["gateway"] == "up"
    assert "Traceback" not in shop.processes[0].output


def test_a_process_that_is_frozen_and_thaws_is_up_again(shop: Shop, valkey: Valkey) -> None:
    operator, users = two_processes(shop, valkey)

    users.signal(signal.SIGSTOP)
    until(lambda: operator.states()["users"] == "suspect", "users suspected", 14)
    users.signal(signal.SIGCONT)

    until(lambda: operator.states()["users"] == "up", "users up again", 8)


def two_processes(shop: Shop, valkey: Valkey) -> tuple[Operator, Process]:
    """Start the gateway and users, and wait until the one knows of the other."""
    shop.env["REDIS_URL"] = valkey.url
    gateway_alone(shop)
    users = users_alone(shop)
    operator = Operator(shop)
    until(lambda: operator.states() == {"gateway": "up", "users": "up"}, "both up", 8)
    return operator, users


# In Chromium


def _complaint(message: Any) -> list[str]:
    # Django's admin has no icon, and a browser asks for one.
    return [message.text] if message.type == "error" and "favicon" not in message.location["url"] else []


@contextmanager
def signed_in(shop: Shop, **options: Any) -> Iterator[Any]:
    """Open the admin in a browser as its operator; whatever the browser complains about fails the test."""
    if CHROMIUM is None:
        missing = "chromium is not installed"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1360, "height": 800}, locale="en-GB", **options)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.extend(_complaint(message)))
        page.goto(f"{shop.url}/admin/")
        page.get_by_label("Username").fill("admin")
        page.get_by_label("Password").fill("admin")
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("heading", name="Services and instances").wait_for()
        yield page
        browser.close()
    assert complaints == []


def test_an_operator_finds_filters_opens_and_probes_an_instance(shop: Shop, tmp_path: Path) -> None:
    fleet(shop)
    operator = Operator(shop)
    until(lambda: operator.states() == dict.fromkeys(ALL, "up"), "five services that are up", 8)

    with signed_in(shop, color_scheme=os.environ.get("SCHEME", "light")) as page:
        page.screenshot(path=tmp_path / "1-index.png")
        page.get_by_role("link", name="Services", exact=True).first.click()
        page.locator("#result_list").get_by_role("link", name="users").wait_for()
        listed = page.locator("#result_list tbody tr").count()
        page.screenshot(path=tmp_path / "2-services.png")
        page.goto(f"{shop.url}/admin/registry/service/?q=get_user")
        found = page.locator("#result_list tbody .field-name").all_text_contents()
        page.locator("#result_list").get_by_role("link", name="users").click()
        page.get_by_role("heading", name="users").wait_for()
        patterns = page.locator("#patterns-group").text_content()
        page.screenshot(path=tmp_path / "3-service.png", full_page=True)

        page.goto(f"{shop.url}/admin/registry/instance/")
        page.screenshot(path=tmp_path / "4-instances.png")
        page.locator("#changelist-filter").get_by_role("link", name="users").click()
        page.wait_for_url("**service__id__exact**")
        chosen = page.locator("#result_list tbody .field-service").all_text_contents()
        page.locator("tr input.action-select").check()
        page.locator("select[name=action]").select_option(label="Probe now")
        page.get_by_role("button", name="Run").or_(page.get_by_role("button", name="Go")).first.click()
        message = page.locator(".messagelist li").text_content()
        page.screenshot(path=tmp_path / "5-probed.png")
        page.locator("#result_list .field-name a").click()
        page.get_by_text("Probed").first.wait_for()
        detail = page.locator("#content").text_content()
        page.screenshot(path=tmp_path / "6-instance.png", full_page=True)
        page.goto(f"{shop.url}/admin/registry/journalentry/")
        page.screenshot(path=tmp_path / "7-journal.png")

    assert listed == len(ALL)
    assert found == ["users"]
    assert "get_user" in patterns
    assert chosen == ["users"]
    assert re.search(r"[Uu]sers \S+: /readyz 200 in \d+ ms", message), message
    assert "/readyz 200" in detail
    assert f"127.0.0.1:{shop.users_port}" in detail


def test_a_list_follows_the_fleet_and_keeps_what_is_selected_until_it_is_stopped(shop: Shop) -> None:
    serve(shop)
    operator = Operator(shop)
    until(lambda: "users" in operator.states(), "users listed", 8)

    with signed_in(shop) as page:
        page.goto(f"{shop.url}/admin/registry/instance/")
        page.locator("tr input.action-select").first.check()
        mark = "document.querySelector('#result_list tbody tr').dataset.old = '1'"
        page.evaluate(mark)
        page.wait_for_function("document.querySelector('#result_list tbody tr').dataset.old === undefined")
        selected = page.locator("tr input.action-select:checked").count()
        counter = page.locator(".action-counter").first.text_content()
        page.locator("tr input.action-select").nth(1).check()
        counted = page.locator(".action-counter").first.text_content()

        page.get_by_role("button", name="Stop updating").click()
        page.evaluate(mark)
        with pytest.raises(Exception, match="Timeout"):
            page.wait_for_function(
                "document.querySelector('#result_list tbody tr').dataset.old === undefined", timeout=6000
            )
        page.get_by_role("button", name="Update every 5 s").click()
        page.wait_for_function("document.querySelector('#result_list tbody tr').dataset.old === undefined")

    assert selected == 1
    assert counter.startswith("1 of")
    assert counted.startswith("2 of")
