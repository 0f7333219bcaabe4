"""The pages /livez, /readyz, /startupz and /health, on django-health-check."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import logging
import random
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from django.db import connections
from django.db.migrations.executor import MigrationExecutor
from django.http import HttpRequest, JsonResponse
from django.urls import URLPattern, path
from health_check import HealthCheck
from health_check.exceptions import ServiceUnavailable, ServiceWarning
from health_check.views import HealthCheckView

from .client import clients
from .conf import get_settings
from .context import RpcContext
from .db import fresh_connections
from .exceptions import ConfigurationError
from .executor import Executor
from .lifecycle import lifecycle
from .microservice import Microservice
from .transports.base import Status

logger = logging.getLogger("microservices")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_SHED_FOR = 10.0


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
        for microservice in lifecycle.microservices:
            for server in microservice.servers:
                if server.opens_port and server.status is not Status.CONNECTED:
                    raise ServiceUnavailable(f"{microservice.name} {server.address}: {server.status}")


@dataclasses.dataclass(repr=False)
class Shedding(HealthCheck):
    """No service that lives here has refused more than half of its calls for ten seconds."""

    def __repr__(self) -> str:
        return "load"

    async def run(self) -> None:
        now = time.monotonic()
        for microservice in lifecycle.microservices:
            limiter = microservice.limiter
            if limiter is not None and (seconds := limiter.shedding(now)) >= _SHED_FOR:
                raise ServiceUnavailable(f"{microservice.name} has refused most calls for {seconds:.0f} s")


@dataclasses.dataclass(repr=False)
class HasStarted(HealthCheck):
    """The process has once been ready."""

    def __repr__(self) -> str:
        return "start"

    async def run(self) -> None:
        if not lifecycle.started:
            raise ServiceUnavailable(str(lifecycle.state))


@dataclasses.dataclass(repr=False)
class Brokers(HealthCheck):
    """The brokers are there; one that is away is told, and makes nobody unready."""

    def __repr__(self) -> str:
        return "brokers"

    async def run(self) -> None:
        away = [
            f"{microservice.name} {server.address}: {server.status}"
            for microservice in lifecycle.microservices
            for server in microservice.servers
            if not server.opens_port and server.status is not Status.CONNECTED
        ]
        if away:
            raise ServiceWarning("; ".join(away))


@dataclasses.dataclass(repr=False)
class Instances(HealthCheck):
    """The instances of other services answer; those that are left out are told, and make nobody unready."""

    def __repr__(self) -> str:
        return "instances"

    async def run(self) -> None:
        balancers = [client.balancer for client in clients.used.values()]
        out = [f"{each.target} {instance.url}" for each in balancers if each for instance in each.out]
        if out:
            raise ServiceWarning(f"left out: {', '.join(out)}")


@dataclasses.dataclass(repr=False)
class OnPurpose(HealthCheck):
    """Faults that somebody has asked for are told, and make nobody unready."""

    def __repr__(self) -> str:
        return "faults"

    async def run(self) -> None:
        if faults := clients.faults:
            raise ServiceWarning(f"on purpose: {', '.join(faults)}")


@dataclasses.dataclass(repr=False)
class Migrated(HealthCheck):
    """The tables of a service are those that its code knows."""

    alias: str

    def __repr__(self) -> str:
        return f"migrations {self.alias}"

    async def run(self) -> None:
        await _ask_database(self.alias, partial(_check_migrations, self.alias), self.timeout.total_seconds())


@dataclasses.dataclass(repr=False)
class ServiceDatabase(HealthCheck):
    """A handler's thread can use the database of its service."""

    alias: str

    def __repr__(self) -> str:
        return f"database {self.alias}"

    async def run(self) -> None:
        await _ask_database(self.alias, partial(_select_one, self.alias), self.timeout.total_seconds())


