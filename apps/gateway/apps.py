"""The gateway as a Django app."""

from django.apps import AppConfig


class GatewayConfig(AppConfig):
    """The HTTP edge of the shop."""

    name = "gateway"
    version = "1.0.0"
    calls = ("users", "orders", "payments", "notifications")
