"""A process that is watched, and a group of them under one owner."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..lifecycle import until_signalled
from .children import Child

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
LAST_WORDS = 1.0  # seconds
MARGIN = 5.0  # seconds beyond DRAIN_TIMEOUT, after which a process is ended


class StartFailed(Exception):
    """A process could not be started, or was not ready in time."""


class Process:
    """One child, started again when it dies. Subclasses say how: `launch`, and `start` for what follows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started_at = 0.0
        self._child: Child | None = None
        self._output: asyncio.Task[None] | None = None

    async def launch(self) -> Child:
        """Start the child. Raises OSError."""
        raise NotImplementedError

    def show(self, line: str) -> None:
        """Take a line that the child has printed, where its output is read."""

    async def start(self) -> None:
        """Start the child. Raises StartFailed."""
        self.started_at = time.monotonic()
        try:
            self._child = await self.launch()
        except OSError as error:  # a timeout, too
            raise StartFailed(f"{self.name} could not be started: {error}") from error
        if self._child.stdout is not None:
            self._output = asyncio.create_task(self._show(self._child.stdout))

    @property
    def pid(self) -> int:
        """The child's process id; 0 before it was started."""
        return self._child.pid if self._child is not None else 0

    @property
    def code(self) -> int | None:
        """How the child has ended; None while it runs."""
        return self._child.returncode if self._child is not None else None

    async def keep_running(self, say: Callable[[str], None]) -> None:
        """Start the child again whenever it ends, after longer and longer pauses."""
        pause = FIRST_PAUSE
        while True:
            ended = await self.ended()
            if time.monotonic() - self.started_at > LONGEST_PAUSE:
                pause = FIRST_PAUSE
            # What died of one cause would else come back at one moment.
            seconds = pause * random.uniform(0.5, 1)  # noqa: S311
            say(f"{self.name} ended with {ended}; it is started again in {seconds:.1f} s.")
            await asyncio.sleep(seconds)
            pause = min(pause * 2, LONGEST_PAUSE)
            try:
                await self.start()
                say(f"{self.name} is up again, pid {self.pid}.")
            except StartFailed as error:
                say(str(error))

    async def ended(self) -> int:
        """Wait until the child has ended and what it said is shown; return its exit code."""
        if self._child is None:
            return 0
        code = await self._child.wait()
        if self._output is not None:
            # Not for longer: a process that the child has left behind may hold its output open for ever.
            await asyncio.wait([self._output], timeout=LAST_WORDS)
            self._output.cancel()
        return code

    def kill(self) -> None:
        """End the child at once."""
        self._signal(signal.SIGKILL)

    async def stop(self, grace: float) -> int:
        """Ask the child to drain, end it after `grace` seconds; return its exit code."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                code = await self.ended()
        except TimeoutError:
            self.kill()
            return await self.ended()
        # A child that has not yet come so far as to listen for it ends by it: that is what was asked.
        return 0 if code == -signal.SIGTERM else code

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None and self._child.returncode is None:
            with suppress(ProcessLookupError):
                self._child.send_signal(number)

    async def _show(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the reader's limit; the rest of it follows
                continue
            if not line:
                return
            self.show(line.decode(errors="replace").rstrip())


async def start_all(processes: Sequence[Process]) -> None:
    """Start processes at the same time; where one fails, no other is started behind its back. Raises StartFailed."""
    starting = [asyncio.create_task(process.start()) for process in processes]
    try:
        await asyncio.gather(*starting)
    finally:
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)


class Supervisor:
    """Processes under one owner: started together, kept running, told to drain by a signal."""

    def __init__(self, processes: Sequence[Process], drain_timeout: float, say: Callable[[str], None]) -> None:
        self.processes = processes
        self.grace = drain_timeout + MARGIN
        self._say = say

    async def start(self) -> None:
        """Start all of them. Raises StartFailed."""
        await start_all(self.processes)

    async def stop(self) -> list[int]:
        """Let all of them drain; return their exit codes."""
        return await asyncio.gather(*(process.stop(self.grace) for process in self.processes))

    def kill(self) -> None:
        """End all of them at once."""
        for process in self.processes:
            process.kill()

    async def run(self) -> int:
        """Run until SIGTERM or SIGINT; return 0 when every child ended well. Raises StartFailed."""
        signalled = asyncio.create_task(until_signalled(self.kill), name="signals")
        starting = asyncio.create_task(self.start(), name="start")
        keeping: list[asyncio.Task[None]] = []
        codes: list[int] = []
        try:
            either: list[asyncio.Future[Any]] = [signalled, starting]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not signalled.done():
                await starting
                keeping = [asyncio.create_task(process.keep_running(self._say)) for process in self.processes]
                await signalled
        finally:
            for task in (starting, *keeping):
                task.cancel()
            await asyncio.gather(starting, *keeping, return_exceptions=True)
            codes = await self.stop()
            signalled.cancel()  # last: until then a second signal ends everything at once
        return 1 if any(codes) else 0
