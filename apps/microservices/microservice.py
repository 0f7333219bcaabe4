"""One service of this process: its dispatcher and its servers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from . import conf, transports
from .conf import get_settings, load
from .dispatcher import Dispatcher
from .doors import Allow
from .exceptions import ConfigurationError
from .executor import Executor
from .handlers import registry
from .instruments import Bound
from .mailbox import Mailbox
from .middleware import Middleware
from .resilience.limiter import Gradient, Limiter
from .transports import Address, Role
from .transports.base import Server

logger = logging.getLogger("microservices")


class Microservice:
    """A service that lives here: its handlers, and the doors that lead to them."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        urls: Sequence[str],
        events: Address | None = None,
        address: Callable[[str], Address] = transports.parse,
        limiter: Limiter | None = None,
    ) -> None:
        self.name = dispatcher.service
        self.limiter = limiter
        self.dispatcher = dispatcher
        self.urls = tuple(urls)
        self._events = events
        self._address = address
        self.servers: list[Server] = []
        self.shared: list[Server] = []
        """Doors that another service of this process has opened, and will close."""
        self.cancelled = 0
        """How many handlers were not waited for to their end."""

    async def listen(self, urls: Sequence[str] | None = None, doors: dict[str, Server] | None = None) -> None:
        """Hear the bus, and open the doors: all, or those of `urls`.

        `doors` holds, by address, those that other services of this process have open: what several
        share is opened once. Raises ConfigurationError for a door that cannot be opened, naming it.
        """
        for mailbox in self.mailboxes:
            mailbox.open()
        open_doors = {} if doors is None else doors
        try:
            for address, role in self.addresses(self.urls if urls is None else urls):
                if role == "server" and str(address) in open_doors:
                    await self._share(open_doors[str(address)])
                else:
                    await self._open(address, role, open_doors)
        except BaseException:
            await self.close(0)
            raise

    async def _share(self, server: Server) -> None:
        await server.join(self.dispatcher)
        self.shared.append(server)
        logger.info("%s shares %s", self.name, server.address)

    async def _open(self, address: Address, role: Role, doors: dict[str, Server]) -> None:
        server: Server = transports.load(address, role)(address, self.dispatcher)
        server.hears_events = role == "listener" or not self._hears_at(address)
        try:
            await server.listen()
        except OSError as error:
            raise ConfigurationError(f"{self.name} cannot listen on {address}: {error.strerror or error}") from error
        self.servers.append(server)
        if server.shared:
            doors[str(address)] = server
        logger.info("%s listens on %s", self.name, address)

    async def stop_consuming(self, grace: float) -> None:
        """Fetch nothing more from brokers; what is at work has `grace` seconds to finish."""
        consumers = [server for server in self.servers if not server.opens_port]
        self.servers = [server for server in self.servers if server.opens_port]
        await self._close(consumers, grace)

    async def close(self, grace: float) -> None:
        """Close all doors; running handlers have `grace` seconds to finish."""
        servers, self.servers, self.shared = self.servers, [], []
        await self._close(servers, grace)

    async def _close(self, servers: Sequence[Server], grace: float) -> None:
        await asyncio.gather(*(server.close(grace) for server in servers))
        self.cancelled += sum(server.cancelled for server in servers)

    async def finish(self) -> None:
        """End the consumers. Call it when nobody delivers to them any more."""
        await asyncio.gather(*(mailbox.close() for mailbox in self.mailboxes))

    @property
    def mailboxes(self) -> list[Mailbox]:
        """The mailboxes of the service's consumers."""
        return list({id(h.mailbox): h.mailbox for h in self.dispatcher.handlers if h.mailbox is not None}.values())

    @property
    def bounds(self) -> list[Bound]:
        """How full is what stands between its peers and its handlers."""
        parts = (self.limiter, *self.servers, *self.mailboxes)
        return [bound for part in parts if part is not None for bound in part.bounds]

    def addresses(self, urls: Sequence[str]) -> Iterator[tuple[Address, Role]]:
        """Yield where the doors of `urls` are, and the bus where the service hears it by none of them."""
        addresses = [self._address(url) for url in urls]
        for address in addresses:
            yield address, "server"
        hears = any(self.dispatcher.hears(route) for route in self.dispatcher.routes)
        if hears and self._events is not None and not any(_brings(address, self._events) for address in addresses):
            yield self._events, "listener"

    def _hears_at(self, address: Address) -> bool:
        # What the bus brings must not come a second time through a server at the same broker.
        same = self._events is not None and _same_broker(address, self._events)
        return same and self._events is not None and not _brings(address, self._events)


