"""The TCP server beside NestJS's: server CPU per request, alternated in one run.

Rules: real NestJS in production mode, the same work, replies compared before timing, servers on
the first core and the load on the last, a warm-up of 12,000 calls, rounds in turn, medians. What
to read is the ratio of CPU per request; requests per second here also measure the load generator.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import uvloop

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 12_000
FIRST_CORE, LAST_CORE = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """Return a port below the range from which the kernel hands out its own."""
    for port in range(20_000 + os.getpid() % 8_000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("No port is free.")


class Peer:
    """A server process pinned to the first core."""

    def __init__(self, name: str, command: list[str], pattern: str) -> None:
        self.name = name
        self.pattern = pattern
        self.port = free_port()
        self._process = subprocess.Popen(
            [*command, json.dumps({"url": f"tcp://127.0.0.1:{self.port}"})],
            cwd=ROOT / "tests" / "interop",
            env={**os.environ, "NODE_ENV": "production"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        os.sched_setaffinity(self._process.pid, {FIRST_CORE})
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", f"{name} did not start"

    @property
    def cpu(self) -> float:
        """Seconds on a core so far, all threads together."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def memory(self) -> float:
        """Resident megabytes."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


class Load(asyncio.Protocol):
    """Keeps a number of requests in flight on one connection; counts answers without reading them."""

    def __init__(self, pattern: str, in_flight: int, total: int) -> None:
        request = json.dumps({"pattern": {"cmd": pattern}, "data": [1, 2, 3], "id": "0123456789abcdef01234"})
        body = request.replace(", ", ",").replace(": ", ":")
        self._frame = f"{len(body)}#{body}".encode()
        self._in_flight = in_flight
        self._left = total
        self._answers = total
        self.first = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._send(self._in_flight)

    def data_received(self, data: bytes) -> None:
        if not self.first:
            self.first = data.split(b"}", 1)[0] + b"}"
        answered = data.count(b"isDisposed")
        self._answers -= answered
        if self._answers <= 0:
            self._transport.close()
            if not self.done.done():
                self.done.set_result(None)
        else:
            self._send(answered)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionResetError("the server closed the connection"))

    def _send(self, count: int) -> None:
        count = min(count, self._left)
        self._left -= count
        if count:
            self._transport.write(self._frame * count)  # type: ignore[attr-defined]


async def drive(peer: Peer, connections: int, in_flight: int, total: int) -> bytes:
    """Make `total` requests; return the first answer."""
    loop = asyncio.get_running_loop()
    loads = []
    for _ in range(connections):
        _, load = await loop.create_connection(
            lambda: Load(peer.pattern, in_flight, total // connections), "127.0.0.1", peer.port
        )
        loads.append(load)
    async with asyncio.timeout(120):
        await asyncio.gather(*(load.done for load in loads))
    return loads[0].first


def measure(peers: list[Peer], connections: int, in_flight: int, total: int, rounds: int) -> None:
    """Print one table: each peer's medians over the rounds, and the ratio to the first."""
    figures: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            cpu, started = peer.cpu, time.perf_counter()
            uvloop.run(drive(peer, connections, in_flight, total))
            seconds = time.perf_counter() - started
            figures[peer.name].append(((peer.cpu - cpu) / total * 1e6, total / seconds))
    print(f"\n{connections} x {in_flight} in flight, {total:,} requests, {rounds} rounds, medians")
    print(f"{'':28}{'CPU us/request':>16}{'ratio':>8}{'requests/s':>13}{'ratio':>8}{'MB':>6}")
    base_cpu = statistics.median(cpu for cpu, _ in figures[peers[0].name])
    base_rate = statistics.median(rate for _, rate in figures[peers[0].name])
    for peer in peers:
        cpu = statistics.median(cpu for cpu, _ in figures[peer.name])
        rate = statistics.median(rate for _, rate in figures[peer.name])
        print(f"{peer.name:28}{cpu:16.1f}{base_cpu / cpu:8.2f}{rate:13,.0f}{rate / base_rate:8.2f}{peer.memory:6.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60_000)
    options = parser.parse_args()
    os.sched_setaffinity(0, {LAST_CORE})

    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    versions = json.loads((ROOT / "tests/interop/nest12/package.json").read_text())["dependencies"]
    nest = versions["@nestjs/microservices"]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", end="; ")
    print(f"Python {platform.python_version()}, uvloop {uvloop.__version__}; Node {node}, NestJS {nest}")
    print("On for both: routing, exception filter. Ours also: payload decoded to its type, limits, back-pressure.")

    service = [sys.executable, str(Path(__file__).with_name("service.py"))]
    peers: list[Peer] = []
    try:
        for name, command, pattern in (
            (f"NestJS {nest}", ["node", "--import", "./versions.js", "server.js"], "sum"),
            ("ours, inline handler", service, "sum"),
            ("ours, async handler", service, "sum_in_task"),
        ):
            peers.append(Peer(name, command, pattern))
        answers = {uvloop.run(drive(peer, 1, 16, WARM_UP)).partition(b"#")[2] for peer in peers}
        if len(answers) != 1:
            sys.exit(f"The peers answer differently: {answers}")
        measure(peers, 1, 128, options.requests, options.rounds)
        measure(peers, 16, 4, options.requests, options.rounds)
        measure(peers, 1, 1, options.requests // 6, options.rounds)
    finally:
        for peer in peers:
            peer.stop()


if __name__ == "__main__":
    main()
