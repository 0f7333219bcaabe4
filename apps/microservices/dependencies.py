"""Which services an app calls, as its config declares it: `calls = ("payments",)`."""

from __future__ import annotations

from collections.abc import Iterator
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


def circles() -> Iterator[list[str]]:
    """Yield each circle of services that wait for one another, once: ["a", "b", "a"]."""
    graph = {app: calls(app) or () for app in apps.app_configs}
    done: set[str] = set()

    def walk(path: list[str]) -> Iterator[list[str]]:
        for called in graph.get(path[-1], ()):
            if called in path[1:] or called in done:
                continue
            if called == path[0]:
                if len(path) > 1:  # a service may ask itself
                    yield [*path, called]
            else:
                yield from walk([*path, called])

    for app in sorted(graph):
        yield from walk([app])
        done.add(app)


class Declared:
    """A Middleware of clients, for development: a handler calls no service that its app does not declare."""

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def checked(data: Any, context: RpcContext) -> Any:
            caller = current.get()
            if caller is not None and context.service not in (EVENTS, caller.service):
                declared = calls(caller.service)
                if declared is not None and context.service not in declared:
                    raise ConfigurationError(
                        f"{caller.service} calls {context.service}, and does not declare it: "
                        f"add {context.service!r} to `calls` of its AppConfig."
                    )
            return await endpoint(data, context)

        return checked
