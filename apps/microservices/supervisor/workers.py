"""Several processes behind the same doors: what they share is held here, and each is started again when it dies."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .. import transports
from ..conf import get_settings
from ..doors import refuse_insecure
from ..exceptions import ConfigurationError
from ..microservice import opened
from ..serving import BACKLOG, bind
from ..transports import Address, Role
from ..transports.base import Server
from ..transports.tcp import TcpServer
from .children import Child, Launcher, Sockets
from .process import Process, StartFailed, Supervisor

logger = logging.getLogger("microservices.supervisor")

HTTP = "http"


class Worker(Process):
    """One of the processes behind the doors: the same command, without workers of its own."""

    def __init__(self, number: int, launcher: Launcher, sockets: Sockets) -> None:
        super().__init__(f"worker {number}")
        instance = get_settings().instance
        # One name for all of them would be one row in the registry.
        self._env = {"INSTANCE": f"{instance}-{number}"} if instance else {}
        self._launcher = launcher
        self._sockets = sockets

    async def launch(self) -> Child:
        return await self._launcher.start([*sys.argv, "--workers=1"], self._env, self._sockets)


class Workers(Supervisor):
    """All of them, and the sockets that they share."""

    def __init__(self, count: int, sockets: Sockets) -> None:
        self._launcher = Launcher()
        self._sockets = sockets
        workers = [Worker(number, self._launcher, sockets) for number in range(1, count + 1)]
        super().__init__(workers, get_settings().drain_timeout, logger.warning)

    async def stop(self) -> list[int]:
        """Let all of them drain; return their exit codes."""
        for held in self._sockets.values():
            held.close()  # or whoever comes now would wait for a worker that takes nobody
        codes = await super().stop()
        await self._launcher.close()
        return codes


def run(count: int, host: str, port: int | None, urls: Mapping[str, Sequence[str]] | None = None) -> int:
    """Run this very command in `count` workers until SIGTERM or SIGINT; return 0 when all ended well.

    Raises ConfigurationError where a port cannot be bound, a transport cannot be shared, or no worker starts.
    """
    sockets = hold(host, port, urls)
    try:
        if HTTP in sockets:
            logger.info("%d workers, http on %s:%d", count, *sockets[HTTP].getsockname()[:2])
        if get_settings().events_url.startswith("memory:"):
            logger.warning("the events of each worker stay in its memory: give them a bus (EVENTS_URL)")
        return asyncio.run(Workers(count, sockets).run())
    except StartFailed as error:
        raise ConfigurationError(str(error)) from error
    finally:
        for held in sockets.values():
            held.close()


def hold(host: str, port: int | None, urls: Mapping[str, Sequence[str]] | None) -> dict[str, socket.socket]:
    """Bind what the workers will listen on, by the name under which they ask for it. Raises ConfigurationError."""
    held: dict[str, socket.socket] = {}
    refuse_insecure(url for _, doors in opened(urls) for url in doors)
    try:
        if port is not None:
            held[HTTP] = bind(host, port)
        for service, address, role in _doors(urls):
            server: type[Server] = transports.load(address, role)
            if not server.opens_port:
                if reason := _not_shared(address, transports.read_options(server.Options, address)):
                    raise ConfigurationError(f"{service} at {address} cannot have several workers: {reason}.")
            elif issubclass(server, TcpServer):
                held[f"{service} {address}"] = _bound(service, address)
                held[f"{service} {address}"].listen(BACKLOG)
            elif server.scheme == "grpc":
                # grpcio takes no socket: this one keeps the port, and every worker binds it beside.
                held[f"{service} {address}"] = _bound(service, address, reuse=True)
            else:
                raise ConfigurationError(f"{service} at {address} cannot have several workers: it opens its own port.")
    except BaseException:
        for bound in held.values():
            bound.close()
        raise
    return held


def _doors(urls: Mapping[str, Sequence[str]] | None) -> Iterator[tuple[str, Address, Role]]:
    # As Lifecycle.start opens them: the door that several services share belongs to the first.
    shared: set[str] = set()
    for microservice, doors in opened(urls):
        for address, role in microservice.addresses(doors):
            if role == "server" and str(address) in shared:
                continue
            if role == "server" and transports.load(address, role).shared:
                shared.add(str(address))
            yield microservice.name, address, role


def _not_shared(address: Address, options: object) -> str:
    """Return why a broker would give each message to every worker, or nothing to all but one."""

    def told(name: str) -> object:
        return getattr(options, name, None)

    scheme = address.scheme
    if scheme in ("redis", "rediss"):
        return "the pub/sub of Redis has no groups, each would answer; redis-streams:// has them, for events"
    if scheme == "nats" and told("queue") == "":
        return "without a queue group each would answer"
    if scheme.startswith("mqtt") and not told("share"):
        return "without `share` each would answer"
    if scheme.startswith("mqtt") and told("client_id"):
        return "with a `client_id` each would push out the other"
    if scheme == "kafka" and told("alone"):
        return "with `alone` each would take all partitions"
    if scheme.startswith("amqp") and told("exclusive"):
        return "an exclusive queue has one consumer"
    return ""


def _bound(service: str, address: Address, *, reuse: bool = False) -> socket.socket:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        places = list(dict.fromkeys((family, place) for family, *_, place in found))
        if len(places) > 1:
            named = " and ".join(str(place[0]) for _, place in places)
            raise ConfigurationError(f"{service} at {address} is at {named}: for several workers name one of them.")
        bound = _bind(*places[0])
        if reuse:
            bound.close()  # with it alone, a port that others share would be shared in silence
            bound = _bind(*places[0], reuse=True)
    except OSError as error:
        raise ConfigurationError(f"{service} cannot listen on {address}: {error.strerror or error}") from error
    return bound


def _bind(family: int, place: Any, *, reuse: bool = False) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(place)
    except BaseException:
        bound.close()
        raise
    return bound
