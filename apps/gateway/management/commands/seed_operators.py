"""The seed_operators command: somebody who can sign in to the admin, in development."""

from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand

from microservices.conf import get_settings

NAME = "admin"


class Command(BaseCommand):
    """`manage.py seed_operators`."""

    help = "With DEBUG on, create the superuser admin if nobody is there yet, and say where to sign in."

    def handle(self, *args: Any, **options: Any) -> None:
        """Create the superuser, and say so."""
        if not settings.DEBUG:
            return
        users = get_user_model()._default_manager
        if not users.exists():
            users.create_superuser(NAME, password=NAME)
        if users.filter(username=NAME).exists():
            url = f"http://127.0.0.1:{get_settings().http_port}/admin/"
            self.stdout.write(f"Admin: {url} - login {NAME}, password {NAME} (development only)")
