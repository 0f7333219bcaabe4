"""The app."""

from django.apps import AppConfig


class StuckConfig(AppConfig):
    """Handlers that block, hang, and outlast their process's time."""

    name = "tests.faults.stuck"
    label = "stuck"
