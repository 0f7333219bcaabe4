"""The orders service as a Django app."""

from django.apps import AppConfig


class OrdersConfig(AppConfig):
    """Products with their stock, and orders from placing to delivery."""

    name = "orders"
    version = "1.0.0"
    calls = ("payments",)