def _same_broker(one: Address, other: Address) -> bool:
    def facts(address: Address) -> tuple[Any, ...]:
        # A RabbitMQ has virtual hosts; the channels of a Redis are those of all its databases.
        path = address.path if address.scheme.startswith("amqp") else ""
        return address.scheme, address.hosts, path, address.options.get("sentinel")

    return facts(one) == facts(other)


def _brings(address: Address, events: Address) -> bool:
    """Return whether a server at `address` is what listens to the bus, too."""
    transport = transports.SCHEMES[address.scheme]
    alike = address.options.get("codec") == events.options.get("codec")
    return _same_broker(address, events) and alike and transport.server == transport.listener


def services_here() -> list[str]:
    """Return the services of the map that live here, and then the apps that only hear events."""
    settings = get_settings()
    return [
        *settings.servers,
        *(name for name in registry.services() if _only_hears(name) and name not in settings.clients),
    ]


def _only_hears(name: str) -> bool:
    return all(door.kind == "event" for handler in registry.of(name) for door in handler.doors)


@cache
def get_executor() -> Executor:
    """Return the thread pool that all services of this process share."""
    settings = get_settings()
    return Executor(settings.threads, units_of_work=[load(path) for path in settings.units_of_work])


@cache
def get_microservice(name: str) -> Microservice:
    """Return a service that lives here. Raises ConfigurationError for one that does not."""
    settings = get_settings()
    if name not in services_here():
        here = ", ".join(settings.servers) or "none"
        raise ConfigurationError(f"The service {name!r} does not live in this process (here: {here}).")
    middlewares: list[Middleware] = [load(path) for path in settings.server_middleware]
    place = settings.servers.get(name)
    if place is not None and place.allow:
        middlewares.append(Allow(name, place.allow, registry.of(name)))
    limiter = None
    if settings.server_limit:
        # The innermost: what is refused is seen by the others, too.
        limiter = Limiter(name, Gradient(most=settings.server_limit))
        middlewares.append(limiter)
    dispatcher = Dispatcher(name, registry.of(name), get_executor(), middlewares, tracebacks=settings.tracebacks)

    def address(url: str) -> Address:
        return conf.address(url, place.options if place is not None and url == place.url else conf.NO_OPTIONS)

    events = conf.events_address()
    bus = None if events.scheme == "memory" else events
    return Microservice(dispatcher, list(_doors(name, dispatcher)), bus, address, limiter)


def opened(urls: Mapping[str, Sequence[str]] | None) -> Iterator[tuple[Microservice, Sequence[str]]]:
    """Yield each service that lives here, and the doors that it opens.

    These are what `urls` says of it; for None those of the map, if LISTEN says so.
    """
    listen = get_settings().listen
    for microservice in map(get_microservice, services_here()):
        own = microservice.urls if listen else ()
        yield microservice, own if urls is None else urls.get(microservice.name, ())


def _doors(name: str, dispatcher: Dispatcher) -> Iterator[str]:
    place = get_settings().servers.get(name)
    if place is None:
        return  # an app beside the map only hears events
    yield place.url
    own, other = (transports.parse(url).place if url else "" for url in (place.url, place.grpc))
    if other and dispatcher.methods and other != own:
        yield place.grpc
