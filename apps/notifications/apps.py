"""The notifications service as a Django app."""

from django.apps import AppConfig


class NotificationsConfig(AppConfig):
    """An inbox for each user, and e-mails."""

    name = "notifications"
    version = "1.0.0"
    calls = ()
