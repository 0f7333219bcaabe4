"""Transports by URL scheme: which class serves it, which class calls it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from ..exceptions import ConfigurationError


class Transport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The dotted paths of a scheme's classes: what serves and what calls a service, what emits and hears events."""

    server: str = ""
    client: str = ""
    bus: str = ""
    listener: str = ""
    broker: bool = False
    """Whether the address is a broker's, which all services may share."""
    tls: bool = False
    """Whether it needs what the options of TLS name."""
    names_port: bool = False
    """Whether a URL must name a host and a port."""
    several: bool = False
    """Whether a URL may name several hosts."""
    instances: bool = False
    """Whether its addresses are those of instances, each of which may have a `weight` and a `zone`."""
    port: int = 0
    """The port where a URL names none."""
    extra: str = ""
    """The extra of the distribution that brings what it needs."""


_HERE = "microservices.transports"
_TCP = Transport(server=f"{_HERE}.tcp.TcpServer", client=f"{_HERE}.tcp.TcpClient", names_port=True, instances=True)
_GRPC = Transport(
    server=f"{_HERE}.grpc.GrpcServer",
    client=f"{_HERE}.grpc.GrpcClient",
    names_port=True,
    several=True,
    instances=True,
    extra="grpc",
)
_REDIS = Transport(
    server=f"{_HERE}.redis.RedisServer",
    client=f"{_HERE}.redis.RedisClient",
    bus=f"{_HERE}.redis.RedisClient",
    listener=f"{_HERE}.redis.RedisServer",
    broker=True,
    several=True,
    port=6379,
    extra="redis",
)
_STREAMS = msgspec.structs.replace(
    _REDIS,
    server="",
    client="",
    bus=f"{_HERE}.redis_streams.StreamsBus",
    listener=f"{_HERE}.redis_streams.StreamsListener",
)


def _broker(module: str, name: str, port: int, extra: str = "") -> Transport:
    return Transport(
        server=f"{_HERE}.{module}.{name}Server",
        client=f"{_HERE}.{module}.{name}Client",
        bus=f"{_HERE}.{module}_events.{name}Bus",
        listener=f"{_HERE}.{module}_events.{name}Listener",
        broker=True,
        several=True,
        port=port,
        extra=extra,
    )


def _secure(transport: Transport) -> Transport:
    return msgspec.structs.replace(transport, tls=True)


SCHEMES = {
    "memory": Transport(bus=f"{_HERE}.local.MemoryBus"),
    "tcp": _TCP,
    "tcps": _secure(_TCP),
    "redis": _REDIS,
    "rediss": _secure(_REDIS),
    "redis-streams": _STREAMS,
    "rediss-streams": _secure(_STREAMS),
    "nats": _broker("nats", "Nats", 4222),
    "mqtt": _broker("mqtt", "Mqtt", 1883),
    "mqtts": _secure(_broker("mqtt", "Mqtt", 8883)),
    "amqp": _broker("rmq", "Rmq", 5672, "rmq"),
    "amqps": _secure(_broker("rmq", "Rmq", 5671, "rmq")),
    "kafka": _broker("kafka", "Kafka", 9092, "kafka"),
    "grpc": _GRPC,
    "grpcs": _secure(_GRPC),
}

_declared: set[str] = set()

_WEIGHT = re.compile("[1-9][0-9]?|100")
_NEXT_URL = re.compile(r",\s*(?=[a-z][a-z0-9+.-]*://)")


