"""The MICROSERVICES setting and its defaults; the only reader of settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from django.conf import settings as django_settings
from django.utils.module_loading import import_string

from . import transports
from .discovery import choosers
from .exceptions import ConfigurationError
from .handlers import Retry, registry
from .resilience.faults import Fault
from .resilience.policies import Plan
from .transports import Address, Seconds, Transport

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
PRIVATE_NETWORKS = ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a service is, and the port on which it tells how it is."""

    url: str
    health: Port | None = None
    grpc: str = ""
    """Where its gRPC methods are, if not at `url` itself."""
    options: dict[str, Any] = {}
    """What its transport is told at `url`, beside the URL's own query."""
    rpcs: dict[str, str] = {}
    """The RPC of each pattern that is called by gRPC: `{"get_user": "UsersService/FindOne"}`."""
    balance: str = "two-choices"
    """How calls are dealt out where `url` names several instances: a name of `discovery.choosers.CHOOSERS`."""
    policies: dict[str, Any] = {}
    """What stands around calls to it, where not as POLICIES says: see docs/resilience.md."""
    patterns: dict[str, dict[str, Any]] = {}
    """The same for single patterns, by name: `{"get_user": {"retry": "safe", "cache": 5}}`."""
    allow: dict[str, list[str]] = {}
    """Who may call a pattern of SERVERS, where not everybody may: networks, `cert:NAME`s, or `broker`."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="upper"):
    """All that can be set in MICROSERVICES; times are in seconds."""

    name: str = "django"
    """What this process calls itself towards others."""
    clients: dict[str, Service] = {}
    """The services that can be called. One that lives here is called without a network."""
    servers: dict[str, Service] = {}
    """The services that live here, and the doors that they open."""
    listen: bool = True
    """Whether the services that live here open their doors."""
    http_port: Port = 3000
    data_dir: str = "data"
    """Where the bus that `runfleet` brings along keeps its data."""
    events_url: str = "memory://"
    events_options: dict[str, Any] = {}
    """What the bus is told, beside the URL's own query."""
    transports: dict[str, Transport] = {}
    """Transports of the project's own, by URL scheme: dotted paths of their classes."""
    payload_kinds: list[str] = msgspec.field(default_factory=lambda: ["microservices.payloads.SerializerPayload"])
    """What payloads may be beside what msgspec knows: dotted paths of `codec.PayloadKind` classes."""
    call_timeout: Seconds = 5.0
    policies: dict[str, Any] = {}
    """What stands around all calls: see docs/resilience.md."""
    faults: dict[str, dict[str, Fault]] = {}
    """Faults on purpose, by service (or "events") and pattern; with DEBUG alone: see docs/resilience.md."""
    drain_timeout: Seconds = 30.0
    drain_pause: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How long a process that stops goes on taking calls, for routers to learn of it; part of DRAIN_TIMEOUT."""
    watchdog: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """After how many seconds without a turn of its event loop a process is ended; 0 for never."""
    server_limit: Annotated[int, msgspec.Meta(ge=0)] = 200
    """The most requests that a service works on at a time; how many it takes on, it learns. 0 for any number."""
    http_limit: Annotated[int, msgspec.Meta(ge=0)] = 200
    """How many HTTP requests a process works on at a time, as many more waiting; 0 for any number."""
    body_limit: Annotated[int, msgspec.Meta(ge=0)] = 1024 * 1024
    """How many bytes the body of a request may have; 0 for any number, read by whoever wants it."""
    connection_limit: Annotated[int, msgspec.Meta(ge=0)] = 2048
    """How many HTTP connections a process has at a time, WebSockets among them; 0 for any number."""
    socket_limit: Annotated[int, msgspec.Meta(ge=0)] = 1000
    """How many WebSockets a process has at a time; 0 for any number."""
    insecure_doors: bool = False
    """Whether others may call this process without TLS, with DEBUG off."""
    insecure_brokers: bool = False
    """Whether brokers elsewhere may be used without a password, with DEBUG off."""
    heartbeat: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    """How often this process tells that it is up; 0 for never."""
    instance: str = ""
    """What this process is called among those of its service; without it host and pid."""
    zone: str = ""
    advertise_host: str = ""
    """Where others find this process, in place of 0.0.0.0 or ::; without it the name of the host."""
    probe_networks: list[str] = msgspec.field(default_factory=lambda: list(PRIVATE_NETWORKS))
    """Where the registry may connect to see whether an instance answers; not to a cloud's metadata (link-local)."""
    proto_path: list[str] = []
    """The .proto files of all services, or folders of them: NestJS's `protoPath`."""
    grpc_port: Port = 5000
    """Where a process that only serves gRPC serves all services at once."""
    threads: Annotated[int, msgspec.Meta(ge=1)] = 16
    """How many `def` handlers run at a time."""
    tracebacks: bool = False
    """Whether a caller is told where a handler failed unexpectedly; for development."""
    server_middleware: list[str] = []
    client_middleware: list[str] = []
    units_of_work: list[str] = msgspec.field(default_factory=lambda: ["microservices.db.fresh_connections"])
    """Context managers around each `def` handler, inside its thread."""


