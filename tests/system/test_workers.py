"""Several workers behind the same doors: who answers, what comes back, and how all of it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.system.shop import Process, Shop, gateway_alone, until
from tests.system.test_fleet import ended, sent_to

pytestmark = pytest.mark.slow

HTTP_REQUEST = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
TCP_PACKET = b'{"pattern":{"cmd":"get_users"},"data":{},"id":"1"}'
TCP_REQUEST = b"%d#%s" % (len(TCP_PACKET), TCP_PACKET)


def children(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(supervisor: Process) -> list[int]:
    """Return the pids of a supervisor's workers, which its fork server has started."""
    return [worker for fork_server in children(supervisor.pid) for worker in children(fork_server) if not ended(worker)]


def answering(connection: socket.socket, pids: list[int]) -> int:
    """Return which of these processes holds the other end of a connection."""
    local, peer = (f"{place[1]:04X}" for place in (connection.getsockname(), connection.getpeername()))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{peer}") and fields[2].endswith(f":{local}"):
            link = f"socket:[{fields[9]}]"
            for pid in pids:
                if any(descriptor_of(entry) == link for entry in Path(f"/proc/{pid}/fd").iterdir()):
                    return pid
    raise AssertionError("nobody holds the other end")


def descriptor_of(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:
        return ""


def answer(connection: socket.socket, request: bytes) -> bytes:
    """Send a request and return the beginning of what comes back."""
    connection.sendall(request)
    return connection.recv(4096)


def two_workers(shop: Shop, **env: str) -> Process:
    """Start the users service with two workers, and wait until both are ready."""
    users = shop.start("runmicroservice", "users", "--workers", "2", **env)
    until_all_ready(users, 2)
    return users


def until_all_ready(process: Process, times: int) -> None:
    """Wait until workers have said so many times that they are ready."""
    until(lambda: process.output.count(" ready") >= times or not process.running, f"{times} times ready")
    assert process.running, process.output


@pytest.mark.parametrize(("door", "request_"), [("http", HTTP_REQUEST), ("tcp", TCP_REQUEST)])
def test_all_workers_answer_at_one_port(shop: Shop, door: str, request_: bytes) -> None:
    users = two_workers(shop)
    pids = workers(users)
    port = {"http": shop.health_port, "tcp": shop.users_port}[door]
    seen: set[int] = set()

    with ExitStack() as stack:

        def all_seen() -> bool:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            assert answer(connection, request_)
            seen.add(answering(connection, pids))
            return seen == set(pids)

        until(all_seen, f"answers of {pids}")

    assert len(pids) == 2


@pytest.mark.parametrize("services", [["users"], []], ids=["one", "all"])
def test_all_workers_answer_at_one_grpc_port(shop: Shop, services: list[str]) -> None:
    users = shop.start("grpcserve", *services, "--workers", "2")
    port = int(shop.env["USERS_GRPC_PORT"]) if services else shop.grpc_port
    until_all_ready(users, 2)
    pids = workers(users)
    taken = [pid for pid in pids if listens(pid, port)]

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        status = stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True).status
    second, third = (shop.start("grpcserve", *services, *more) for more in ([], ["--workers=2"]))

    assert taken == pids
    assert status == health_pb2.HealthCheckResponse.SERVING
    for other in (second, third):
        assert other.wait() == 1
        assert f"users cannot listen on grpc://127.0.0.1:{port}" in other.output
    users.signal(signal.SIGTERM)
    assert users.wait() == 0, users.output


