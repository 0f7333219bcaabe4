"""Serves the gRPC doors alone, beside `runserver` or the other doors of a service."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any
from urllib.parse import urlsplit

from django.core.management.base import CommandError

from ...conf import get_settings
from ...microservice import get_microservice
from . import serve


class Command(serve.Command):
    """`manage.py grpcserve`: every service on one port; `manage.py grpcserve users`: the named ones on their own."""

    page = "health"
    help = "Serve the gRPC methods of the services that live here: all on one port, or the named ones on their own."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("services", nargs="*", metavar="NAME", help="only these, each on the port of the map")
        parser.add_argument("--host", default="127.0.0.1", help="the address to bind (default: %(default)s)")
        parser.add_argument("--port", type=int, help="the port of all services together (default: GRPC_PORT)")
        parser.add_argument("--health-port", type=int, help="serve the health pages there, too (default: nowhere)")
        self.add_workers(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        settings = get_settings()
        known = [
            name for name, place in settings.servers.items() if place.grpc and get_microservice(name).dispatcher.methods
        ]
        wanted = options["services"] or known
        for name in wanted:
            if name not in known:
                told = ", ".join(known) or "none"
                raise CommandError(f"{name!r} is no gRPC service that lives here; known: {told}.", returncode=2)
        if not wanted:
            raise CommandError("No service that lives here has both a gRPC method and a `grpc` address.", returncode=2)
        if options["services"] and options["port"] is not None:
            raise CommandError(
                "--port is for all services together; named ones have the ports of the map.", returncode=2
            )
        urls = {name: [settings.servers[name].grpc] for name in wanted}
        if not options["services"]:
            port = settings.grpc_port if options["port"] is None else options["port"]
            urls = {name: [self._moved(url, options["host"], port)] for name, [url] in urls.items()}
        self.serve(options["host"], options["health_port"], options["workers"], urls)

    @staticmethod
    def _moved(url: str, host: str, port: int) -> str:
        where = f"[{host}]" if ":" in host else host
        return urlsplit(url)._replace(netloc=f"{where}:{port}").geturl()
