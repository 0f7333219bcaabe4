"""The payments service as a Django app."""

from django.apps import AppConfig


class PaymentsConfig(AppConfig):
    """Payments for orders, by way of a provider."""

    name = "payments"
    version = "1.0.0"
    calls = ()
