"""Runs every process of the map as plain subprocesses, with prefixed logs, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.core.management.color import supports_color
from django.db import connections

from ...conf import get_settings
from ...lifecycle import until_signalled
from ...transports import parse
from .. import ports, valkey

START_TIMEOUT = 30.0
STOP_MARGIN = 5.0
MAX_BACK_OFF = 30.0
GATEWAY = "gateway"
BUS = "valkey"
_COLOURS = (36, 32, 33, 35, 34, 31)


class Command(BaseCommand):
    """`manage.py runfleet`: the whole fleet on one machine, for development."""

    help = "Start the gateway and every service as a process of its own; Ctrl-C stops all."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("services", nargs="*", metavar="NAME", help="only these (default: all)")
        parser.add_argument("--prepare", action="store_true", help="migrate and seed the databases first")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["prepare"]:
            call_command("migratefleet", seed=True)
            connections.close_all()
        env = {"LISTEN": "1", "PYTHONUNBUFFERED": "1"}
        bus = self._bus(env)
        fleet = Fleet(bus, self._processes(options["services"], env), get_settings().drain_timeout)
        code = asyncio.run(fleet.run())
        if code:
            sys.exit(code)

    def _bus(self, env: dict[str, str]) -> Process | None:
        if os.environ.get("REDIS_URL") or os.environ.get("EVENTS_URL"):
            return None
        port = valkey.free_port()
        env["REDIS_URL"] = f"redis://127.0.0.1:{port}"
        command = valkey.command(port, Path(get_settings().data_dir, "valkey"))
        return Process(BUS, command, {}, f"redis :{port}", port, lambda: answers(port))

    def _processes(self, wanted: list[str], env: dict[str, str]) -> list[Process]:
        settings = get_settings()
        known = [GATEWAY, *settings.clients]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise CommandError(f"No {', '.join(unknown)} on the map; known: {', '.join(known)}.", returncode=2)
        port = settings.http_port
        url = f"http://127.0.0.1:{port}/"
        processes = [Process(GATEWAY, manage("serve"), env, f"http :{port}", port, lambda: is_ready(port), url)]
        for name, service in settings.clients.items():
            address, health = parse(service.url), service.health or 0
            place = f"{address.scheme} :{address.port}"
            if service.grpc and parse(service.grpc).place != address.place:
                place += f"  grpc :{parse(service.grpc).port}"
            ready = _Ready(health)
            processes.append(Process(name, manage("runmicroservice", name), env, place, health, ready))
        return [process for process in processes if not wanted or process.name in wanted]


def manage(*words: str) -> list[str]:
    """Return the command line of a `manage.py` command."""
    return [sys.executable, sys.argv[0], *words]


class _Ready:
    """Asks a process's health port."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __call__(self) -> Awaitable[bool]:
        return is_ready(self._port)


