"""Which services an app calls, as its config declares it: `calls = ("payments",)`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from django.apps import apps

from .context import RpcContext, current
from .exceptions import ConfigurationError
from .middleware import Endpoint

EVENTS = "events"


def calls(app: str) -> tuple[str, ...] | None:
    """Return the services that an app says it calls; None where it says nothing of it."""
    config = apps.app_configs.get(app)
    declared = getattr(config, "calls", None)
    return None if declared is None else tuple(declared)


def require(app: str, services: Iterable[str]) -> None:
    """Raise ConfigurationError where an app calls a service that it does not declare; it may call itself."""
    declared = calls(app)
    for service in services:
        if declared is not None and service not in (EVENTS, app, *declared):
            raise ConfigurationError(
                f"{app} calls {service}, and does not declare it: add {service!r} to `calls` of its AppConfig."
            )


def circles() -> list[list[str]]:
    """Return the circles of services that wait for one another, each once: ["a", "b", "a"]."""
    graph = {app: calls(app) or () for app in sorted(apps.app_configs)}
    found: dict[frozenset[str], list[str]] = {}
    for app, called in graph.items():
        for first in called:
            # The shortest through each call: there may be more circles than anybody would read.
            back = _way(graph, first, app) if first != app else None
            if back is not None:
                found.setdefault(frozenset(back), [app, *back])
    return list(found.values())


def _way(graph: Mapping[str, Iterable[str]], start: str, end: str) -> list[str] | None:
    before = {start: ""}
    waiting = deque([start])
    while waiting:
        app = waiting.popleft()
        if app == end:
            way = [app]
            while before[way[0]]:
                way.insert(0, before[way[0]])
            return way
        for called in graph.get(app, ()):
            if called not in before:
                before[called] = app
                waiting.append(called)
    return None


class Declared:
    """A Middleware of clients, for development: a handler calls no service that its app does not declare."""

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def checked(data: Any, context: RpcContext) -> Any:
            caller = current.get()
            if caller is not None:
                require(caller.service, [context.service])
            return await endpoint(data, context)

        return checked
