"""What every transport is given: the loop of a server that hears from a broker."""

from __future__ import annotations

import asyncio

import pytest

from microservices.transports import Address
from microservices.transports.base import BrokerServer, Status
from tests.toolkit.conftest import service
from tests.toolkit.transports.contract import PATIENCE, echo


class Stubborn(BrokerServer):
    """Its driver makes an error of its own of a cancellation."""

    scheme = "stubborn"

    async def subscribe(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise TypeError("the driver stumbled") from None

    async def until_lost(self) -> str:
        return "lost"

    async def unsubscribe(self) -> None: ...

    async def disconnect(self) -> None: ...

    def unwrap(self) -> None: ...


@pytest.mark.asyncio
async def test_a_server_closes_although_its_driver_swallows_a_cancellation() -> None:
    server = Stubborn(Address("stubborn", "h", 1, {"connect_timeout": 0.01}), service(echo))

    async with asyncio.timeout(PATIENCE):
        await server.listen()
        status = server.status
        await server.close(0)

    assert (status, server.status) == (Status.CONNECTING, Status.CLOSED)


class Quitter(Stubborn):
    """Its driver cancels whoever uses it, once."""

    scheme = "quitter"

    def __init__(self) -> None:
        super().__init__(Address("quitter", "h", 1, {"max_retry_delay": 0.01}), service(echo))
        self.subscribed = 0

    async def subscribe(self) -> None:
        self.subscribed += 1

    async def until_lost(self) -> str:
        if self.subscribed == 1:
            raise asyncio.CancelledError
        await asyncio.Event().wait()
        return "never"


@pytest.mark.asyncio
async def test_a_server_that_hears_no_more_is_not_connected_and_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    server = Quitter()
    states: list[Status] = []

    async with asyncio.timeout(PATIENCE):
        await server.listen()
        while server.subscribed < 2 or server.status is not Status.CONNECTED:
            states.append(server.status)
            await asyncio.sleep(0.001)
        await server.close(0.1)

    assert Status.RECONNECTING in states
    assert "hears quitter://h:1 no more; it begins again" in caplog.text
    assert (server.subscribed, server.status) == (2, Status.CLOSED)