class Process:
    """One child with its own SERVICES, its output prefixed with its name; started again when it dies."""

    width = 13

    def __init__(
        self,
        name: str,
        command: list[str],
        env: dict[str, str],
        address: str,
        port: int,
        ready: Callable[[], Awaitable[bool]],
        url: str = "",
    ) -> None:
        self.name = name
        self.address = address
        self.port = port
        self.url = url
        self.ready_after = 0.0
        self._command = command
        self._env = env
        self._ready = ready
        self._child: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The child's process id; 0 before it was started."""
        return self._child.pid if self._child is not None else 0

    async def start(self) -> None:
        """Start the child and wait until it is ready. Raises CommandError when it does not get there."""
        if taken := ports.owner(self.port):
            raise CommandError(f"{self.name} cannot have port {self.port}: it is taken by {taken}.")
        started = time.monotonic()
        self._child = await asyncio.create_subprocess_exec(
            *self._command,
            env={**os.environ, **self._env, "SERVICES": self.name},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal is for the parent alone
        )
        self._output = asyncio.create_task(self._show(cast(asyncio.StreamReader, self._child.stdout)))
        while time.monotonic() - started < START_TIMEOUT:
            if self._child.returncode is not None:
                await self._output
                raise CommandError(f"{self.name} ended with {self._child.returncode} while it started.")
            if await self._ready():
                self.ready_after = time.monotonic() - started
                return
            await asyncio.sleep(0.05)
        raise CommandError(f"{self.name} was not ready within {START_TIMEOUT:g} s.")

    async def keep_running(self) -> None:
        """Start the child again whenever it ends, after longer and longer pauses."""
        pause = 0.5
        while True:
            alive_since = time.monotonic()
            say(f"{self.name} ended with {await self.ended()}; it is started again in {pause:g} s.")
            await asyncio.sleep(pause)
            pause = 0.5 if time.monotonic() - alive_since > MAX_BACK_OFF else min(pause * 2, MAX_BACK_OFF)
            try:
                await self.start()
                say(f"{self.name} is up again, pid {self.pid}.")
            except CommandError as error:
                say(str(error))

    async def ended(self) -> int:
        """Wait until the child has ended; return its exit code."""
        if self._child is None or self._output is None:
            return 0
        code = await self._child.wait()
        await asyncio.shield(self._output)
        return code

    def kill(self) -> None:
        """End the child at once."""
        if self._child is not None and self._child.returncode is None:
            self._child.kill()

    async def stop(self, grace: float) -> int:
        """Ask the child to drain, end it after `grace` seconds; return its exit code."""
        if self._child is None:
            return 0
        if self._child.returncode is None:
            self._child.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                code = await self.ended()
        except TimeoutError:
            self.kill()
            return await self.ended()
        # A child that has not yet come so far as to listen for it ends by it: that is what was asked.
        return 0 if code == -signal.SIGTERM else code

    async def _show(self, stream: asyncio.StreamReader) -> None:
        prefix = self.name.ljust(self.width)
        if supports_color():
            prefix = f"\033[{_COLOURS[sum(self.name.encode()) % len(_COLOURS)]}m{prefix}\033[0m"
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the reader's limit; the rest of it follows
                continue
            if not line:
                return
            with suppress(OSError):  # nobody reads: the child must not wait for that
                print(f"{prefix}  {line.decode(errors='replace').rstrip()}", flush=True)


class Fleet:
    """All children together: the bus first and last, the others at once."""

    def __init__(self, bus: Process | None, services: list[Process], drain_timeout: float) -> None:
        self._bus = bus
        self._services = services
        self._grace = drain_timeout + STOP_MARGIN

    async def run(self) -> int:
        """Run until a signal; return 0 when every child ended well."""
        signalled = asyncio.create_task(until_signalled(self._kill))
        started = time.monotonic()
        starting = asyncio.create_task(self._start())
        keeping: list[asyncio.Task[None]] = []
        codes: list[int] = []
        try:
            either: list[asyncio.Future[Any]] = [signalled, starting]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not signalled.done():
                await starting
                self._print_table(time.monotonic() - started)
                keeping = [asyncio.create_task(process.keep_running()) for process in self._all]
                await signalled
        finally:
            for task in (starting, signalled, *keeping):
                task.cancel()
            await asyncio.gather(starting, signalled, *keeping, return_exceptions=True)
            codes = await asyncio.gather(*(process.stop(self._grace) for process in self._services))
            if self._bus is not None:
                codes.append(await self._bus.stop(self._grace))
        say(f"{len(self._services)} services stopped.")
        return 1 if any(codes) else 0

    def _kill(self) -> None:
        for process in self._all:
            process.kill()

    @property
    def _all(self) -> list[Process]:
        return [*([self._bus] if self._bus is not None else []), *self._services]

    async def _start(self) -> None:
        if self._bus is not None:
            await self._bus.start()
        await asyncio.gather(*(process.start() for process in self._services))

    def _print_table(self, seconds: float) -> None:
        lines = [("SERVICE", "PID", "STATE", "ADDRESS", "HEALTH", "READY", "")]
        for process in self._all:
            health = "-" if process is self._bus else f":{process.port}"
            ready = f"{process.ready_after:.2f} s"
            lines.append((process.name, str(process.pid), "up", process.address, health, ready, process.url))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        for line in lines:
            say("  ".join(map(str.ljust, line, widths)).rstrip())
        say(f"{len(self._services)} services up in {seconds:.1f} s. Ctrl-C stops them.")


def say(text: str) -> None:
    """Print a line of the fleet's own."""
    with suppress(OSError):
        print(f"  {text}", flush=True)


async def answers(port: int) -> bool:
    """Return whether somebody takes connections on a port."""
    try:
        async with asyncio.timeout(1):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return True
    except (OSError, TimeoutError):
        return False


async def is_ready(port: int) -> bool:
    """Return whether the process with this health port says that it is ready."""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                status = await reader.readline()
            finally:
                writer.close()
            return b" 200 " in status
    except (OSError, TimeoutError):
        return False