def declare(transports: Mapping[str, Transport]) -> None:
    """Make a project's own transports known, by URL scheme. Raises ConfigurationError for a scheme of ours."""
    while _declared:
        SCHEMES.pop(_declared.pop(), None)
    for scheme, transport in transports.items():
        if scheme in SCHEMES:
            raise ConfigurationError(f"{scheme}:// is a transport of the toolkit: name yours otherwise.")
        SCHEMES[scheme] = transport
        _declared.add(scheme)


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
    others: tuple[tuple[str, int], ...] = ()
    """Further hosts and ports of the same broker."""
    weight: int = 1
    """How many calls it gets beside other instances of its service: `?weight=3`."""
    zone: str = ""
    """Where the instance stands: `?zone=west`."""

    @property
    def hosts(self) -> tuple[tuple[str, int], ...]:
        """All hosts with their ports, in the order of the URL."""
        return (self.host, self.port), *self.others

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
    whole = url
    if "@" in url:  # in an error it is for people and logs, too
        url = f"{url.partition('://')[0]}://***@{url.rpartition('@')[2]}"
    if len(split(url)) > 1:
        raise ConfigurationError(f"{url!r} holds several addresses, where there can be one.")
    try:
        parts = urlsplit(whole)
    except ValueError as error:
        raise ConfigurationError(f"{url!r} is no URL: {error}.") from error
    if parts.scheme not in SCHEMES:
        near = difflib.get_close_matches(parts.scheme, SCHEMES, n=1)
        hint = f" Did you mean {near[0]}://?" if near else f" Known: {', '.join(f'{s}://' for s in SCHEMES)}."
        raise ConfigurationError(f"Unknown transport {parts.scheme or url!r} in {url!r}.{hint}")
    transport = SCHEMES[parts.scheme]
    credentials, _, netloc = parts.netloc.rpartition("@")
    try:
        places = [_place(part, transport.port) for part in netloc.split(",")]
    except ValueError as error:
        # Its text may hold a part of a password that should have been percent-encoded.
        reason = "no hosts and ports" if "@" in whole else error
        raise ConfigurationError(f"{url!r}: {reason}.") from None
    if "@" in credentials and "," in credentials:
        raise ConfigurationError(f"{url!r}: user and password stand once, before the first host.")
    if len(places) > 1 and not transport.several:
        example = f"{parts.scheme}://a:3001,{parts.scheme}://b:3001"
        raise ConfigurationError(f"{url!r} holds several addresses: write each with its scheme, as in {example}.")
    if transport.names_port and not all(host and port for host, port in places):
        raise ConfigurationError(f"{url!r} must name a host and a port, as in {parts.scheme}://127.0.0.1:3001.")
    user, _, password = (unquote(part) for part in credentials.partition(":"))
    (host, port), *others = ((host or ("localhost" if transport.broker else ""), port) for host, port in places)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    weight, zone = (options.pop("weight", "1"), options.pop("zone", "")) if transport.instances else ("1", "")
    if not _WEIGHT.fullmatch(weight):
        raise ConfigurationError(f"{url!r}: weight is a whole number from 1 to 100.")
    return Address(parts.scheme, host, port, options, user, password, parts.path, tuple(others), int(weight), zone)


def split(url: str) -> list[str]:
    """Return the URLs of `tcp://a:3001,tcp://b:3001`, the instances of one service."""
    return _NEXT_URL.split(url)


def _place(text: str, default: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    return parts.hostname or "", parts.port or default


def load(address: Address, role: Role) -> Any:
    """Import the class that plays `role` for an address. Raises ConfigurationError where that cannot be."""
    transport = SCHEMES[address.scheme]
    path: str = getattr(transport, role)
    if not path:
        fit = ", ".join(f"{scheme}://" for scheme, transport in SCHEMES.items() if getattr(transport, role))
        raise ConfigurationError(f"{address.scheme}:// cannot {_ROLES[role]}; use {fit}.")
    if role == "server" and address.others and not transport.broker:
        raise ConfigurationError(f"{address}: a server listens at one address, not at {len(address.hosts)}.")
    if role == "server" and (address.weight, address.zone) != (1, ""):
        raise ConfigurationError(f"{address}: weight and zone are for callers, and a server has no use for them.")
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        if not transport.extra:
            raise ConfigurationError(f"{address.scheme}:// names {path!r}: {error}.") from error
        needed = f"pip install 'django-hybrid-microservices[{transport.extra}]'"
        raise ConfigurationError(f"{address.scheme}:// needs {error.name or module}: {needed}") from error


_TLS = frozenset({"certfile", "keyfile", "cafile", "server_name"})


def load_codec(path: str) -> Any:
    """Make the Codec that a dotted path names. Raises ConfigurationError."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"There is no codec {path!r}: {error}.") from error


def read_options(shape: type[Any], address: Address) -> Any:
    """Fill a transport's options Struct from the URL's query. Raises ConfigurationError for a bad one."""
    secure = address.scheme.replace("redis-", "rediss-") if "-" in address.scheme else f"{address.scheme}s"
    if secure in SCHEMES and secure != address.scheme and (told := _TLS & address.options.keys()):
        raise ConfigurationError(
            f"{address} is without TLS, and has no use for {', '.join(sorted(told))}: {secure}://?"
        )
    return fill(shape, address.options, str(address))


def fill(shape: type[Any], options: Mapping[str, Any], where: str) -> Any:
    """Fill a Struct with options by name. Raises ConfigurationError, naming the nearest of an unknown one."""
    known = [field.name for field in msgspec.structs.fields(shape)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise ConfigurationError(f"{where}: unknown option {name!r}; {hint}")
    try:
        return msgspec.convert(options, shape, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where}: {error}") from error
