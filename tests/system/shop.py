"""Runs the shop as its users do: real processes, own ports, own databases."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
MANAGE = [sys.executable, str(ROOT / "manage.py")]
PATIENCE = 20.0
SERVICES = ("users", "orders", "payments", "notifications")


# Below the range from which the kernel hands out its own; never one twice, since none is taken at once.
_candidates = itertools.cycle(range(20_000 + os.getpid() % 8_000, 32_000))


def free_ports(count: int) -> list[int]:
    """Return ports on which nobody listens."""
    ports: list[int] = []
    while len(ports) < count:
        candidate = next(_candidates)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            ports.append(candidate)
    return ports


def until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Wait until a condition of another process holds; fail the test with `what` otherwise."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience:g} s: {what}"
        time.sleep(0.02)


class Process:
    """A process that a test started and ends by its own pid."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.output = ""
        self._child = subprocess.Popen(
            command,
            env={**os.environ, **env},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait for its end and return its exit code."""
        code = self._child.wait(patience)
        self._reader.join(patience)
        return code

    def stop(self) -> int:
        """Ask it to end, and see to it that it does."""
        if self.running:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self._child.kill()
            self.wait()
            raise

    def until_says(self, text: str) -> None:
        """Wait until it has printed `text`."""
        until(lambda: text in self.output or not self.running, f"{text!r} printed")
        assert text in self.output, self.output

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.output += line
        self._child.stdout.close()


class Shop:
    """One shop on ports and databases of its own, in any shape."""

    def __init__(self, databases: Path) -> None:
        self.http_port, self.grpc_port, *ports = free_ports(2 + 3 * len(SERVICES))
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.databases = databases
        self.env = {
            "DEBUG": "1",
            "LOG_FORMAT": "text",
            "HTTP_PORT": str(self.http_port),
            "GRPC_PORT": str(self.grpc_port),
            "DATA_DIR": str(databases),
            "PYTHONUNBUFFERED": "1",
        }
        for name, door, health, grpc in zip(SERVICES, ports[::3], ports[1::3], ports[2::3], strict=True):
            self.env[f"{name.upper()}_URL"] = f"tcp://127.0.0.1:{door}"
            self.env[f"{name.upper()}_HEALTH_PORT"] = str(health)
            self.env[f"{name.upper()}_GRPC_PORT"] = str(grpc)
        self.users_url = self.env["USERS_URL"]
        self.users_port = int(self.users_url.rpartition(":")[2])
        self.health_port = int(self.env["USERS_HEALTH_PORT"])
        self.processes: list[Process] = []

    def start(self, *command: str, **env: str) -> Process:
        """Start a command, `manage.py` for a bare word, with this shop's environment."""
        full = list(command) if os.sep in command[0] else [*MANAGE, *command]
        process = Process(full, {**self.env, **env})
        self.processes.append(process)
        return process

    def until_ready(self, process: Process, port: int | None = None) -> None:
        """Wait until a process says on its health page that it is ready."""
        url = f"http://127.0.0.1:{port or self.http_port}/readyz"

        def ready() -> bool:
            assert process.running, process.output
            try:
                return httpx.get(url, timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        until(ready, f"ready on {url}")

    def stop(self) -> None:
        """End whatever still runs, also after one that did not end in time."""
        with ExitStack() as stack:
            for process in reversed(self.processes):
                stack.callback(process.stop)


# Every way to start the shop, and whether other processes find its TCP door open.

BIN = Path(sys.executable).parent


def runserver(shop: Shop) -> None:
    shop.until_ready(shop.start("runserver", f"127.0.0.1:{shop.http_port}", "--noreload"))


def runserver_with_reloader(shop: Shop) -> None:
    shop.until_ready(shop.start("runserver", f"127.0.0.1:{shop.http_port}"))


def serve_alone(shop: Shop) -> None:
    shop.until_ready(shop.start("serve", LISTEN="0"))


def runserver_listening(shop: Shop) -> None:
    shop.until_ready(shop.start("runserver", f"127.0.0.1:{shop.http_port}", "--noreload", LISTEN="1"))


def runserver_listening_with_reloader(shop: Shop) -> None:
    shop.until_ready(shop.start("runserver", f"127.0.0.1:{shop.http_port}", LISTEN="1"))


def daphne(shop: Shop) -> None:
    command = [str(BIN / "daphne"), "-b", "127.0.0.1", "-p", str(shop.http_port), "config.asgi:application"]
    shop.until_ready(shop.start(*command))


def uvicorn(shop: Shop) -> None:
    shop.until_ready(shop.start(str(BIN / "uvicorn"), "--port", str(shop.http_port), "config.asgi:application"))


def serve(shop: Shop) -> None:
    shop.until_ready(shop.start("serve"))


def fleet(shop: Shop) -> None:
    shop.start("runfleet").until_says("services up")


def gateway_alone(shop: Shop) -> Process:
    gateway = shop.start("serve", SERVICES="gateway")
    shop.until_ready(gateway)
    return gateway


def users_alone(shop: Shop) -> Process:
    users = shop.start("runmicroservice", "users")
    shop.until_ready(users, shop.health_port)
    return users


MONOLITH = [runserver, runserver_with_reloader, serve_alone]
HYBRID = [runserver_listening, runserver_listening_with_reloader, daphne, uvicorn, serve]
FLEET = [fleet]
