"""One administrator's journey through the users, the same in every shape of the shop."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

import httpx
import pytest

from tests.system.shop import FLEET, HYBRID, MONOLITH, Shop

pytestmark = pytest.mark.slow

Start = Callable[[Shop], object]


@pytest.mark.parametrize("start", [*MONOLITH, *HYBRID, *FLEET], ids=lambda start: start.__name__)
def test_users_are_listed_registered_changed_and_deleted(shop: Shop, start: Start) -> None:
    start(shop)

    with httpx.Client(base_url=shop.url, timeout=20) as http:
        pages_hold_every_user_once(http)
        a_user_lives_from_registration_to_deletion(http)
        mistakes_are_told_as_problems(http)
        both_paths_are_version_one(http)
        the_documentation_needs_nothing_from_elsewhere(http)
        health_tells_how_the_process_is(http)


@pytest.mark.parametrize("start", HYBRID, ids=lambda start: start.__name__)
def test_a_hybrid_answers_other_processes_over_tcp(shop: Shop, start: Start) -> None:
    start(shop)

    answer = ask(shop, {"pattern": {"cmd": "get_users"}, "data": {"limit": 1}, "id": "1"})

    assert answer["response"]["users"][0]["email"] == "ada.morgan@example.org"


@pytest.mark.parametrize("start", MONOLITH, ids=lambda start: start.__name__)
def test_a_monolith_keeps_its_door_closed(shop: Shop, start: Start) -> None:
    start(shop)

    with pytest.raises(ConnectionRefusedError):
        ask(shop, {"pattern": {"cmd": "get_users"}, "data": {}, "id": "1"})


def ask(shop: Shop, request: object) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Send one request as a NestJS client writes it and return the answer."""
    text = json.dumps(request)
    with socket.create_connection(("127.0.0.1", shop.users_port), timeout=10) as connection:
        connection.sendall(f"{len(text)}#{text}".encode())
        stream = connection.makefile("rb")
        length = b""
        while not length.endswith(b"#"):
            length += stream.read(1)
        answer = json.loads(stream.read(int(length[:-1])))
        stream.close()
    return answer


def pages_hold_every_user_once(http: httpx.Client) -> None:
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = http.get("/api/users", params={"limit": "12", **cursor}).raise_for_status()
        seen += [user["email"] for user in page.json()["data"]]
        if page.json()["next"] is None:
            break
        assert page.json()["next"] in page.headers["link"]
        cursor = {"cursor": page.json()["next"]}

    assert len(seen) == len(set(seen)) == 30


def a_user_lives_from_registration_to_deletion(http: httpx.Client) -> None:
    created = http.post("/api/users", json={"name": "Zoë 😀", "email": "zoe@example.org", "password": "long enough"})
    assert created.status_code == 201, created.text
    user = created.json()
    assert "password" not in user
    path = f"/api/users/{user['id']}"
    assert http.get(path).json() == user
    assert http.get("/api/users", params={"search": "zoe@"}).json()["data"] == [user]

    changed = http.patch(path, json={"name": "Zoë", "version": user["version"]})
    assert (changed.status_code, changed.json()["name"]) == (200, "Zoë")
    stale = http.patch(path, json={"name": "Other", "version": user["version"]})
    assert (stale.status_code, stale.json()["code"]) == (412, "version-mismatch")

    deleted = http.delete(path)
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert http.get(path).status_code == 404


def mistakes_are_told_as_problems(http: httpx.Client) -> None:
    unknown = http.get("/api/users/nope")
    assert_problem(unknown, 404, "user-not-found")

    invalid = http.post("/api/users", json={"name": "A", "email": "no address", "password": "long enough"})
    assert_problem(invalid, 400, "invalid")
    assert [error["pointer"] for error in invalid.json()["errors"]] == ["/email"]

    taken = http.post("/api/users", json={"name": "A", "email": "ADA.morgan@example.org", "password": "long enough"})
    assert_problem(taken, 409, "email-taken")

    broken = http.post("/api/users", content=b"{", headers={"content-type": "application/json"})
    assert_problem(broken, 400, "parse-error")
    assert_problem(http.put("/api/users"), 405, "method-not-allowed")
    assert_problem(http.get("/api/no/such/path"), 404, "not-found")


def assert_problem(response: httpx.Response, status: int, code: str) -> None:
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (response.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["instance"] == response.url.path


def both_paths_are_version_one(http: httpx.Client) -> None:
    params = {"limit": "5"}

    assert http.get("/api/v1/users", params=params).json() == http.get("/api/users", params=params).json()


def the_documentation_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/api/docs").raise_for_status().text
    assert "https://" not in page
    script = page.split('src="', 1)[1].split('"', 1)[0]
    assert http.get(script).raise_for_status().content

    document = http.get("/api/openapi.json").raise_for_status().json()
    assert {"/api/v1/users", "/api/v1/orders/{id}"} <= set(document["paths"])
    assert all(path.startswith("/api/v1/") for path in document["paths"])


def health_tells_how_the_process_is(http: httpx.Client) -> None:
    for path in ("/livez", "/readyz", "/health"):
        page = http.get(path)
        assert page.status_code == 200
        assert page.json()["status"] == "ok"
        assert {"timestamp", "uptime"} <= set(page.json())
