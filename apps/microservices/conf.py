"""The MICROSERVICES setting and its defaults; the only reader of settings."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Annotated, Any

import msgspec
from django.conf import settings as django_settings
from django.utils.module_loading import import_string

from .exceptions import ConfigurationError

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a service is, and the port on which it tells how it is."""

    url: str
    health: Port | None = None


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
    call_timeout: Seconds = 5.0
    drain_timeout: Seconds = 30.0
    threads: Annotated[int, msgspec.Meta(ge=1)] = 16
    """How many `def` handlers run at a time."""
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
        return msgspec.convert(given, Settings)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"MICROSERVICES: {error}") from error


@cache
def load(path: str) -> Any:
    """Import what a dotted path names, once; a class is instantiated without arguments."""
    try:
        found = import_string(path)
    except ImportError as error:
        raise ConfigurationError(f"MICROSERVICES names {path!r}: {error}") from error
    return found() if isinstance(found, type) else found