@cache
def get_settings() -> Settings:
    """Return the MICROSERVICES setting, checked. Raises ConfigurationError, naming the nearest key."""
    given = dict(getattr(django_settings, "MICROSERVICES", {}))
    known = [field.encode_name for field in msgspec.structs.fields(Settings)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise ConfigurationError(f"MICROSERVICES has no {key!r}: {hint}")
    try:
        found = msgspec.convert(given, Settings)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"MICROSERVICES: {error}") from error
    transports.declare(found.transports)
    for name, place in found.clients.items():
        _plan(found, name)
        choosers.find(place.balance)
    for name in found.faults:
        if name not in (*found.clients, "events"):
            places = ", ".join((*found.clients, "events"))
            raise ConfigurationError(f"MICROSERVICES['FAULTS'] has no use for {name!r}: known are {places}.")
    return found


def debug() -> bool:
    """Return whether this is development."""
    return bool(django_settings.DEBUG)


def plan(service: str) -> Plan:
    """Return the policies around the calls to a service. Raises ConfigurationError."""
    return _plan(get_settings(), service)


def _plan(settings: Settings, service: str) -> Plan:
    place = settings.clients[service]
    declared: dict[str, Retry] = {}

    def kind(route: str) -> Retry | None:
        # Of a service that lives here; once all handlers are known.
        if not declared:
            doors = (door for handler in registry.of(service) for door in handler.doors)
            declared.update((door.route, door.retry) for door in doors if door.kind != "event")
        return declared.get(route)

    return Plan(service, {**settings.policies, **place.policies}, place.patterns, kind)


def address(url: str, options: Mapping[str, Any] = NO_OPTIONS, *, rpcs: Mapping[str, str] = NO_OPTIONS) -> Address:
    """Return the address of a URL, with what its transport is told beside it. Raises ConfigurationError."""
    parsed = transports.parse(url)
    told = dict(options)
    if parsed.scheme in ("grpc", "grpcs"):
        told = {**proto_options(), "rpcs": rpcs, **told}
    return parsed._replace(options={**told, **parsed.options})


def addresses(url: str, options: Mapping[str, Any] = NO_OPTIONS, **told: Any) -> list[Address]:
    """Return the addresses of a service's instances: `tcp://a:3001,tcp://b:3001`. Raises ConfigurationError."""
    found = [address(each, options, **told) for each in transports.split(url)]
    if len(found) == 1:
        return found
    if len({each.scheme for each in found}) > 1:
        raise ConfigurationError(f"{', '.join(map(str, found))}: the instances of a service have one scheme.")
    if transports.SCHEMES[found[0].scheme].broker:
        raise ConfigurationError(f"{found[0].scheme}:// is a broker's, which deals calls out itself: give one URL.")
    return found


def brokers() -> list[Address]:
    """Return the addresses of all brokers that this process may use. Raises ConfigurationError."""
    settings = get_settings()
    places = (*settings.clients.values(), *settings.servers.values())
    found = [events_address(), *(each for place in places for each in addresses(place.url, place.options))]
    return [address for address in found if transports.SCHEMES[address.scheme].broker]


def events_address() -> Address:
    """Return the address of the event bus. Raises ConfigurationError."""
    settings = get_settings()
    return address(settings.events_url, settings.events_options)


def proto_options() -> dict[str, Any]:
    """Return where the .proto files are, and where what is made of them is kept."""
    settings = get_settings()
    return {"proto_path": settings.proto_path, "cache": str(Path(settings.data_dir, "protos"))}


@cache
def load(path: str) -> Any:
    """Import what a dotted path names, once; a class is instantiated without arguments."""
    try:
        found = import_string(path)
    except ImportError as error:
        raise ConfigurationError(f"MICROSERVICES names {path!r}: {error}") from error
    return found() if isinstance(found, type) else found
