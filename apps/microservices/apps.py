"""Finds the handlers of all installed apps when Django is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import ModuleType

from django.apps import AppConfig, apps
from django.core.signals import setting_changed
from django.utils.module_loading import module_has_submodule

from .client import clients
from .codec import register
from .conf import get_settings, load
from .consumers import consumer_handlers
from .exceptions import ConfigurationError
from .handlers import Handler, handlers_in, registry
from .microservice import get_executor, get_microservice


class MicroservicesConfig(AppConfig):
    """The toolkit as a Django app."""

    name = "microservices"
    verbose_name = "Microservices"

    def ready(self) -> None:
        """Collect the handlers of all apps, and register the system checks."""
        from . import checks  # noqa: F401 - registers the system checks

        _collect()
        setting_changed.connect(_forget)


def _collect() -> None:
    # Django's tests may install other apps: then `ready` is called again.
    registry.reset()
    with suppress(ConfigurationError):  # E004 tells
        for path in get_settings().payload_kinds:
            register(load(path))
    for app in apps.get_app_configs():
        events = partial(consumer_handlers, app.label)
        if handlers := [*_found(app, "handlers", handlers_in), *_found(app, "consumers", events)]:
            registry.add(app.label, handlers)
    registry.freeze()


def _found(app: AppConfig, name: str, collect: Callable[[ModuleType], Iterable[Handler]]) -> Iterable[Handler]:
    if app.module is None or app.name == "microservices" or not module_has_submodule(app.module, name):
        return ()
    return collect(import_module(f"{app.name}.{name}"))


def _forget(*, setting: str, **_: object) -> None:
    """Read again what a test has overridden."""
    if setting == "INSTALLED_APPS":
        _collect()
    if setting in ("INSTALLED_APPS", "MICROSERVICES"):
        get_settings.cache_clear()
        get_executor.cache_clear()
        get_microservice.cache_clear()
        clients.reset()
