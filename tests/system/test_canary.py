"""What customers say is in no log, metric or report: canaries in every field of a journey, and in its mistakes."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import httpx
import pytest

from tests.system.shop import SERVICES, Shop, fleet

pytestmark = pytest.mark.slow

NAME, EMAIL, PASSWORD = "Canaria Quillfeather", "canary-7f3a@example.org", "canary-Passw0rd"
TOKEN, REASON = "tok_4111111111111111", "canary-does-not-want-it"
CANARIES = ("Quillfeather", "canary", "4111111111111111")


def test_what_customers_say_is_in_no_log_metric_or_report(shop: Shop) -> None:
    fleet(shop)

    with httpx.Client(base_url=shop.url, timeout=20) as http:
        person = {"name": NAME, "email": EMAIL, "password": PASSWORD}
        user = http.post("/api/users", json=person).raise_for_status().json()
        product = http.get("/api/products", params={"limit": 1}).raise_for_status().json()["data"][0]
        lines = [{"product_id": product["id"], "quantity": 1}]
        order = {"user_id": user["id"], "lines": lines, "payment_token": "tok_ok"}
        placed = http.post("/api/orders", json=order).raise_for_status().json()
        answers = [
            http.get("/api/users", params={"search": EMAIL}),
            http.post("/api/users", json=person),  # there already
            http.post("/api/users", json={**person, "email": f"{EMAIL}@"}),  # no address
            http.post("/api/users", content=f'{{"name": "{NAME}'),  # no JSON
            http.get("/api/users/nobody"),  # a path is no payload: Django tells of those that lead nowhere
            http.post("/api/orders", json={**order, "payment_token": TOKEN}),  # not accepted
            http.post(f"/api/orders/{placed['id']}/cancel", json={"reason": REASON}),
            http.patch(f"/api/users/{user['id']}", json={"name": f"{NAME}\nJr."}),
            http.delete(f"/api/users/{user['id']}"),
        ]
        told = [http.get("/metrics").text, http.get("/health").text]
        ports = [shop.env[f"{name.upper()}_HEALTH_PORT"] for name in SERVICES]
        told += [httpx.get(f"http://127.0.0.1:{port}/{page}").text for port in ports for page in ("metrics", "health")]
    assert len({answer.status_code for answer in answers}) > 3, answers  # mistakes of several kinds
    for process in shop.processes:
        process.stop()
        told.append(process.output)
    with closing(sqlite3.connect(shop.databases / "gateway.sqlite3")) as registry:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'registry%'"
        tables = [name for (name,) in registry.execute(query)]
        told += [str(registry.execute(f"SELECT * FROM {name}").fetchall()) for name in tables]  # noqa: S608 - its own

    assert tables
    text = "\n".join(told)
    assert "get_users 200" in text
    assert [line for line in text.splitlines() if any(canary in line for canary in CANARIES)] == []
