"""Emits one event."""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from ...client import clients
from ...conf import get_settings
from ...exceptions import ConfigurationError, RpcException
from ...transports import parse
from .send import FAILED, USAGE, read_data, read_metadata


class Command(BaseCommand):
    """`manage.py emit order_created @order.json`."""

    help = "Hand an event to the bus. Exit codes: 1 not handed over, 2 usage."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django declares it so

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("event", help="the event's name")
        parser.add_argument("data", nargs="?", default="null", help="JSON, @FILE, or - for standard input")
        parser.add_argument("-H", dest="metadata", action="append", default=[], metavar="NAME=VALUE", help="metadata")

    def handle(self, *args: Any, **options: Any) -> None:
        url = get_settings().events_url
        data = read_data(options["data"])
        metadata = dict(read_metadata(text) for text in options["metadata"])
        started = time.perf_counter()
        try:
            where = str(parse(url))
            asyncio.run(_emit(options["event"], data, metadata))
        except ConfigurationError as error:
            raise CommandError(str(error), returncode=USAGE) from error
        except RpcException as error:
            self.stderr.write(f'error {error.status_code} {error.code} "{error}"')
            sys.exit(FAILED)
        self.stderr.write(f"handed over  {where}  {(time.perf_counter() - started) * 1000:.1f} ms")


async def _emit(event: str, data: Any, metadata: dict[str, str]) -> None:
    try:
        await clients.events.emit(event, data, metadata=metadata)
    finally:
        await clients.close()  # in memory, the handlers finish first
