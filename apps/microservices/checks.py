"""System checks: mistakes that are found before the first message."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.apps import AppConfig, apps
from django.core import checks

from . import transports
from .conf import Settings, get_settings
from .exceptions import ConfigurationError
from .handlers import registry


@checks.register("microservices")
def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """E004: MICROSERVICES can be read. E006: every URL can. E007: no port is used twice."""
    try:
        settings = get_settings()
    except ConfigurationError as error:
        return [checks.Error(str(error), id="microservices.E004")]
    return [*_bad_urls(settings), *_ports_used_twice(settings)]


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
    named: list[tuple[str, str, transports.Role]] = [("EVENTS_URL", settings.events_url, "bus")]
    named += [(f"CLIENTS[{name!r}]", service.url, "client") for name, service in settings.clients.items()]
    named += [(f"SERVERS[{name!r}]", service.url, "server") for name, service in settings.servers.items()]
    for where, url, role in named:
        try:
            transports.load(transports.parse(url), role)
        except ConfigurationError as error:
            yield checks.Error(f"MICROSERVICES {where}: {error}", id="microservices.E006")


def _ports_used_twice(settings: Settings) -> Iterator[checks.CheckMessage]:
    owners: dict[tuple[str, int], str] = {("127.0.0.1", settings.http_port): "HTTP_PORT"}
    for name, service in {**settings.clients, **settings.servers}.items():
        for address in _addresses(service.url):
            door = 0 if transports.SCHEMES[address.scheme].broker else address.port
            for port in filter(None, (door, service.health)):
                # Services on hosts of their own, as containers are, may well use the same port.
                other = owners.setdefault((address.host, port), name)
                if other != name:
                    text = f"{other} and {name} both use {address.host}:{port}."
                    yield checks.Error(text, id="microservices.E007")
            if door and door == service.health:
                text = f"{name} uses {address.host}:{address.port} twice."
                yield checks.Error(text, id="microservices.E007")


def _addresses(url: str) -> Iterator[Any]:
    try:
        yield transports.parse(url)
    except ConfigurationError:
        return  # E006 tells


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
