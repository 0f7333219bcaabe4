"""TLS of TCP: the whole contract over it, and who is let in."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from microservices.client import Client
from microservices.dispatcher import Dispatcher
from microservices.exceptions import ConfigurationError, RpcException
from microservices.transports import Address
from microservices.transports.base import ClientProxy
from microservices.transports.tcp import TcpClient, TcpServer
from tests.toolkit.conftest import service
from tests.toolkit.transports.certificates import Authority
from tests.toolkit.transports.contract import PATIENCE, TransportContract, echo


def at(port: int, **options: Any) -> Address:
    """Return an address on loopback."""
    return Address("tcps", "127.0.0.1", port, options)


class TestTcps(TransportContract):
    most_ahead = 8000  # the kernel's own buffers hold some megabytes

    @pytest.fixture(autouse=True)
    def use(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path)
        self.own = authority.issue("shop")._asdict()
        self.trust = {"cafile": authority.cafile}

    async def serve(self, dispatcher: Dispatcher) -> TcpServer:
        server = TcpServer(at(0, **self.own, **self.server_options), dispatcher)
        await server.listen()
        return server

    def proxy(self, dispatcher: Dispatcher, server: TcpServer) -> ClientProxy:
        return TcpClient(at(server.port, **self.trust), "shop")


@pytest.mark.asyncio
async def test_a_server_with_an_authority_lets_in_whom_it_knows(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    authority, stranger = Authority(tmp_path), Authority(tmp_path / "elsewhere")
    friend = {**authority.issue("caller")._asdict(), "cafile": authority.cafile}
    foreigner = {**stranger.issue("foreigner")._asdict(), "cafile": authority.cafile}
    server = TcpServer(at(0, **authority.issue("shop")._asdict(), cafile=authority.cafile), service(echo))
    await server.listen()
    outcomes = []
    try:
        async with asyncio.timeout(PATIENCE):
            for options in (
                friend,
                {**friend, "server_name": "shop"},
                {**friend, "server_name": "another"},
                {**friend, "cafile": stranger.cafile},
                {"cafile": authority.cafile},
                foreigner,
            ):
                client = Client("shop", lambda options=options: TcpClient(at(server.port, **options), "shop"))
                try:
                    outcomes.append(await client.send("echo", "hello", timeout=2))
                except RpcException as error:
                    outcomes.append(error.status_code)
                finally:
                    await client.close()
    finally:
        await server.close(0)

    assert outcomes == ["hello", "hello", 503, 503, 503, 503]


@pytest.mark.asyncio
async def test_a_peer_that_never_shakes_hands_is_sent_away(tmp_path: Path) -> None:
    own = Authority(tmp_path).issue("shop")._asdict()
    server = TcpServer(at(0, **own, incomplete_message_timeout=0.1), service(echo))
    await server.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            said = await reader.read()
            writer.close()
    finally:
        await server.close(0)

    assert said == b""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "needs the options certfile and keyfile"),
        ({"certfile": "no.pem", "keyfile": "no.key"}, "TLS cannot be set up with no.pem, no.key"),
    ],
)
def test_a_server_without_a_usable_certificate_does_not_start(options: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        asyncio.run(TcpServer(at(0, **options), service(echo)).listen())


@pytest.mark.asyncio
async def test_a_port_that_is_taken_is_tried_again_as_often_as_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = Address("tcp", "127.0.0.1", taken.getsockname()[1], {"retry_attempts": 2, "retry_delay": 0.01})
        with pytest.raises(OSError, match="in use"):
            await TcpServer(address, service(echo)).listen()

        patient = TcpServer(address._replace(options={"retry_attempts": 1000, "retry_delay": 0.01}), service(echo))
        listening = asyncio.create_task(patient.listen())
        await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE):
        await listening
    await patient.close(0)
