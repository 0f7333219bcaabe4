"""Processes that are measured: started on a core of their own, their time and memory read from the kernel."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

START_TIMEOUT = 60
RUN_TIMEOUT = 300
FIRST_CORE, LAST_CORE = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
"""Where the measured process runs, and where its load and the brokers do."""

NOTHING: Mapping[str, str] = MappingProxyType({})

_PAGE = os.sysconf("SC_PAGE_SIZE")
_SCHEDULED = 2  # CPUCLOCK_SCHED of clock_getcpuclockid(3): a process's time on a core, in nanoseconds


class Tree:
    """A process and those that it started: what they take."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid

    @property
    def pids(self) -> list[int]:
        """All of them, this one first."""
        return list(_tree(self.pid))

    @property
    def cpu(self) -> float:
        """Seconds on a core so far: all threads of all of them."""
        return sum(time.clock_gettime((~pid << 3) | _SCHEDULED) for pid in self.pids)

    @property
    def memory(self) -> float:
        """Resident megabytes."""
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids) * _PAGE / 1e6

    @property
    def share(self) -> float:
        """Megabytes where a page that several processes share counts in parts (PSS)."""
        return sum(_proportional(pid) for pid in self.pids) / 1e3


class Process(Tree):
    """A process that says `ready` and runs until its standard input closes."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        core: int = FIRST_CORE,
        env: Mapping[str, str] = NOTHING,
        folder: Path | None = None,
    ) -> None:
        with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads would fill up
            self._process = subprocess.Popen(
                ["taskset", "-c", str(core), *command],
                env={**os.environ, **env},
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            super().__init__(name, self._process.pid)
            ready = self._process.stdout
            if not select.select([ready], [], [], START_TIMEOUT)[0] or ready is None or ready.readline() != b"ready\n":
                self._process.kill()
                errors.seek(0)
                raise RuntimeError(f"{name} did not start: {errors.read().decode()}")

    def stop(self) -> None:
        """Close its standard input, and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def call(
    command: Sequence[str], core: int = LAST_CORE, env: Mapping[str, str] = NOTHING, folder: Path | None = None
) -> dict[str, Any]:
    """Run a program to its end and return the line of JSON that it prints. Raises RuntimeError where it fails."""
    done = subprocess.run(
        ["taskset", "-c", str(core), *command],
        env={**os.environ, **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def free_port() -> int:
    """Return a port below the range from which the kernel hands out its own."""
    for port in range(20_000 + os.getpid() % 8_000, 32_000):
        with socket.socket() as probe:
            if port not in _given and probe.connect_ex(("127.0.0.1", port)):
                _given.add(port)
                return port
    raise OSError("No port is free.")


_given: set[int] = set()


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _tree(int(child))


def _proportional(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1.024 for line in lines if line.startswith("Pss:"))
