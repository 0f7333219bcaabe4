"""How a child is started: forked by the fork server where there is one, else as a plain subprocess."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import sysconfig
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from django.apps import apps

from ..transports.sockets import VARIABLE
from . import forkserver

logger = logging.getLogger("microservices.supervisor")

PATIENCE = 20.0
Sockets = Mapping[str, socket.socket]
_SETTINGS = "DJANGO_SETTINGS_MODULE"

# What a process imports only once it serves; the rest its supervisor has imported for the system checks.
SERVING = (
    "django.core.asgi",
    "django.core.cache.backends.locmem",
    "uvicorn",
    "uvicorn.lifespan.off",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.websockets_sansio_impl",
    "uvloop",
)


class Child(Protocol):
    """A process that was started, as asyncio's own look."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""

    @property
    def stdout(self) -> asyncio.StreamReader | None:
        """What it says, where that was asked for."""

    async def wait(self) -> int:
        """Wait for its end and return its exit code, minus the signal's number where one ended it."""

    def send_signal(self, number: signal.Signals, /) -> None:
        """Send it a signal, unless it has ended."""


async def subprocess(command: Sequence[str], env: Mapping[str, str], sockets: Sockets, *, output: bool) -> Child:
    """Start a plain subprocess. Raises OSError."""
    held = {name: held.fileno() for name, held in sockets.items()}
    pipe = asyncio.subprocess.PIPE if output else None
    return await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **env, **({VARIABLE: json.dumps(held)} if held else {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=asyncio.subprocess.STDOUT if output else None,
        start_new_session=True,  # a Ctrl-C in the terminal is for the parent alone
        pass_fds=tuple(held.values()),
    )


class Forked:
    """A child of the fork server."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.stdout: asyncio.StreamReader | None = None
        self.ending: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def returncode(self) -> int | None:
        return self.ending.result() if self.ending.done() else None

    async def wait(self) -> int:
        return await asyncio.shield(self.ending)

    def send_signal(self, number: signal.Signals, /) -> None:
        if not self.ending.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Launcher:
    """Starts `manage.py` commands. Without a fork server each is a plain subprocess, which takes longer."""

    def __init__(self, env: Mapping[str, str] | None = None, *, fork: bool = sys.platform == "linux") -> None:
        self._env = env or {}
        self._fork = fork
        self._server: asyncio.subprocess.Process | None = None
        self._channel: socket.socket | None = None
        self._reading: asyncio.Task[None] | None = None
        self._asked: deque[asyncio.Future[Forked]] = deque()
        self._children: dict[int, Forked] = {}
        self._opening = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The fork server's process id, if there is one."""
        return self._server.pid if self._server is not None else None

    async def prepare(self) -> None:
        """Have the fork server ready, if there is to be one."""
        async with self._opening:
            if self._fork and self._channel is None:
                await self._open()

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], sockets: Sockets, *, output: bool = False
    ) -> Child:
        """Start a script with its arguments; `sockets` are for it to inherit. Raises OSError, TimeoutError."""
        await self.prepare()
        if self._channel is None:
            return await subprocess([sys.executable, *argv], {**self._env, **env}, sockets, output=output)
        return await self._forked(self._channel, argv, env, sockets, output)

    async def close(self) -> None:
        """End the fork server. Call it when its children have ended; those that have not drain."""
        async with self._opening:
            channel, self._channel, self._fork = self._channel, None, False
            server, self._server = self._server, None
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        if channel is not None:
            channel.close()
        if server is not None:
            try:
                async with asyncio.timeout(PATIENCE):
                    await server.wait()
            except TimeoutError:
                server.kill()
                await server.wait()

    async def _open(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            # Without the name of the settings: what reads them is left for the children to import.
            env = {name: value for name, value in {**os.environ, **self._env}.items() if name != _SETTINGS}
            command = [sys.executable, "-P", forkserver.__file__, str(theirs.fileno())]
            self._server = await asyncio.create_subprocess_exec(
                *command, env=env, stdin=asyncio.subprocess.DEVNULL, start_new_session=True, pass_fds=[theirs.fileno()]
            )
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(PATIENCE):
                await loop.sock_sendall(ours, json.dumps(modules()).encode())
                if not await loop.sock_recv(ours, forkserver.LARGEST):
                    raise ConnectionResetError("it has ended")
            self._channel = ours
            self._reading = loop.create_task(self._read(ours))
        except OSError as error:  # a timeout, too
            logger.warning("no fork server (%r): each process imports everything for itself", error)
            self._fork = False
        finally:
            if self._channel is None:
                server, self._server = self._server, None
                with suppress(ProcessLookupError):
                    server.kill()
                ours.close()
                await server.wait()

    async def _forked(
        self, channel: socket.socket, argv: Sequence[str], env: Mapping[str, str], sockets: Sockets, output: bool
    ) -> Forked:
        settings = {name: os.environ[name] for name in (_SETTINGS,) if name in os.environ}
        request = {
            "argv": list(argv),
            "env": settings | dict(env),
            "output": output,
            "sockets": list(sockets),
            "variable": VARIABLE,
        }
        descriptors = [held.fileno() for held in sockets.values()]
        reader, ends = await _pipe() if output else (None, [])
        try:
            socket.send_fds(channel, [json.dumps(request).encode()], [*ends, *descriptors])
        finally:
            for end in ends:
                os.close(end)
        asked: asyncio.Future[Forked] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        try:
            async with asyncio.timeout(PATIENCE):
                child = await asyncio.shield(asked)
        except BaseException:
            asked.add_done_callback(_end)  # nobody waits for it any more
            raise
        child.stdout = reader
        return child

    async def _read(self, channel: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while message := await loop.sock_recv(channel, forkserver.LARGEST):
                self._take(json.loads(message))
        # It is gone, and its children are nobody's: they end, and are started again by another.
        logger.error("the fork server has ended; so do its %d processes", len(self._children))
        self._channel = None
        channel.close()
        for child in list(self._children.values()):
            child.send_signal(signal.SIGKILL)
            child.ending.set_result(-signal.SIGKILL)
        self._children.clear()
        while self._asked:
            self._asked.popleft().set_exception(ConnectionResetError("the fork server has ended"))

    def _take(self, facts: dict[str, Any]) -> None:
        if "ended" in facts:
            self._children.pop(facts["ended"]).ending.set_result(facts["code"])
            return
        asked = self._asked.popleft()
        if "started" in facts:
            child = self._children[facts["started"]] = Forked(facts["started"])
            asked.set_result(child)
        else:
            asked.set_exception(OSError(facts["failed"]))


def modules() -> list[str]:
    """Name the modules that a process needs and that are nobody's own, in the order of importing.

    None of an app: to import one is to register its checks and signals, and each process has other apps.
    """
    paths = sysconfig.get_paths()
    homes = tuple(f"{paths[name]}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    own = {config.name for config in apps.get_app_configs()}

    def foreign(module: Any) -> bool:
        return (getattr(module, "__file__", None) or "").startswith(homes)

    def of_an_app(name: str) -> bool:
        return any(name == app or name.startswith(f"{app}.") for app in own)

    names = [*(name for name, module in list(sys.modules.items()) if foreign(module)), *SERVING]
    return [name for name in names if not of_an_app(name)]


def _end(asked: asyncio.Future[Forked]) -> None:
    if not asked.cancelled() and asked.exception() is None:
        asked.result().send_signal(signal.SIGKILL)


async def _pipe() -> tuple[asyncio.StreamReader, list[int]]:
    read, write = os.pipe()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb", 0))
    return reader, [write]
