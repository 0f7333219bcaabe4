"""Lists what the services of this process can be asked and told."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import msgspec
from django.core.management.base import BaseCommand, CommandError

from ...conf import get_settings
from ...handlers import Door, Handler, registry
from ...transports import parse

COLUMNS = ("service", "pattern", "kind", "retry", "deadline", "doors", "handler")


class Command(BaseCommand):
    """`manage.py patterns`: the catalogue."""

    help = "List the patterns of the services that live in this process."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--service", help="only this service")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        wanted = options["service"]
        if wanted is not None and wanted not in registry.services():
            known = ", ".join(registry.services()) or "none"
            raise CommandError(f"No service {wanted!r} has handlers here; known: {known}.", returncode=2)
        rows = catalogue(wanted)
        if options["json"]:
            self.stdout.write(msgspec.json.encode([dict(zip(COLUMNS, row, strict=True)) for row in rows]).decode())
            return
        lines = [tuple(column.upper() for column in COLUMNS), *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            self.stdout.write("  ".join(cells).rstrip())


def catalogue(wanted: str | None = None) -> list[tuple[str, ...]]:
    """Return a row per door of every handler, in the order of COLUMNS."""
    settings = get_settings()
    rows: list[tuple[str, ...]] = []
    for service in registry.services():
        if wanted not in (None, service) or service not in settings.servers:
            continue
        scheme = parse(settings.servers[service].url).scheme
        for handler in registry.of(service):
            for door in handler.doors:
                if door.kind == "grpc" and _told_with_a_pattern(door, handler.doors):
                    continue
                is_request = door.kind != "event"
                deadline = f"{door.deadline or settings.call_timeout:g} s" if is_request else "-"
                retry = door.retry if is_request else "-"
                rows.append(
                    (service, door.name, door.kind, retry, deadline, _ways(door, handler, scheme), handler.name)
                )
    return rows


def _ways(door: Door, handler: Handler, scheme: str) -> str:
    if door.kind == "event":
        return "bus"
    if door.kind == "grpc":
        return "grpc"
    methods = [f"grpc {other.route}" for other in handler.doors if _same(door, other)]
    # A grpc:// address leads to RPCs alone.
    return ", ".join([*([] if scheme.startswith("grpc") else [scheme]), *methods]) or "-"


def _told_with_a_pattern(method: Door, doors: Sequence[Door]) -> bool:
    return any(door.kind == "request" and _same(door, method) for door in doors)


def _same(door: Door, method: Door) -> bool:
    return method.kind == "grpc" and (method.retry, method.deadline) == (door.retry, door.deadline)
