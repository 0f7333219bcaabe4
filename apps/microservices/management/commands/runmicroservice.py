"""Runs one or more services alone: their doors and a small health port, no HTTP API."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import CommandError

from ...conf import get_settings
from . import serve


class Command(serve.Command):
    """`manage.py runmicroservice users`: NestJS's `createMicroservice`."""

    page = "health"
    help = "Run the named services alone, each with its own database and its own doors."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("services", nargs="+", metavar="NAME", help="a service of config/fleet.py")
        parser.add_argument("--host", default="127.0.0.1", help="where the health port binds (default: %(default)s)")
        parser.add_argument("--health-port", type=int, help="the health port (default: the map's, or HEALTH_PORT)")
        self.add_workers(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        settings = get_settings()
        for name in options["services"]:
            if name not in settings.clients:
                raise CommandError(f"There is no service {name!r}; known: {', '.join(settings.clients)}.", returncode=2)
            if name not in settings.servers:
                raise CommandError(f"{name} does not live here: SERVICES leaves it out.", returncode=2)
        port = options["health_port"] or settings.servers[options["services"][0]].health
        if port is None:
            raise CommandError(f"{options['services'][0]} has no health port: give it one with --health-port.")
        self.serve(options["host"], port, options["workers"])
