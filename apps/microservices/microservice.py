"""One service of this process: its dispatcher and its servers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

from . import transports
from .conf import get_settings, load
from .dispatcher import Dispatcher
from .exceptions import ConfigurationError
from .executor import Executor
from .handlers import registry
from .transports.base import Server

logger = logging.getLogger("microservices")


class Microservice:
    """A service that lives here: its handlers, and the doors that lead to them."""

    def __init__(self, dispatcher: Dispatcher, urls: Sequence[str]) -> None:
        self.name = dispatcher.service
        self.dispatcher = dispatcher
        self.urls = tuple(urls)
        self.servers: list[Server] = []

    async def listen(self) -> None:
        """Open all doors. Raises ConfigurationError for one that cannot be opened, naming it."""
        for url in self.urls:
            address = transports.parse(url)
            server: Server = transports.load(address, "server")(address, self.dispatcher)
            try:
                await server.listen()
            except OSError as error:
                await self.close(0)
                reason = error.strerror or error
                raise ConfigurationError(f"{self.name} cannot listen on {address}: {reason}") from error
            self.servers.append(server)
            logger.info("%s listens on %s", self.name, address)

    async def close(self, grace: float) -> None:
        """Close all doors; running handlers have `grace` seconds to finish."""
        servers, self.servers = self.servers, []
        for server in servers:
            await server.close(grace)


@cache
def get_executor() -> Executor:
    """Return the thread pool that all services of this process share."""
    settings = get_settings()
    return Executor(settings.threads, units_of_work=[load(path) for path in settings.units_of_work])


@cache
def get_microservice(name: str) -> Microservice:
    """Return a service that lives here. Raises ConfigurationError for one that does not."""
    settings = get_settings()
    if name not in settings.servers:
        here = ", ".join(settings.servers) or "none"
        raise ConfigurationError(f"The service {name!r} does not live in this process (here: {here}).")
    middlewares = [load(path) for path in settings.server_middleware]
    dispatcher = Dispatcher(name, registry.of(name), get_executor(), middlewares)
    return Microservice(dispatcher, [settings.servers[name].url])
