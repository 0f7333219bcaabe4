"""Sends one request and prints its answer."""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import msgspec
from django.core.management.base import BaseCommand, CommandError

from ... import balanced, conf, transports
from ...client import Client
from ...conf import get_settings
from ...exceptions import ConfigurationError, DeadlineExceeded, RpcException, Unavailable
from ...microservice import get_microservice
from ...transports.base import Caller, ClientProxy
from ...transports.local import LocalClient

FAILED, USAGE, TIMED_OUT, REMOTE_ERROR = 1, 2, 3, 4


class Command(BaseCommand):
    """`manage.py send users get_user '{"id": "..."}'`."""

    help = (
        "Send a request to a service of the map, or to any address (tcp://host:port), and print what it answers. "
        "Exit codes: 1 not reachable, 2 usage, 3 no answer in time, 4 the service answered with an error."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django declares it so

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("service", help="a service of the map, or a URL such as tcp://127.0.0.1:3001")
        parser.add_argument("pattern", help="""JSON; a bare word NAME means {"cmd": "NAME"}, '"NAME"' is the text""")
        parser.add_argument("data", nargs="?", default="null", help="JSON, @FILE, or - for standard input")
        parser.add_argument("--timeout", type=float, help="seconds to wait for each value (default: CALL_TIMEOUT)")
        parser.add_argument("--key", help="put this idempotency_key into the data")
        parser.add_argument("-H", dest="metadata", action="append", default=[], metavar="NAME=VALUE", help="metadata")
        parser.add_argument("--count", type=int, default=1, help="send it so many times")
        parser.add_argument("--rate", type=float, help="at most so many times a second")
        parser.add_argument("--raw", action="store_true", help="print nothing but the answer")

    def handle(self, *args: Any, **options: Any) -> None:
        pattern, data = read_pattern(options["pattern"]), read_data(options["data"])
        if options["key"] is not None:
            if not isinstance(data, dict):
                raise CommandError("--key needs an object as data.", returncode=USAGE)
            data["idempotency_key"] = options["key"]
        metadata = dict(read_metadata(text) for text in options["metadata"])
        timeout = options["timeout"] or get_settings().call_timeout
        try:
            code = asyncio.run(self._send(options, pattern, data, metadata, timeout))
        except ConfigurationError as error:
            raise CommandError(str(error), returncode=USAGE) from error
        if code:
            sys.exit(code)

    async def _send(self, options: dict[str, Any], pattern: Any, data: Any, metadata: Any, timeout: float) -> int:
        proxy = await reach(options["service"], timeout)
        client = Client(proxy.service, lambda: proxy, source="send", timeout=timeout)
        pause = 1 / options["rate"] if options["rate"] else 0
        code = 0
        try:
            for turn in range(options["count"]):
                if turn:
                    await asyncio.sleep(pause)
                started = time.perf_counter()
                outcome, ended = await self._once(client, pattern, data, metadata)
                code = code or ended
                if not options["raw"]:
                    ms = (time.perf_counter() - started) * 1000
                    where = proxy.url if proxy.scheme != LocalClient.scheme else "in this process"
                    self.stderr.write(f"{outcome}  {proxy.service} {where}  {ms:.1f} ms")
        finally:
            await client.close()
        return code

    async def _once(self, client: Client, pattern: Any, data: Any, metadata: Any) -> tuple[str, int]:
        try:
            async for value in client.stream(pattern, data, metadata=metadata, returns=msgspec.Raw):
                self.stdout.write(bytes(value).decode())
        except DeadlineExceeded as error:
            return f"timeout {error}", TIMED_OUT
        except RpcException as error:
            code = FAILED if isinstance(error, Unavailable) else REMOTE_ERROR
            fields = "".join(f"\n  {field['pointer']}: {field['message']}" for field in error.errors)
            return f'error {error.status_code} {error.code} "{error}"{fields}', code
        return "ok", 0


async def reach(service: str, timeout: float) -> Caller:
    """Return a connection to a URL, or to a service of the map: by the wire where it answers, else in this process."""
    settings = get_settings()
    if "://" in service:
        address = conf.address(service)
        return transports.load(address, "client")(address, address.host)  # type: ignore[no-any-return]
    if service not in settings.clients:
        known = ", ".join(settings.clients) or "none"
        raise ConfigurationError(f"There is no service {service!r}; known: {known}, or give a URL.")
    place = settings.clients[service]
    addresses = conf.addresses(place.url, place.options, rpcs=place.rpcs)
    if service not in settings.servers:
        return balanced.connect(service, addresses)
    remote: ClientProxy = transports.load(addresses[0], "client")(addresses[0], service)
    try:
        async with asyncio.timeout(timeout):
            await remote.connect()
    except (Unavailable, TimeoutError):
        await remote.close()
        return LocalClient(get_microservice(service).dispatcher)
    return remote


def read_pattern(text: str) -> Any:
    """Return the pattern that an argument stands for: JSON, or a bare word for its `cmd`."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {"cmd": text}


def read_data(text: str) -> Any:
    """Return the JSON of an argument, of @FILE, or of standard input for `-`."""
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        return msgspec.json.decode(text)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise CommandError(f"The data is no JSON: {error}", returncode=USAGE) from error


def read_metadata(text: str) -> tuple[str, str]:
    """Split NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise CommandError(f"-H takes NAME=VALUE, not {text!r}.", returncode=USAGE)
    return name, value
