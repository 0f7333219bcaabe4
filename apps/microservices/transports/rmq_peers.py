"""Both ends of RabbitMQ, a server and a client, with one connection each."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable

from ..exceptions import RpcException, Unavailable
from . import Address
from .amqp import AmqpOptions, Channel, Connection
from .amqp_frames import NO_AMQP
from .base import BrokerServer, ClientProxy, Peer


class AmqpPeer(Peer):
    """One end, and its connection."""

    _connection: Connection | None = None

    @abstractmethod
    async def set_up(self, connection: Connection) -> None:
        """Declare what is needed, and consume."""

    async def disconnect(self) -> None:
        """Let go of the connection, if there is one."""
        if self._connection is not None:
            await self._connection.close()

    def unwrap(self) -> Connection | None:
        return self._connection


class AmqpServer(AmqpPeer, BrokerServer):
    """A server, whose connection BrokerServer keeps up."""

    async def subscribe(self) -> None:
        self._connection = await open_connection(self.address, self.options, self.dispatcher.service, self.set_up)

    async def until_lost(self) -> str:
        return "" if self._connection is None else await asyncio.shield(self._connection.ended)

    async def unsubscribe(self) -> None:
        if self._connection is not None:
            await self._connection.cancel()


class AmqpProxy(AmqpPeer, ClientProxy):
    """A client, whose connection is opened when first used and again after a loss."""

    _confirming: Channel

    def congestion(self) -> asyncio.Future[None] | None:
        return None if self._connection is None else self._connection.congestion()

    async def open(self) -> None:
        name = f"client of {self.service}"
        connection = await open_connection(self.address, self.options, name, self._set_up)
        self._connection = connection
        connection.ended.add_done_callback(self._lost)

    def live(self) -> Connection:
        """Return the connection. Raises Unavailable where it is gone."""
        if self._connection is None:
            raise Unavailable("RabbitMQ ended the connection before the message was sent.")
        return self._connection

    async def _set_up(self, connection: Connection) -> None:
        self._confirming = await connection.channel()
        await self._confirming.confirm()
        await self.set_up(connection)

    def _lost(self, _: asyncio.Future[str]) -> None:
        gone = self.live().gone()
        self._connection = None
        self.lost(gone.message)


SetUp = Callable[[Connection], Awaitable[None]]


async def open_connection(address: Address, options: AmqpOptions, name: str, set_up: SetUp) -> Connection:
    """Connect to the first host that answers, and set up there. Raises Unavailable, naming RabbitMQ and the reason."""
    failure = Unavailable(f"RabbitMQ cannot be reached at {address}.")
    patience = options.connect_timeout / len(address.hosts)
    for host, port in address.hosts:
        try:
            return await _open(address._replace(host=host, port=port, others=()), options, name, set_up, patience)
        except Unavailable as error:
            failure = error
    raise failure


async def _open(address: Address, options: AmqpOptions, name: str, set_up: SetUp, patience: float) -> Connection:
    context = options.client_context() if address.scheme == "amqps" else None
    try:
        async with asyncio.timeout(patience):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(address, options.heartbeat, name),
                address.host,
                address.port,
                ssl=context,
                server_hostname=(options.server_name or address.host) if context else None,
            )
            try:
                await connection.opened
                await set_up(connection)
            except BaseException:
                connection.transport.abort()
                raise
            return connection
    except TimeoutError:
        raise Unavailable(f"RabbitMQ at {address} did not answer within {patience:g} s.") from None
    except RpcException as error:
        raise Unavailable(error.message) from error
    except (OSError, *NO_AMQP) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unavailable(f"RabbitMQ cannot be reached at {address}: {reason}.") from error
