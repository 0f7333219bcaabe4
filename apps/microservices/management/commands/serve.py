"""Serves HTTP and the services of this process, and drains on SIGTERM."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping, Sequence
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.utils.module_loading import import_string

from ... import serving
from ...conf import get_settings
from ...exceptions import ConfigurationError
from ...health import until_databases_serve
from ...supervisor import workers as supervisor


class Command(BaseCommand):
    """`manage.py serve`: one process, one lifecycle."""

    page = "http"
    help = "Serve HTTP and, with LISTEN on, the doors of the services that live in this process."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="the address to bind (default: %(default)s)")
        parser.add_argument("--port", type=int, help="the HTTP port (default: HTTP_PORT)")
        self.add_workers(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        port = get_settings().http_port if options["port"] is None else options["port"]
        self.serve(options["host"], port, options["workers"])

    def add_workers(self, parser: ArgumentParser) -> None:
        """Let this command have several workers."""
        parser.add_argument(
            "--workers", type=workers, default=1, help="how many processes share the ports (default: 1)"
        )

    def serve(self, host: str, port: int | None, workers: int, urls: Mapping[str, Sequence[str]] | None = None) -> None:
        """Run until the process is told to stop, alone or by workers; `urls` are the doors in place of the map's."""
        try:
            if workers > 1:
                code = supervisor.run(workers, host, port, urls)
            else:
                application = import_string(settings.ASGI_APPLICATION)
                code = serving.run(application, host, port, page=self.page, urls=urls, prepare=until_databases_serve)
        except ConfigurationError as error:
            raise CommandError(str(error)) from error
        if code:
            sys.exit(code)


def workers(text: str) -> int:
    """Read how many workers there shall be. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no number of workers: 1, or more")
    return int(text)
