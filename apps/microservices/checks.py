"""System checks: mistakes that are found before the first message."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from django.apps import AppConfig, apps
from django.core import checks

from . import conf, dependencies, doors, stubs, transports
from .conf import Service, Settings, get_settings
from .exceptions import ConfigurationError
from .handlers import registry
from .packets import pattern_name
from .transports import Address


@checks.register("microservices")
def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """E004: MICROSERVICES can be read. E006: every URL can. E007: no port is used twice.

    E010: no door is open to other hosts without TLS. E012: no broker elsewhere is used without a password. E014: no
    faults are on purpose; these with DEBUG off. E013: rules about who may call are about patterns, and can be read.
    """
    try:
        settings = get_settings()
    except ConfigurationError as error:
        return [checks.Error(str(error), id="microservices.E004")]
    bad = [*_bad_urls(settings), *_ports_used_twice(settings)]
    return bad or [*_for_development(settings), *_bad_rules(settings)]


@checks.register("microservices")
def check_relations(app_configs: Any = None, **_: Any) -> list[checks.CheckMessage]:
    """E001: no relation between models of two services."""
    services = set(_services())
    return [
        checks.Error(
            f"{model._meta.label}.{field.name} relates to {related._meta.label} of another service.",
            hint="Keep the other's id in a plain field, and ask that service for the rest.",
            obj=field,
            id="microservices.E001",
        )
        for model in apps.get_models()
        for field in model._meta.get_fields()
        if (related := getattr(field, "related_model", None)) is not None
        and not isinstance(related, str)
        and not getattr(field, "auto_created", False)
        and model._meta.app_label != related._meta.app_label
        and {model._meta.app_label, related._meta.app_label} & services
    ]


@checks.register("microservices")
def check_imports(**_: Any) -> list[checks.CheckMessage]:
    """E002: no service imports another's code."""
    services = _services()
    return [
        checks.Error(
            f"{path.name}:{line} of {name} imports {imported}, which is another service.",
            hint=f"Ask it by message: clients[{imported.partition('.')[0]!r}].",
            id="microservices.E002",
        )
        for name, app in services.items()
        for path in sorted(Path(app.path).rglob("*.py"))
        for line, imported in _imports(path)
        if imported.partition(".")[0] in services.keys() - {name}
    ]


@checks.register("microservices")
def check_patterns(**_: Any) -> list[checks.CheckMessage]:
    """E003: a pattern is declared once per service."""
    errors: list[checks.CheckMessage] = []
    for service in registry.services():
        owners: dict[str, str] = {}
        for handler in registry.of(service):
            for door in handler.doors:
                if door.kind != "request":
                    continue
                other = owners.setdefault(door.route, handler.name)
                if other != handler.name:
                    text = f"{other} and {handler.name} both answer {door.route}."
                    errors.append(checks.Error(text, id="microservices.E003"))
    return errors


@checks.register("microservices")
def check_dependencies(**_: Any) -> list[checks.CheckMessage]:
    """W004: services do not wait for one another in a circle. E011: what an app calls is on the map."""
    try:
        known = get_settings().clients
    except ConfigurationError:
        return []  # E004 tells
    found: list[checks.CheckMessage] = [
        checks.Warning(
            f"{' calls '.join(circle)}: each may wait for the others until none has time left.",
            hint="Let one of them hear an event in place of the call.",
            id="microservices.W004",
        )
        for circle in dependencies.circles()
    ]
    for app in apps.app_configs:
        for called in dependencies.calls(app) or ():
            if called not in known:
                text = f"{app} declares that it calls {called!r}, which MICROSERVICES['CLIENTS'] does not name."
                found.append(checks.Error(text, id="microservices.E011"))
    return found


@checks.register("microservices")
def check_retries(**_: Any) -> list[checks.CheckMessage]:
    """E005: nothing is repeated that must not be. W006: what is known by a key has one."""
    try:
        settings = get_settings()
    except ConfigurationError:
        return []  # E004 tells
    found: list[checks.CheckMessage] = []
    for service in registry.services():
        place = settings.clients.get(service)
        for_all = {**settings.policies, **(place.policies if place else {})}
        for handler in registry.of(service):
            for door in handler.doors:
                if door.kind == "event":
                    continue
                pattern = pattern_name(door.route)
                policies = place.patterns.get(pattern, {}) if place else {}
                told = {**for_all, **policies}.get("retry") or door.retry
                if _BOLDNESS[told] > _BOLDNESS[door.retry]:
                    text = f"MICROSERVICES calls {service} {pattern} {told!r}; {handler.name} says {door.retry!r}."
                    hint = "It must not be repeated more freely than its handler allows."
                    found.append(checks.Error(text, hint=hint, id="microservices.E005"))
                elif door.retry == "never" and policies.get("retries"):
                    text = f"MICROSERVICES asks for retries of {service} {pattern}; {handler.name} forbids them."
                    found.append(checks.Error(text, id="microservices.E005"))
                if door.retry == "keyed" and "idempotency_key" not in _fields(handler.payload):
                    text = f"{handler.name} knows a repetition by its key, and its payload shows no `idempotency_key`."
                    found.append(checks.Warning(text, hint="Without one nothing is repeated.", id="microservices.W006"))
    return found


