"""Finds the handlers of all installed apps when Django is ready."""

from __future__ import annotations

from importlib import import_module

from django.apps import AppConfig, apps
from django.core.signals import setting_changed
from django.utils.module_loading import module_has_submodule

from .client import clients
from .conf import get_settings
from .handlers import handlers_in, registry
from .microservice import get_microservice


class MicroservicesConfig(AppConfig):
    """The toolkit as a Django app."""

    name = "microservices"
    verbose_name = "Microservices"

    def ready(self) -> None:
        """Collect `handlers.py` of every app, then freeze the registry."""
        from . import checks  # noqa: F401 - registers the system checks

        for app in apps.get_app_configs():
            if app.module is not None and module_has_submodule(app.module, "handlers"):
                module = import_module(f"{app.name}.handlers")
                if found := handlers_in(module):
                    registry.add(app.label, found)
        registry.freeze()
        setting_changed.connect(_forget)


def _forget(*, setting: str, **_: object) -> None:
    """Read MICROSERVICES again where a test has overridden it."""
    if setting == "MICROSERVICES":
        get_settings.cache_clear()
        get_microservice.cache_clear()
        clients.reset()