class HealthView(HealthCheckView):
    """Answers in JSON what @nestjs/terminus answers: 200, or 503 when a check fails."""

    http_method_names = ["get", "head", "options"]  # noqa: RUF012 - Django declares it so
    tells_services = False

    async def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> JsonResponse:
        """Run the checks of this page together."""
        checks = list(self.get_checks())
        with self.get_executor() as executor:
            results = await asyncio.gather(*(check.get_result(executor) for check in checks))
        details = {repr(result.check): _detail(result.error) for result in results}
        failed = any(detail["status"] == "down" for detail in details.values())
        body: dict[str, Any] = {
            "status": "error" if failed else "ok",
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "uptime": round(lifecycle.uptime, 3),
            "details": details,
        }
        if self.tells_services:
            body["services"] = [_service(microservice) for microservice in lifecycle.microservices]
        return JsonResponse(body, status=503 if failed else 200)


async def until_databases_serve() -> None:
    """Wait until all databases of this process can be used. Raises ConfigurationError where one lacks migrations.

    One that is away may come back, and is asked again after longer and longer pauses; a schema that is behind
    is somebody's mistake, and nothing is migrated here.
    """
    for alias in filter(_is_used, connections):
        pause, told = _FIRST_PAUSE, ""
        while True:
            try:
                await ServiceDatabase(alias=alias).run()
                break
            except ServiceUnavailable as error:
                if str(error) != told:
                    told = str(error)
                    logger.warning("waiting for the database %s: %s", alias, error)
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - only to spread them
            pause = min(pause * 2, _LONGEST_PAUSE)
        try:
            await Migrated(alias=alias).run()
        except ServiceUnavailable as error:
            raise ConfigurationError(f"Database {alias}: {error}. Run: manage.py migrate --database {alias}") from error


def health_urls() -> list[URLPattern]:
    """Return the routes of the health pages for the services of this process."""
    # A broker or another service that is down never makes a process unready, or one outage
    # would empty the whole fleet.
    databases = [(ServiceDatabase, {"alias": alias}) for alias in connections if _is_used(alias)]
    checks: list[Any] = [Started, Doors, Shedding, *databases]
    migrated = [(Migrated, {"alias": alias}) for alias in connections if _is_used(alias)]
    faults = [OnPurpose] if get_settings().faults else []
    whole = HealthView.as_view(checks=[*checks, Brokers, Instances, *faults], tells_services=True)
    return [
        path("livez", HealthView.as_view(checks=[]), name="livez"),
        path("readyz", HealthView.as_view(checks=checks), name="readyz"),
        path("startupz", HealthView.as_view(checks=[HasStarted, *migrated]), name="startupz"),
        path("health", whole, name="health"),
    ]


def _detail(error: Exception | None) -> dict[str, str]:
    if error is None:
        return {"status": "up"}
    return {"status": "up" if isinstance(error, ServiceWarning) else "down", "message": str(error)}


def _service(microservice: Microservice) -> dict[str, Any]:
    doors = (*microservice.servers, *microservice.shared)
    servers = {str(server.address): str(server.status) for server in doors}
    return {"name": microservice.name, "transports": servers}


async def _ask_database(alias: str, ask: Callable[[], None], seconds: float) -> None:
    context = RpcContext(service=alias, pattern="health", transport="local", side="server")
    context.cap_deadline(seconds)
    try:
        await _probing().run(ask, context)
    except ServiceUnavailable:
        raise
    except Exception as error:
        raise ServiceUnavailable(f"not usable: {type(error).__name__}") from error


def _check_migrations(alias: str) -> None:
    if alias in _migrated:
        return
    executor = MigrationExecutor(connections[alias])
    if plan := executor.migration_plan(executor.loader.graph.leaf_nodes()):
        raise ServiceUnavailable(f"{len(plan)} migrations are not applied")
    _migrated.add(alias)


def _is_used(alias: str) -> bool:
    return not connections.settings[alias]["ENGINE"].endswith("dummy")


@cache
def _probing() -> Executor:
    # A thread of its own: handlers that keep the pool busy must not make the process unready.
    return Executor(1, limit=10, units_of_work=[fresh_connections])


# A schema that was right at the start stays so: a probe each second must not read all migrations again.
_migrated: set[str] = set()


def _select_one(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT 1")
