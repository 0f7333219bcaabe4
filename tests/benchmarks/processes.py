"""Processes that are measured: started on a core of their own, their time and memory read from the kernel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
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


class Process:
    """A process that says `ready` and runs until its standard input closes."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        core: int = FIRST_CORE,
        env: Mapping[str, str] = NOTHING,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            env={**os.environ, **env},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{name} did not start: {self._process.stderr.read().decode()}")

    @property
    def cpu(self) -> float:
        """Seconds on a core so far: all threads of the process and of those that it started."""
        return sum(time.clock_gettime((~pid << 3) | _SCHEDULED) for pid in _tree(self._process.pid))

    @property
    def memory(self) -> float:
        """Resident megabytes of the process and of those that it started."""
        return (
            sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in _tree(self._process.pid))
            * _PAGE
            / 1e6
        )

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
