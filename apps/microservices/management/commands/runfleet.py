"""Runs every process of the map as plain subprocesses, with prefixed logs, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from argparse import ArgumentParser
from typing import Any, cast

from django.core.management.base import BaseCommand, CommandError

from ...conf import get_settings
from ...lifecycle import until_signalled
from ...transports import parse

START_TIMEOUT = 30.0
STOP_MARGIN = 5.0
GATEWAY = "gateway"


class Command(BaseCommand):
    """`manage.py runfleet`: the whole fleet on one machine, for development."""

    help = "Start the gateway and every service as a process of its own; Ctrl-C stops all."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("services", nargs="*", metavar="NAME", help="only these (default: all)")

    def handle(self, *args: Any, **options: Any) -> None:
        processes = self._processes(options["services"])
        code = asyncio.run(Fleet(processes, get_settings().drain_timeout).run())
        if code:
            sys.exit(code)

    def _processes(self, wanted: list[str]) -> list[Process]:
        settings = get_settings()
        known = [GATEWAY, *settings.clients]
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise CommandError(f"No {', '.join(unknown)} on the map; known: {', '.join(known)}.", returncode=2)
        width = max(map(len, known))
        port = settings.http_port
        processes = [Process(GATEWAY, ["serve"], f"http :{port}", port, f"http://127.0.0.1:{port}/api/docs", width)]
        for name, service in settings.clients.items():
            address = parse(service.url)
            command = ["runmicroservice", name]
            place = f"{address.scheme} :{address.port}"
            processes.append(Process(name, command, place, service.health or 0, "", width))
        return [process for process in processes if not wanted or process.name in wanted]


class Process:
    """One child: a `manage.py` command with its own SERVICES, its output prefixed with its name."""

    def __init__(self, name: str, command: list[str], address: str, health: int, url: str, width: int) -> None:
        self.name = name
        self.address = address
        self.health = health
        self.url = url
        self.ready_after = 0.0
        self._command = command
        self._prefix = f"{name.ljust(width)}  "
        self._child: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self._child.pid if self._child is not None else 0

    async def start(self) -> None:
        """Start the child and wait until it is ready. Raises CommandError when it does not get there."""
        started = time.monotonic()
        self._child = await asyncio.create_subprocess_exec(
            sys.executable,
            sys.argv[0],
            *self._command,
            env={**os.environ, "SERVICES": self.name, "LISTEN": "1", "PYTHONUNBUFFERED": "1"},
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
            if await is_ready(self.health):
                self.ready_after = time.monotonic() - started
                return
            await asyncio.sleep(0.05)
        raise CommandError(f"{self.name} was not ready within {START_TIMEOUT:g} s.")

    async def ended(self) -> int:
        """Wait until the child has ended; return its exit code."""
        if self._child is None or self._output is None:
            return 0
        code = await self._child.wait()
        await self._output
        return code

    async def stop(self, grace: float) -> int:
        """Ask the child to drain, end it after `grace` seconds; return its exit code."""
        if self._child is None:
            return 0
        if self._child.returncode is None:
            self._child.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                return await self.ended()
        except TimeoutError:
            self._child.kill()
            return await self.ended()

    async def _show(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the reader's limit; the rest of it follows
                continue
            if not line:
                return
            sys.stdout.write(self._prefix + line.decode(errors="replace").rstrip("\n") + "\n")
            sys.stdout.flush()


class Fleet:
    """All children together: started at once, stopped at once."""

    def __init__(self, processes: list[Process], drain_timeout: float) -> None:
        self._processes = processes
        self._grace = drain_timeout + STOP_MARGIN

    async def run(self) -> int:
        """Run until a signal; return 0 when every child ended well."""
        signalled = asyncio.create_task(until_signalled())
        started = time.monotonic()
        starting = asyncio.gather(*(process.start() for process in self._processes))
        codes: list[int] = []
        try:
            either: list[asyncio.Future[Any]] = [signalled, starting]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not signalled.done():
                await starting
                self._print_table(time.monotonic() - started)
                watching = [asyncio.create_task(self._watch(process)) for process in self._processes]
                await signalled
                for watcher in watching:
                    watcher.cancel()
        finally:
            starting.cancel()
            signalled.cancel()
            codes = await asyncio.gather(*(process.stop(self._grace) for process in self._processes))
        print(f"  {len(self._processes)} services stopped.", flush=True)
        return 1 if any(codes) else 0

    async def _watch(self, process: Process) -> None:
        code = await process.ended()
        print(f"  {process.name} ended with {code}; the others go on.", flush=True)

    def _print_table(self, seconds: float) -> None:
        lines = [("SERVICE", "PID", "STATE", "ADDRESS", "HEALTH", "READY", "")]
        for process in self._processes:
            ready = f"{process.ready_after:.2f} s"
            row = (process.name, str(process.pid), "up", process.address, f":{process.health}", ready, process.url)
            lines.append(row)
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        for line in lines:
            print("  " + "  ".join(map(str.ljust, line, widths)).rstrip())
        print(f"  {len(self._processes)} services up in {seconds:.1f} s. Ctrl-C stops them.", flush=True)


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
