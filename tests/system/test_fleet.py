"""What a fleet does when its parts stop, freeze, return or are told to end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.system.shop import BIN, ROOT, Shop, fleet, gateway_alone, until, users_alone

pytestmark = pytest.mark.slow


def test_ctrl_c_stops_the_whole_fleet_and_leaves_nothing(shop: Shop) -> None:
    fleet(shop)
    runfleet = shop.processes[0]
    pids = [
        int(pid)
        for pid in re.findall(
            r"^  (?:gateway|users|orders|payments|notifications|valkey) +(\d+)  up", runfleet.output, re.MULTILINE
        )
    ]
    assert len(pids) == 6

    runfleet.signal(signal.SIGINT)

    assert runfleet.wait() == 0, runfleet.output
    assert "5 services stopped" in runfleet.output
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_script_server_prepares_starts_and_stops_everything_and_prepares_only_once(shop: Shop) -> None:
    shutil.rmtree(shop.databases)

    first = shop.start(str(ROOT / "script" / "server"))
    first.until_says("services up")
    users = httpx.get(f"{shop.url}/api/users", timeout=20).json()["data"]
    first.signal(signal.SIGINT)
    assert first.wait() == 0, first.output
    second = shop.start(str(ROOT / "script" / "server"))
    second.until_says("services up")
    second.signal(signal.SIGINT)
    assert second.wait() == 0, second.output

    assert len(users) == 30
    assert "Migrating users" in first.output
    assert "30 users written" in first.output
    assert "Migrating" not in second.output
    assert "30 users written" not in second.output


def test_each_call_is_one_log_line_on_both_sides_without_its_payload(shop: Shop) -> None:
    fleet(shop)
    runfleet = shop.processes[0]

    httpx.get(f"{shop.url}/api/users", params={"search": "ada.morgan"}, timeout=20).raise_for_status()
    runfleet.until_says("client users get_users 200")
    runfleet.until_says("server users get_users 200")

    assert "ada.morgan" not in runfleet.output
    ids = re.findall(
        r"^(gateway|users) .* (?:client|server) users get_users 200 .* (\S+)$", runfleet.output, re.MULTILINE
    )
    assert {name for name, _ in ids} == {"gateway", "users"}
    assert len({id for _, id in ids}) == 1


def test_a_stopped_service_is_503_within_a_second_and_comes_back_by_itself(shop: Shop) -> None:
    gateway_alone(shop)
    users = users_alone(shop)
    with httpx.Client(base_url=shop.url, timeout=20) as http:
        assert http.get("/api/users").status_code == 200

        users.stop()
        started = time.monotonic()
        refused = http.get("/api/users")
        took = time.monotonic() - started
        users_alone(shop)
        back = http.get("/api/users")

    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers["retry-after"] == "1"
    assert took < 1
    assert back.status_code == 200


def test_a_killed_service_fails_the_calls_that_wait_for_it_at_once(shop: Shop) -> None:
    gateway_alone(shop)
    users = users_alone(shop)
    with httpx.Client(base_url=shop.url, timeout=20) as http, ThreadPoolExecutor() as threads:
        assert http.get("/api/users").status_code == 200
        users.signal(signal.SIGSTOP)

        waiting = threads.submit(http.get, "/api/users")
        until(lambda: sent_to(users.pid, shop.users_port), "the request in the frozen service's socket")
        users.signal(signal.SIGKILL)
        answer = waiting.result(3)

    # A list of users is asked for again, and then nobody is there.
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")


def test_a_frozen_service_is_504_after_the_deadline_and_recovers(shop: Shop) -> None:
    shop.env["CALL_TIMEOUT"] = "1"
    gateway_alone(shop)
    users = users_alone(shop)
    with httpx.Client(base_url=shop.url, timeout=20) as http:
        assert http.get("/api/users").status_code == 200

        users.signal(signal.SIGSTOP)
        started = time.monotonic()
        late = http.get("/api/users")
        took = time.monotonic() - started
        users.signal(signal.SIGCONT)
        back = http.get("/api/users")

    assert (late.status_code, late.json()["code"]) == (504, "deadline-exceeded")
    assert late.headers["content-type"] == "application/problem+json"
    assert took >= 1
    assert back.status_code == 200


@pytest.mark.parametrize("server", ["serve", "daphne"])
def test_the_gateway_answers_what_is_in_flight_before_it_ends(shop: Shop, server: str) -> None:
    shop.env["SERVICES"] = "gateway"
    command = {
        "serve": ["serve"],
        "daphne": [str(BIN / "daphne"), "-p", str(shop.http_port), "config.asgi:application"],
    }
    gateway = shop.start(*command[server])
    shop.until_ready(gateway)
    del shop.env["SERVICES"]
    users = users_alone(shop)
    with httpx.Client(base_url=shop.url, timeout=20) as http, ThreadPoolExecutor() as threads:
        assert http.get("/api/users").status_code == 200
        users.signal(signal.SIGSTOP)

        waiting = threads.submit(http.get, "/api/users")
        until(lambda: sent_to(users.pid, shop.users_port), "the request in the frozen service's socket")
        gateway.signal(signal.SIGTERM)
        if server == "serve":
            gateway.until_says("draining")
        users.signal(signal.SIGCONT)

        assert waiting.result(10).status_code == 200
    assert gateway.wait() == 0, gateway.output


def test_a_service_answers_what_is_in_flight_before_it_ends(shop: Shop) -> None:
    gateway_alone(shop)
    users = users_alone(shop)
    person = {"name": "Late", "email": "late@example.org", "password": "long enough"}
    with httpx.Client(base_url=shop.url, timeout=20) as http, ThreadPoolExecutor() as threads:
        assert http.get("/api/users").status_code == 200
        with sqlite3.connect(shop.databases / "users.sqlite3", isolation_level=None) as database:
            database.execute("BEGIN IMMEDIATE")  # whoever writes now has to wait
            users.signal(signal.SIGSTOP)

            waiting = threads.submit(http.post, "/api/users", json=person)
            until(lambda: sent_to(users.pid, shop.users_port), "the request in the frozen service's socket")
            users.signal(signal.SIGCONT)
            until(lambda: not sent_to(users.pid, shop.users_port), "the request read by the service")
            users.signal(signal.SIGTERM)
            users.until_says("draining")
            database.execute("ROLLBACK")
        database.close()

        assert waiting.result(10).status_code == 201
    assert users.wait() == 0, users.output


def test_a_taken_port_is_named(shop: Shop) -> None:
    gateway_alone(shop)

    second = shop.start("serve")

    assert second.wait() == 1
    assert f"127.0.0.1:{shop.http_port}" in second.output
    assert "Traceback" not in second.output


def test_a_taken_door_is_named_under_daphne_too(shop: Shop) -> None:
    users_alone(shop)

    hybrid = shop.start("runserver", f"127.0.0.1:{shop.http_port}", "--noreload", LISTEN="1")

    assert hybrid.wait() == 1
    assert f"users cannot listen on {shop.users_url}" in hybrid.output


def sent_to(pid: int, port: int) -> bool:
    """Return whether bytes wait unread in a process's connection on this port."""
    wanted = f"0100007F:{port:04X}"
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == wanted and fields[3] == "01" and int(fields[4].partition(":")[2], 16) > 0:
            return True
    return False


