"""Runs every process of the map from one warm parent, with prefixed logs, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.core.management.color import supports_color
from django.db import connections

from ...conf import get_settings
from ...supervisor.children import Child, Launcher, subprocess
from ...supervisor.process import Process, StartFailed, Supervisor, start_all
from ...transports import parse
from .. import memory, ports, valkey

START_TIMEOUT = 30.0
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
        launcher = Launcher(env)
        services = self._services(options["services"], launcher)
        try:
            code = asyncio.run(Fleet(bus, services, launcher).run())
        except StartFailed as error:
            raise CommandError(str(error)) from error
        if code:
            sys.exit(code)

    def _bus(self, env: dict[str, str]) -> Member | None:
        if os.environ.get("REDIS_URL") or os.environ.get("EVENTS_URL"):
            return None
        port = valkey.free_port()
        env["REDIS_URL"] = f"redis://127.0.0.1:{port}"
        command = valkey.command(port, Path(get_settings().data_dir, "valkey"))
        launch = partial(subprocess, command, {}, {}, output=True)
        return Member(BUS, launch, f"redis :{port}", port, answers)

    def _services(self, wanted: list[str], launcher: Launcher) -> list[Member]:
        settings = get_settings()
        known = [GATEWAY, *settings.clients]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise CommandError(f"No {', '.join(unknown)} on the map; known: {', '.join(known)}.", returncode=2)

        def member(name: str, address: str, port: int, *command: str, url: str = "") -> Member:
            argv = [sys.argv[0], *command]
            return Member(
                name, lambda: launcher.start(argv, {"SERVICES": name}, {}, output=True), address, port, is_ready, url
            )

        port = settings.http_port
        members = [member(GATEWAY, f"http :{port}", port, "serve", url=f"http://127.0.0.1:{port}/")]
        for name, service in settings.clients.items():
            address = parse(service.url)
            place = f"{address.scheme} :{address.port}"
            if service.grpc and parse(service.grpc).place != address.place:
                place += f"  grpc :{parse(service.grpc).port}"
            members.append(member(name, place, service.health or 0, "runmicroservice", name))
        return [member for member in members if not wanted or member.name in wanted]


class Member(Process):
    """One child with its own SERVICES, its output prefixed with its name; up when its port says so."""

    width = 13

    def __init__(
        self,
        name: str,
        launch: Callable[[], Awaitable[Child]],
        address: str,
        port: int,
        ready: Callable[[int], Awaitable[bool]],
        url: str = "",
    ) -> None:
        super().__init__(name)
        self.address = address
        self.port = port
        self.url = url
        self.ready_after = 0.0
        self._launch = launch
        self._ready = ready
        self._prefix = name.ljust(self.width)
        if supports_color():
            self._prefix = f"\033[{_COLOURS[sum(name.encode()) % len(_COLOURS)]}m{self._prefix}\033[0m"

    async def launch(self) -> Child:
        return await self._launch()

    def show(self, line: str) -> None:
        with suppress(OSError):  # nobody reads: the child must not wait for that
            print(f"{self._prefix}  {line}", flush=True)

    async def start(self) -> None:
        """Start the child and wait until it is ready. Raises StartFailed when it does not get there."""
        if taken := ports.owner(self.port):
            raise StartFailed(f"{self.name} cannot have port {self.port}: it is taken by {taken}.")
        await super().start()
        while time.monotonic() - self.started_at < START_TIMEOUT:
            if self.code is not None:
                raise StartFailed(f"{self.name} ended with {await self.ended()} while it started.")
            if await self._ready(self.port):
                self.ready_after = time.monotonic() - self.started_at
                return
            await asyncio.sleep(0.05)
        raise StartFailed(f"{self.name} was not ready within {START_TIMEOUT:g} s.")


class Fleet(Supervisor):
    """All children together: the bus first and last, the others at once."""

    def __init__(self, bus: Member | None, services: list[Member], launcher: Launcher) -> None:
        self._bus = bus
        self._services = services
        self._launcher = launcher
        self._members = [*([bus] if bus is not None else []), *services]
        super().__init__(self._members, get_settings().drain_timeout, say)

    async def start(self) -> None:
        """Start all of them and tell. Raises StartFailed."""
        started = time.monotonic()
        await asyncio.gather(self._launcher.prepare(), *([self._bus.start()] if self._bus is not None else []))
        await start_all(self._services)
        self._print_table(time.monotonic() - started)

    async def stop(self) -> list[int]:
        """Let all of them drain; return their exit codes."""
        # Whoever is asked from outside first: until it has answered it needs the others.
        edge = [service for service in self._services if service.name == GATEWAY]
        others = [service for service in self._services if service.name != GATEWAY]
        codes = [
            code
            for members in (edge, others)
            for code in await asyncio.gather(*(member.stop(self.grace) for member in members))
        ]
        if self._bus is not None:
            codes.append(await self._bus.stop(self.grace))
        await self._launcher.close()
        say(f"{len(self._services)} services stopped.")
        return codes

    def _print_table(self, seconds: float) -> None:
        lines = [("SERVICE", "PID", "STATE", "ADDRESS", "HEALTH", "READY", "PSS", "")]
        pss = [memory.proportional(member.pid) for member in self._members]
        for member, size in zip(self._members, pss, strict=True):
            health = "-" if member is self._bus else f":{member.port}"
            ready = f"{member.ready_after:.2f} s"
            lines.append((member.name, str(member.pid), "up", member.address, health, ready, _mib(size), member.url))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        for line in lines:
            say("  ".join(map(str.ljust, line, widths)).rstrip())
        say(f"{len(self._services)} services up in {seconds:.1f} s{self._in_all(pss)}. Ctrl-C stops them.")

    def _in_all(self, pss: list[float | None]) -> str:
        own = [memory.proportional(pid) for pid in (os.getpid(), self._launcher.pid) if pid is not None]
        if any(size is None for size in (*pss, *own)):
            return ""
        beside, total = (sum(filter(None, sizes)) for sizes in (own, (*pss, *own)))
        return f" with {_mib(total)} (PSS), {_mib(beside)} of it for runfleet itself"


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size:.0f} MiB"


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