@checks.register("microservices")
def check_rpcs(**_: Any) -> list[checks.CheckMessage]:
    """E009: a gRPC method, or an RPC that patterns are mapped to, is in a .proto file. E003: it is declared once."""
    try:
        settings = get_settings()
    except ConfigurationError:
        return []  # E004 tells
    doors = [
        (h, door) for name in settings.servers for h in registry.of(name) for door in h.doors if door.kind == "grpc"
    ]
    called = {name: place for name, place in settings.clients.items() if place.url.startswith("grpc")}
    mapped = [(name, path) for name, place in called.items() for path in place.rpcs.values()]
    if not doors and not mapped:
        return []
    try:
        from .transports.grpc import check

        files = stubs.proto_files()
    except (ConfigurationError, ImportError) as error:
        return [checks.Error(str(error), id="microservices.E009")]
    errors: list[checks.CheckMessage] = []
    owners: dict[str, str] = {}
    for handler, door in doors:
        try:
            method = files.method(door.route)
            check(handler, method)
        except ConfigurationError as error:
            errors.append(checks.Error(f"{handler.name}: {error}", id="microservices.E009"))
            continue
        # With and without its package, a service has two names.
        other = owners.setdefault(method.path, handler.name)
        if other != handler.name:
            text = f"{other} and {handler.name} both answer {method.path}."
            errors.append(checks.Error(text, id="microservices.E003"))
    for name, path in mapped:
        try:
            files.method(path)
        except ConfigurationError as error:
            errors.append(checks.Error(f"MICROSERVICES CLIENTS[{name!r}] rpcs: {error}", id="microservices.E009"))
    return errors


@checks.register("microservices")
def check_connections(**_: Any) -> list[checks.CheckMessage]:
    """W008: the databases of services keep their connections."""
    from django.conf import settings

    return [
        checks.Warning(
            f"DATABASES[{alias!r}] has CONN_MAX_AGE = 0: every message opens a connection.",
            hint="Set CONN_MAX_AGE to some minutes.",
            id="microservices.W008",
        )
        for alias in _services()
        if alias in settings.DATABASES and settings.DATABASES[alias].get("CONN_MAX_AGE", 0) == 0
    ]


def _services() -> dict[str, AppConfig]:
    try:
        known = get_settings().servers
    except ConfigurationError:
        return {}
    return {app.label: app for app in apps.get_app_configs() if app.label in known}


def _bad_urls(settings: Settings) -> Iterator[checks.CheckMessage]:
    named: list[tuple[str, str, Mapping[str, Any], transports.Role]] = [
        ("EVENTS_URL", settings.events_url, settings.events_options, "bus")
    ]
    of_each: list[tuple[str, dict[str, Service], transports.Role]] = [
        ("CLIENTS", settings.clients, "client"),
        ("SERVERS", settings.servers, "server"),
    ]
    for key, services, role in of_each:
        for name, place in services.items():
            named.append((f"{key}[{name!r}]", place.url, place.options, role))
            if place.grpc:
                named.append((f"{key}[{name!r}] grpc", place.grpc, conf.NO_OPTIONS, role))
    for where, url, told, role in named:
        try:
            for address in conf.addresses(url, told) if role == "client" else [conf.address(url, told)]:
                options = transports.read_options(transports.load(address, role).Options, address)
                transport = transports.SCHEMES[address.scheme]
                serves = role == "server" and not transport.broker
                if transport.tls:
                    _ = options.server_context() if serves else options.client_context()
        except ConfigurationError as error:
            yield checks.Error(f"MICROSERVICES {where}: {error}", id="microservices.E006")


def _fields(payload: Any) -> Iterable[str]:
    # Of a Struct, a dataclass, a serializer, a TypedDict.
    names = ("__struct_fields__", "__dataclass_fields__", "_declared_fields", "__annotations__")
    return next((found for name in names if (found := getattr(payload, name, None))), ())


_BOLDNESS = {"never": 0, "keyed": 1, "safe": 2}


def _for_development(settings: Settings) -> Iterator[checks.CheckMessage]:
    if conf.debug():
        return
    if settings.faults:
        yield checks.Error("MICROSERVICES['FAULTS'] is for development: DEBUG is off.", id="microservices.E014")
    served = (url for place in settings.servers.values() for url in (place.url, place.grpc) if url)
    if settings.listen and not settings.insecure_doors:
        for text in doors.open_to_all(map(transports.parse, served)):
            yield checks.Error(text, id="microservices.E010")
    if not settings.insecure_brokers:
        for text in doors.without_password(conf.brokers()):
            yield checks.Error(text, id="microservices.E012")


def _bad_rules(settings: Settings) -> Iterator[checks.CheckMessage]:
    for service, place in settings.servers.items():
        for text in doors.mistakes(place.allow, registry.of(service)):
            yield checks.Error(f"MICROSERVICES SERVERS[{service!r}] {text}", id="microservices.E013")


def _ports_used_twice(settings: Settings) -> Iterator[checks.CheckMessage]:
    owners: dict[tuple[str, int], str] = {("127.0.0.1", settings.http_port): "HTTP_PORT"}
    for name, service in {**settings.clients, **settings.servers}.items():
        own: set[tuple[str, int]] = set()
        for door in _ports(service):
            # Services on hosts of their own, as containers are, may well use the same port.
            other = owners.setdefault(door, name)
            if other != name:
                text = f"{other} and {name} both use {door[0]}:{door[1]}."
                yield checks.Error(text, id="microservices.E007")
            elif door in own:
                text = f"{name} uses {door[0]}:{door[1]} twice."
                yield checks.Error(text, id="microservices.E007")
            own.add(door)


def _ports(service: Service) -> Iterator[tuple[str, int]]:
    # The address may itself be that of the gRPC methods: one door, told twice.
    for address in {
        str(address): address for url in (service.url, service.grpc) for address in _addresses(url)
    }.values():
        if not transports.SCHEMES[address.scheme].broker and address.port:
            yield address.host, address.port
    if service.health:
        yield next((address.host for address in _addresses(service.url)), ""), service.health


def _addresses(url: str) -> Iterator[Address]:
    try:
        for each in transports.split(url) if url else ():
            yield transports.parse(each)
    except ConfigurationError:
        return  # E006 tells


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