def listens(pid: int, port: int) -> bool:
    """Return whether a process listens on a port."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
                link = f"socket:[{fields[9]}]"
                if any(descriptor_of(entry) == link for entry in Path(f"/proc/{pid}/fd").iterdir()):
                    return True
    return False


def test_http_on_any_port_is_shared_and_told(shop: Shop) -> None:
    gateway = shop.start("serve", "--port", "0", "--workers", "2", SERVICES="gateway")
    until_all_ready(gateway, 2)

    [port] = re.findall(r"2 workers, http on 127\.0\.0\.1:(\d+)", gateway.output)
    page = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=10)

    assert page.status_code == 200
    assert gateway.output.count(f"ready, http on 127.0.0.1:{port}") == 2


def test_a_killed_worker_comes_back_while_the_other_answers(shop: Shop) -> None:
    users = two_workers(shop)
    killed, left = workers(users)

    os.kill(killed, signal.SIGKILL)
    until(lambda: ended(killed), "the end of the worker")
    statuses: set[int] = set()
    answers = 0
    while len(workers(users)) < 2:
        statuses.add(httpx.get(f"http://127.0.0.1:{shop.health_port}/readyz", timeout=10).status_code)
        with socket.create_connection(("127.0.0.1", shop.users_port), timeout=10) as connection:
            assert answer(connection, TCP_REQUEST)
        answers += 1
    until_all_ready(users, 3)

    assert statuses == {200}
    assert answers > 0
    assert left in workers(users)
    assert "worker 1 ended with -9" in users.output or "worker 2 ended with -9" in users.output


def test_a_worker_that_dies_again_and_again_is_started_more_and_more_rarely(shop: Shop) -> None:
    users = two_workers(shop)
    _, steady = workers(users)
    said = re.compile(r"ended with -9; it is started again in ([\d.]+) s")

    for deaths in range(1, 4):
        until(lambda: len(workers(users)) == 2, "the worker's return")
        [young] = set(workers(users)) - {steady}
        os.kill(young, signal.SIGKILL)
        until(lambda deaths=deaths: len(said.findall(users.output)) == deaths, f"death {deaths} told")

    pauses = [float(pause) for pause in said.findall(users.output)]
    for pause, longest in zip(pauses, (0.5, 1, 2), strict=True):
        assert longest / 2 - 0.1 <= pause <= longest
    assert steady in workers(users)


def test_workers_answer_what_is_in_flight_before_they_end(shop: Shop) -> None:
    gateway_alone(shop)
    users = two_workers(shop)
    person = {"name": "Late", "email": "late@example.org", "password": "long enough"}
    with httpx.Client(base_url=shop.url, timeout=20) as http, ThreadPoolExecutor() as threads:
        assert http.get("/api/users").status_code == 200
        pids = workers(users)
        with sqlite3.connect(shop.databases / "users.sqlite3", isolation_level=None) as database:
            database.execute("BEGIN IMMEDIATE")  # whoever writes now has to wait
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            waiting = threads.submit(http.post, "/api/users", json=person)
            until(lambda: sent_to(pids[0], shop.users_port), "the request in a frozen worker's socket")
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            until(lambda: not sent_to(pids[0], shop.users_port), "the request read by a worker")
            users.signal(signal.SIGTERM)
            until(lambda: users.output.count("draining") >= 2, "both draining")
            database.execute("ROLLBACK")
        database.close()

        assert waiting.result(10).status_code == 201
    assert users.wait() == 0, users.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all_workers(shop: Shop, number: signal.Signals) -> None:
    users = two_workers(shop)
    pids = workers(users)

    users.signal(number)

    assert users.wait() == 0, users.output
    assert users.output.count(" stopped") == 2
    assert all(ended(pid) for pid in pids)


def test_a_second_signal_ends_all_workers_at_once(shop: Shop) -> None:
    users = two_workers(shop)
    pids = workers(users)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    users.signal(signal.SIGTERM)
    users.signal(signal.SIGINT)

    assert users.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    for pid in pids:
        until(lambda pid=pid: ended(pid), f"the end of {pid}")


def test_workers_come_back_when_their_fork_server_dies(shop: Shop) -> None:
    users = two_workers(shop)
    [fork_server] = children(users.pid)
    pids = workers(users)

    os.kill(fork_server, signal.SIGKILL)
    until_all_ready(users, 4)

    assert all(ended(pid) for pid in pids)
    assert len(workers(users)) == 2
    users.signal(signal.SIGTERM)
    assert users.wait() == 0, users.output


def test_workers_drain_when_their_supervisor_is_killed(shop: Shop) -> None:
    users = two_workers(shop)
    pids = workers(users)

    users.signal(signal.SIGKILL)

    for pid in pids:
        until(lambda pid=pid: ended(pid), f"the end of {pid}")


def test_one_worker_is_the_process_itself(shop: Shop) -> None:
    users = shop.start("runmicroservice", "users")
    shop.until_ready(users, shop.health_port)

    assert children(users.pid) == []


def test_a_taken_port_is_named_before_any_worker_starts(shop: Shop) -> None:
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", shop.users_port))
        owner.listen()

        users = shop.start("runmicroservice", "users", "--workers", "2")

        assert users.wait() == 1
    assert f"users cannot listen on {shop.users_url}: Address already in use" in users.output
    assert "Traceback" not in users.output


def test_pub_sub_of_redis_is_refused(shop: Shop) -> None:
    users = shop.start("runmicroservice", "users", "--workers", "2", USERS_URL="redis://127.0.0.1:1")

    assert users.wait() == 1
    assert "users at redis://127.0.0.1:1 cannot have several workers" in users.output
    assert "Traceback" not in users.output


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_a_number_that_is_none_is_refused(shop: Shop, count: str) -> None:
    users = shop.start("runmicroservice", "users", f"--workers={count}")

    assert users.wait() == 2
    assert f"{count!r} is no number of workers" in users.output
