"""The users service as a Django app."""

from django.apps import AppConfig


class UsersConfig(AppConfig):
    """Customers and staff of the shop; operators of the admin are not among them."""

    name = "users"
    version = "1.0.0"
    calls = ()
