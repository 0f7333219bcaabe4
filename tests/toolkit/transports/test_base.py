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
