"""What this process has to tell of itself: one report for each service that lives here."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from django.apps import apps

from .conf import Settings, get_settings
from .discovery.registry import PatternReport, Report
from .microservice import Microservice
from .transports.base import Status

_ANYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - to be replaced by where others find us


class Reporter:
    """Builds the reports of a process whose pages are at `pages` ("http" or "health" to a URL).

    `doors` holds, by service that is served here, the URLs whose doors are open.
    """

    def __init__(self, pages: Mapping[str, str], doors: Mapping[str, Sequence[str]], started_at: float) -> None:
        self._settings = get_settings()
        self._pages = {name: _seen_from_outside(url, self._settings) for name, url in pages.items()}
        self._doors = doors
        self._started_at = started_at
        self._host = socket.gethostname()
        self._instance = self._settings.instance or f"{self._host}-{os.getpid()}"

    def reports(self, microservices: Sequence[Microservice], *, draining: bool) -> list[Report]:
        """Return how each service of the map is, and the process itself where it has another name."""
        settings = self._settings
        found = [
            self._report(
                microservice.name,
                [microservice],
                draining,
                self._page("health") | dict(self._addresses(microservice)),
                _patterns(microservice),
            )
            for microservice in microservices
            if microservice.name in settings.servers and microservice.name in self._doors
        ]
        if settings.name not in settings.servers:
            kind = "http" if "http" in self._pages else "health"
            found.append(self._report(settings.name, microservices, draining, self._page(kind), ()))
        return found

    def _report(
        self,
        name: str,
        microservices: Sequence[Microservice],
        draining: bool,
        addresses: dict[str, str],
        patterns: tuple[PatternReport, ...],
    ) -> Report:
        reason = "" if draining else _what_is_missing(microservices)
        return Report(
            service=name,
            instance=self._instance,
            state="draining" if draining else "degraded" if reason else "up",
            reason=reason,
            version=_version(name),
            host=self._host,
            pid=os.getpid(),
            zone=self._settings.zone,
            addresses=addresses,
            patterns=patterns,
            started_at=self._started_at,
        )

    def _page(self, kind: str) -> dict[str, str]:
        # The pages of a process that serves HTTP stand on its HTTP port.
        url = self._pages.get(kind) or next(iter(self._pages.values()), "")
        return {kind: url} if url else {}

    def _addresses(self, microservice: Microservice) -> Iterator[tuple[str, str]]:
        for url in self._doors.get(microservice.name, ()):
            yield url.partition("://")[0], _seen_from_outside(url, self._settings)


def _seen_from_outside(url: str, settings: Settings) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in _ANYWHERE:
        host = settings.advertise_host or socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{parts.port}" if parts.port else f"{parts.scheme}://{shown}"


def _what_is_missing(microservices: Sequence[Microservice]) -> str:
    for microservice in microservices:
        for server in microservice.servers:
            if not server.opens_port and server.status is not Status.CONNECTED:
                return f"{server.address} is {server.status}"
    return ""


def _version(name: str) -> str:
    config = apps.app_configs.get(name)
    return str(getattr(config, "version", ""))


def _patterns(microservice: Microservice) -> tuple[PatternReport, ...]:
    doors = {(door.name, door.kind): door for handler in microservice.dispatcher.handlers for door in handler.doors}
    return tuple(PatternReport(name, kind, door.retry, door.deadline) for (name, kind), door in sorted(doors.items()))
