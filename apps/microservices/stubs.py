"""`clients.grpc("users").service("UsersService")`: a gRPC service as an object, as NestJS's `getService`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from . import balanced
from .conf import NO_OPTIONS, addresses, get_settings, proto_options
from .exceptions import ConfigurationError
from .microservice import get_microservice
from .transports import Address
from .transports.base import Caller

if TYPE_CHECKING:
    from .transports.protos import Method, Protos


class GrpcServices:
    """The gRPC services behind one client."""

    def __init__(self, client: Any, files: Protos) -> None:
        self.client = client
        self._protos = files

    def service(self, name: str) -> Stub:
        """Return a service by its name, its package only where needed. Raises ConfigurationError."""
        return Stub(self.client, name, self._protos.services[self._protos.service(name)])


class Stub:
    """One gRPC service: each RPC is a method, as `FindOne`, `findOne` or `find_one`.

    A method takes (data, *, returns, timeout, metadata), as `Client.send` does, and is awaited; one that
    streams its answers is iterated with `async for`. One that takes a stream is given an async iterator
    as data. `sync` has the same methods for code without an event loop.
    """

    def __init__(self, client: Any, name: str, methods: Mapping[str, Method], *, sync: bool = False) -> None:
        self._client = client
        self._name = name
        self._rpcs = methods
        self._sync = sync
        self._spellings = {_plain(name): method for name, method in methods.items()}

    @property
    def sync(self) -> Stub:
        """The same service for code without an event loop."""
        return Stub(self._client, self._name, self._rpcs, sync=True)

    def __getattr__(self, name: str) -> Any:
        method = None if name.startswith("_") else self._rpcs.get(name) or self._spellings.get(_plain(name))
        if method is None:
            raise AttributeError(f"There is no RPC {name!r}; there is {', '.join(self._rpcs)}.")
        caller = self._client.sync if self._sync else self._client
        return partial(caller.stream if method.server_streaming else caller.send, f"{self._name}/{method.name}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._rpcs]


def connect(service: str) -> Caller:
    """Return a connection to the gRPC methods of a service, local where it lives here. Raises ConfigurationError."""
    if service in get_settings().servers:
        from .transports.grpc import LocalGrpcClient

        return LocalGrpcClient(get_microservice(service).dispatcher, proto_files())
    return balanced.connect(service, where(service))


def where(service: str) -> list[Address]:
    """Return the gRPC addresses of a service of the map. Raises ConfigurationError where it has none."""
    place = get_settings().clients[service]
    url = place.grpc or (place.url if place.url.startswith("grpc") else "")
    if not url:
        raise ConfigurationError(f"MICROSERVICES['CLIENTS'][{service!r}] has no `grpc` address.")
    return addresses(url, place.options if url == place.url else NO_OPTIONS)


def proto_files() -> Protos:
    """Return the .proto files of PROTO_PATH. Raises ConfigurationError for files that cannot be read."""
    from .transports import protos

    told = proto_options()
    return protos.load(tuple(told["proto_path"]), told["cache"])


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
