"""The pages /livez, /readyz and /health, on django-health-check."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from functools import cache, partial
from typing import Any

from django.db import connections
from django.http import HttpRequest, JsonResponse
from django.urls import URLPattern, path
from health_check import HealthCheck
from health_check.exceptions import ServiceUnavailable, ServiceWarning
from health_check.views import HealthCheckView

from .conf import get_settings
from .context import RpcContext
from .db import fresh_connections
from .executor import Executor
from .lifecycle import lifecycle
from .transports.base import Status


@dataclasses.dataclass(repr=False)
class Started(HealthCheck):
    """The process has started and is not stopping."""

    def __repr__(self) -> str:
        return "process"

    async def run(self) -> None:
        if not lifecycle.ready:
            raise ServiceUnavailable(str(lifecycle.state))


@dataclasses.dataclass(repr=False)
class Doors(HealthCheck):
    """The services that live here listen where they should."""

    def __repr__(self) -> str:
        return "doors"

    async def run(self) -> None:
        for microservice in lifecycle.microservices if get_settings().listen else ():
            for server in microservice.servers:
                if server.opens_port and server.status is not Status.CONNECTED:
                    raise ServiceUnavailable(f"{microservice.name} {server.address}: {server.status}")


@dataclasses.dataclass(repr=False)
class ServiceDatabase(HealthCheck):
    """A handler's thread can use the database of its service."""

    alias: str

    def __repr__(self) -> str:
        return f"database {self.alias}"

    async def run(self) -> None:
        context = RpcContext(service=self.alias, pattern="health", transport="local", side="server")
        context.cap_deadline(self.timeout.total_seconds())
        try:
            await _probing().run(partial(_select_one, self.alias), context)
        except Exception as error:
            raise ServiceUnavailable(f"not usable: {type(error).__name__}") from error


class HealthView(HealthCheckView):
    """Answers in JSON what @nestjs/terminus answers: 200, or 503 when a check fails."""

    http_method_names = ["get", "head", "options"]  # noqa: RUF012 - Django declares it so

    async def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> JsonResponse:
        """Run the checks of this page together."""
        checks = list(self.get_checks())
        with self.get_executor() as executor:
            results = await asyncio.gather(*(check.get_result(executor) for check in checks))
        details = {repr(result.check): _detail(result.error) for result in results}
        failed = any(detail["status"] == "down" for detail in details.values())
        body = {
            "status": "error" if failed else "ok",
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "uptime": round(lifecycle.uptime, 3),
            "details": details,
        }
        return JsonResponse(body, status=503 if failed else 200)


def health_urls() -> list[URLPattern]:
    """Return the routes of the health pages for the services of this process."""
    # A broker or another service that is down never makes a process unready, or one outage
    # would empty the whole fleet.
    databases = [(ServiceDatabase, {"alias": alias}) for alias in connections if _is_used(alias)]
    checks: list[Any] = [Started, Doors, *databases]
    return [
        path("livez", HealthView.as_view(checks=[]), name="livez"),
        path("readyz", HealthView.as_view(checks=checks), name="readyz"),
        path("health", HealthView.as_view(checks=checks), name="health"),
    ]


def _detail(error: Exception | None) -> dict[str, str]:
    if error is None:
        return {"status": "up"}
    return {"status": "up" if isinstance(error, ServiceWarning) else "down", "message": str(error)}


def _is_used(alias: str) -> bool:
    return not connections.settings[alias]["ENGINE"].endswith("dummy")


@cache
def _probing() -> Executor:
    # A thread of its own: handlers that keep the pool busy must not make the process unready.
    return Executor(1, limit=10, units_of_work=[fresh_connections])


def _select_one(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT 1")
