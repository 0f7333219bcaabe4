"""Serves HTTP and the services of this process, and drains on SIGTERM."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.utils.module_loading import import_string

from ...conf import get_settings
from ...exceptions import ConfigurationError
from ...serving import run


class Command(BaseCommand):
    """`manage.py serve`: one process, one lifecycle."""

    page = "http"
    help = "Serve HTTP and, with LISTEN on, the doors of the services that live in this process."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="the address to bind (default: %(default)s)")
        parser.add_argument("--port", type=int, help="the HTTP port (default: HTTP_PORT)")

    def handle(self, *args: Any, **options: Any) -> None:
        port = get_settings().http_port if options["port"] is None else options["port"]
        self.serve(options["host"], port)

    def serve(self, host: str, port: int | None, urls: Mapping[str, Sequence[str]] | None = None) -> None:
        """Run the process until it is told to stop; `urls` are the doors in place of the map's."""
        try:
            run(import_string(settings.ASGI_APPLICATION), host, port, page=self.page, urls=urls)
        except ConfigurationError as error:
            raise CommandError(str(error)) from error