def test_a_handler_that_hangs_does_not_keep_the_process_beyond_its_time(shop: Shop) -> None:
    shop.env["DRAIN_TIMEOUT"] = "1"
    gateway_alone(shop)
    users = users_alone(shop)
    person = {"name": "Stuck", "email": "stuck@example.org", "password": "long enough"}
    with httpx.Client(base_url=shop.url, timeout=20) as http, ThreadPoolExecutor() as threads:
        assert http.get("/api/users").status_code == 200
        with sqlite3.connect(shop.databases / "users.sqlite3", isolation_level=None) as database:
            database.execute("BEGIN IMMEDIATE")  # a write waits five seconds for it
            users.signal(signal.SIGSTOP)
            waiting = threads.submit(http.post, "/api/users", json=person)
            until(lambda: sent_to(users.pid, shop.users_port), "the request in the frozen service's socket")
            users.signal(signal.SIGCONT)
            until(lambda: not sent_to(users.pid, shop.users_port), "the request read by the service")

            users.signal(signal.SIGTERM)
            started = time.monotonic()
            code = users.wait()
            took = time.monotonic() - started
            database.execute("ROLLBACK")
        database.close()
        assert waiting.result(10).status_code in (503, 504)

    assert (code, took < 4) == (1, True), users.output


def test_a_second_signal_ends_the_fleet_at_once_and_leaves_nothing(shop: Shop) -> None:
    fleet(shop)
    runfleet = shop.processes[0]
    pids = [int(pid) for pid in re.findall(r"^  [a-z]+ +(\d+)  up", runfleet.output, re.MULTILINE)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # or they would be gone before the second signal

    runfleet.signal(signal.SIGINT)
    runfleet.signal(signal.SIGTERM)

    assert runfleet.wait() != 0
    for pid in pids:
        until(lambda pid=pid: ended(pid), f"the end of {pid}")


def test_ctrl_c_while_the_fleet_starts_ends_it_well(shop: Shop) -> None:
    runfleet = shop.start("runfleet")
    until(lambda: bool(children(runfleet.pid)), "the first child")

    runfleet.signal(signal.SIGINT)

    assert runfleet.wait() == 0, runfleet.output
    assert "Traceback" not in runfleet.output


def ended(pid: int) -> bool:
    """Return whether a process is gone, or only waits to be reaped."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def children(pid: int) -> list[str]:
    """Return the pids of a process's children."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
