"""The registry as a Django app."""

from django.apps import AppConfig

from ..lifecycle import lifecycle


class RegistryConfig(AppConfig):
    """Hears how the instances of all services are, and shows it in the admin."""

    name = "microservices.registry"
    label = "registry"
    verbose_name = "Fleet"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Look after the silent for as long as the process is ready."""
        from .sweep import sweep

        if sweep not in lifecycle.background:  # Django's tests may call `ready` again
            lifecycle.background.append(sweep)
