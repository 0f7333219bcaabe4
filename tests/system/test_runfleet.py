"""The fleet from its fork server: what is started by whom, what it takes, and what comes back."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import httpx
import pytest

from tests.system.shop import SERVICES, Shop, fleet, until

pytestmark = pytest.mark.slow

ROW = re.compile(r"^  (\w+) +(\d+)  up .* (\d+) MiB", re.MULTILINE)


def parent(pid: int) -> int:
    """Return the pid of a process's parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_every_service_is_forked_and_the_table_tells_what_memory_it_has(shop: Shop) -> None:
    fleet(shop)
    output = shop.processes[0].output

    rows = {name: (int(pid), int(size)) for name, pid, size in ROW.findall(output)}
    [(total, own)] = re.findall(r"services up in [\d.]+ s with (\d+) MiB \(PSS\), (\d+) MiB of it for runfleet", output)

    assert set(rows) == {"valkey", "gateway", *SERVICES}
    fork_servers = {parent(pid) for name, (pid, _) in rows.items() if name != "valkey"}
    assert len(fork_servers) == 1
    assert parent(fork_servers.pop()) == shop.processes[0].pid
    # A forked process has no more than half of what it has alone: 55 to 85 MiB.
    assert all(size < 60 for _, size in rows.values()), rows
    assert abs(int(total) - int(own) - sum(size for _, size in rows.values())) <= len(rows)


def test_a_killed_service_comes_back_and_the_others_stay(shop: Shop) -> None:
    fleet(shop)
    runfleet = shop.processes[0]
    before = {name: int(pid) for name, pid, _ in ROW.findall(runfleet.output)}

    os.kill(before["users"], signal.SIGKILL)
    runfleet.until_says("users is up again, pid ")
    with httpx.Client(base_url=shop.url, timeout=20) as http:
        until(lambda: http.get("/api/users").status_code == 200, "an answer of users")

    assert "users ended with -9; it is started again in 0." in runfleet.output
    assert runfleet.output.count(" ended with") == 1
    for name, pid in before.items():
        assert Path(f"/proc/{pid}").exists() is (name != "users")


def test_the_fleet_comes_back_when_its_fork_server_dies(shop: Shop) -> None:
    fleet(shop)
    runfleet = shop.processes[0]
    before = {name: int(pid) for name, pid, _ in ROW.findall(runfleet.output)}

    os.kill(parent(before["users"]), signal.SIGKILL)
    for name in ("gateway", *SERVICES):
        runfleet.until_says(f"{name} is up again, pid ")
    runfleet.signal(signal.SIGTERM)

    assert runfleet.wait() == 0, runfleet.output
    assert "Traceback" not in runfleet.output
