"""Transports by URL scheme: which class serves it, which class calls it."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from ..exceptions import ConfigurationError


class Transport(NamedTuple):
    """The dotted paths of a scheme's classes: what serves and what calls a service, what emits and hears events."""

    server: str = ""
    client: str = ""
    bus: str = ""
    listener: str = ""
    broker: bool = False
    """Whether the address is a broker's, which all services may share."""
    extra: str = ""
    """The extra of the distribution that brings what it needs."""


_REDIS = Transport(
    server="microservices.transports.redis.RedisServer",
    client="microservices.transports.redis.RedisClient",
    bus="microservices.transports.redis.RedisClient",
    listener="microservices.transports.redis.RedisServer",
    broker=True,
    extra="redis",
)
_STREAMS = Transport(
    bus="microservices.transports.redis_streams.StreamsBus",
    listener="microservices.transports.redis_streams.StreamsListener",
    broker=True,
    extra="redis",
)
_GRPC = Transport(
    server="microservices.transports.grpc.GrpcServer",
    client="microservices.transports.grpc.GrpcClient",
    extra="grpc",
)
SCHEMES = {
    "memory": Transport(bus="microservices.transports.local.MemoryBus"),
    "redis": _REDIS,
    "rediss": _REDIS,
    "redis-streams": _STREAMS,
    "rediss-streams": _STREAMS,
    "tcp": Transport(
        server="microservices.transports.tcp.TcpServer",
        client="microservices.transports.tcp.TcpClient",
    ),
    "grpc": _GRPC,
    "grpcs": _GRPC,
}

Role = Literal["server", "client", "bus", "listener"]
_ROLES = {"server": "serve a service", "client": "call a service", "bus": "carry events", "listener": "bring events"}


# What a transport's options are made of.
Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Address(NamedTuple):
    """Where a service is: `scheme://host:port?option=value`."""

    scheme: str
    host: str
    port: int
    options: dict[str, Any]
    username: str = ""
    password: str = ""
    path: str = ""

    @property
    def place(self) -> str:
        """Host and port, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        # For people and logs: without credentials.
        return f"{self.scheme}://{self.place}" if self.host else f"{self.scheme}://"

    def __repr__(self) -> str:
        return f"<Address {self}>"


def parse(url: str) -> Address:
    """Split a URL. Raises ConfigurationError for an unknown scheme, naming the nearest, or a bad port."""
    parts = urlsplit(url)
    url = url.replace(f"{parts.netloc.rpartition('@')[0]}@", "***@")  # in an error it is for people and logs, too
    if parts.scheme not in SCHEMES:
        near = difflib.get_close_matches(parts.scheme, SCHEMES, n=1)
        hint = f" Did you mean {near[0]}://?" if near else f" Known: {', '.join(f'{s}://' for s in SCHEMES)}."
        raise ConfigurationError(f"Unknown transport {parts.scheme or url!r} in {url!r}.{hint}")
    if "," in parts.netloc:
        raise ConfigurationError(f"{url!r} holds several addresses: give one address for each service.")
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigurationError(f"{url!r}: {error}.") from error
    if parts.scheme in ("tcp", "grpc", "grpcs") and not (parts.hostname and port):
        raise ConfigurationError(f"{url!r} must name a host and a port, as in {parts.scheme}://127.0.0.1:3001.")
    options = dict(parse_qsl(parts.query))
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return Address(parts.scheme, parts.hostname or "", port or 0, options, user, password, parts.path)


def load(address: Address, role: Role) -> Any:
    """Import the class that plays `role` for an address. Raises ConfigurationError where that cannot be."""
    transport = SCHEMES[address.scheme]
    path: str = getattr(transport, role)
    if not path:
        fit = ", ".join(f"{scheme}://" for scheme, transport in SCHEMES.items() if getattr(transport, role))
        raise ConfigurationError(f"{address.scheme}:// cannot {_ROLES[role]}; use {fit}.")
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        needed = f"pip install 'django-hybrid-microservices[{transport.extra}]'"
        raise ConfigurationError(f"{address.scheme}:// needs {error.name}: {needed}") from error


def read_options(shape: type[Any], address: Address) -> Any:
    """Fill a transport's options Struct from the URL's query. Raises ConfigurationError for a bad one."""
    known = [field.name for field in msgspec.structs.fields(shape)]
    for name in address.options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise ConfigurationError(f"{address}: unknown option {name!r}; {hint}")
    try:
        return msgspec.convert(address.options, shape, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{address}: {error}") from error
