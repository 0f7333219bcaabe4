"""Transports and codecs of a project's own: the examples of the documentation, run."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_django import Settings
from redis.asyncio import Redis

from microservices import conf
from microservices.client import Client
from microservices.dispatcher import Dispatcher
from microservices.exceptions import ConfigurationError
from microservices.transports import load, parse
from microservices.transports.base import ClientProxy, Server
from tests.toolkit.conftest import service
from tests.toolkit.transports.contract import PATIENCE, TransportContract, echo, hearing

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
LINES = {"server": "lines.LinesServer", "client": "lines.LinesClient", "names_port": True}


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    settings.MICROSERVICES = {"TRANSPORTS": {"lines": LINES}}
    conf.get_settings()
    yield
    for name in ("lines", "zipped"):
        sys.modules.pop(name, None)


class TestLines(TransportContract):
    """The example is a whole transport, but for streams: their peers cannot be held back on a shared connection."""

    notices_who_leaves = False
    holds_back = False

    async def serve(self, dispatcher: Dispatcher) -> Server:
        address = parse("lines://127.0.0.1:1")._replace(port=0, options={**self.server_options})
        server = load(address, "server")(address, dispatcher)
        await server.listen()
        return server

    def proxy(self, dispatcher: Dispatcher, server: Any) -> ClientProxy:
        address = parse(f"lines://127.0.0.1:{server.unwrap().sockets[0].getsockname()[1]}")
        return load(address, "client")(address, "shop")


@pytest.mark.asyncio
async def test_a_codec_of_ones_own_is_spoken_by_both_sides(redis: str, foreign: Redis) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    address = parse(f"{redis}?codec=zipped.Zipped")
    server = load(address, "server")(address, service(echo, hearing("made", heard)))
    client = Client("shop", lambda: load(address, "client")(address, "shop"))
    await server.listen()
    try:
        async with asyncio.timeout(PATIENCE), foreign.pubsub() as wire:
            await wire.subscribe("echo", "echo.reply")
            answer = await client.send("echo", {"text": "é" * 1000})
            await client.emit("made", 1)
            event = await heard.get()
            await foreign.publish("made", '"not compressed"')
            foreign_event = await heard.get()
            bodies = []
            while len(bodies) < 2:
                message = await wire.get_message(ignore_subscribe_messages=True, timeout=1)
                bodies += [message["data"]] if message else []
    finally:
        await client.close()
        await server.close(0)

    assert answer == {"text": "é" * 1000}
    assert (event[1], foreign_event[1]) == (1, "not compressed")
    assert all(body.startswith(b"x\x9c") and len(body) < 200 for body in bodies)


@pytest.mark.parametrize("path", ["zipped.Unzipped", "nowhere.Zipped", "Zipped"])
def test_a_codec_that_is_not_there_is_told_at_once(path: str) -> None:
    address = parse(f"tcp://127.0.0.1:3001?codec={path}")

    with pytest.raises(ConfigurationError, match=f"There is no codec '{path}'"):
        load(address, "server")(address, service(echo))


def test_a_transport_is_forgotten_with_its_settings(settings: Settings) -> None:
    settings.MICROSERVICES = {}
    conf.get_settings()

    with pytest.raises(ConfigurationError, match="Unknown transport 'lines'"):
        parse("lines://127.0.0.1:1")


def test_a_scheme_of_the_toolkit_cannot_be_taken(settings: Settings) -> None:
    settings.MICROSERVICES = {"TRANSPORTS": {"tcp": LINES}}

    with pytest.raises(ConfigurationError, match="tcp:// is a transport of the toolkit"):
        conf.get_settings()


def test_a_class_that_is_not_there_is_told_by_its_path(settings: Settings) -> None:
    settings.MICROSERVICES = {"TRANSPORTS": {"lines": {**LINES, "server": "lines.Nothing"}}}
    conf.get_settings()

    with pytest.raises(ConfigurationError, match=r"lines:// names 'lines\.Nothing'"):
        load(parse("lines://127.0.0.1:1"), "server")
