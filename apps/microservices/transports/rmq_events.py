"""Durable events over a topic exchange of RabbitMQ: a queue a service, acknowledged after the handler.

Each service that hears events has the durable queue `<service>.<exchange>`, by default `<service>.events`, bound by
its routes, and one of its processes takes each event. A failed one goes to `<queue>.retry.<milliseconds>`, from where
the broker gives it back after that time, and in the end to `dead.<service>`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextvars import Context
from functools import partial
from typing import Any, Literal, cast

from msgspec import UNSET

from ..context import RpcContext
from ..dispatcher import Dispatcher
from ..exceptions import InvalidPayload, PacketError, RpcException, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Request
from . import Address, Count, Seconds
from .amqp import AmqpOptions, Channel, Connection, Message, Properties, marshalled
from .envelope import read_json, with_trace
from .rmq import Record, bindings, is_plain, milliseconds, nobody, properties_of
from .rmq_peers import AmqpProxy, AmqpServer

logger = logging.getLogger("microservices.rmq_events")

DEAD = "dead."

_MAX_LETTERS = 100_000
_MAX_PAUSE = 24 * 3600.0
_MAX_ERROR = 1000
_ATTEMPT, _ROUTE, _ERROR = "x-attempt", "x-route", "x-error"
_PLAIN = marshalled(Properties(headers={}, delivery_mode=2))
_DEATHS = ("x-death", "x-first-death")


class Options(AmqpOptions, frozen=True, kw_only=True):
    """What the URL of the bus may set; times in seconds."""

    exchange: str = "events"
    prefetch: Count = 50
    """How many events a process works on at a time."""
    attempts: Count = 5
    retry_after: Seconds = 1
    """The pause before the second attempt; each further one is five times longer."""
    queue_type: Literal["classic", "quorum"] = "classic"


class RmqBus(AmqpProxy):
    """Publishes events, persistent; `emit` returns when RabbitMQ has confirmed them."""

    scheme = "amqp"
    Options = Options
    Record = Record

    async def set_up(self, connection: Connection) -> None:
        await self._confirming.declare_exchange(self.options.exchange, "topic")

    def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        properties = _PLAIN if is_plain(context) else marshalled(properties_of(context, persistent=True, headers={}))
        body = self.encode(event)
        # Not mandatory: an event need not be heard.
        await self._confirming.hand_over(self.options.exchange, context.pattern, properties, body, mandatory=False)


class RmqListener(AmqpServer):
    """Takes the events that a service hears, a bounded number at a time."""

    scheme = "amqp"
    Options = Options

    _retrying: Channel

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._queue = f"{dispatcher.service}.{self.options.exchange}"
        self._dead = f"{DEAD}{dispatcher.service}"
        self._kind = {"x-queue-type": self.options.queue_type}
        self._heard = {"one": self._hears("one"), "each": self._hears("each")}
        self._routes = {delivery: bindings(routes) for delivery, routes in self._heard.items()}

    async def listen(self) -> None:
        if any(self._heard.values()):
            await super().listen()

    # Queues

    async def set_up(self, connection: Connection) -> None:
        self._retrying = await connection.channel()
        await self._retrying.confirm()
        await self._retrying.declare_exchange(self.options.exchange, "topic")
        if self._heard["one"]:
            await self._declare(self._dead, {"x-max-length": _MAX_LETTERS})
            await self._declare(self._queue)
            await self._consume(connection, self._queue, "one")
        if self._heard["each"]:
            own = await self._retrying.declare_queue(exclusive=True, auto_delete=True)
            await self._consume(connection, own, "each")

    def _hears(self, delivery: Delivery) -> dict[str, Any]:
        routes = self.dispatcher.routes
        return {name: route for name, route in routes.items() if self.dispatcher.hears(name, delivery)}

    async def _declare(self, queue: str, arguments: Mapping[str, Any] = {}) -> None:
        await self._retrying.declare_queue(queue, durable=True, arguments={**self._kind, **arguments})

    async def _consume(self, connection: Connection, queue: str, delivery: Delivery) -> None:
        channel = await connection.channel()
        for route in self._heard[delivery]:
            await channel.bind(queue, self.options.exchange, route)
        await channel.prefetch(self.options.prefetch)
        await channel.consume(queue, partial(self._take, delivery), no_ack=False)

    # Events

    def _take(self, delivery: Delivery, message: Message) -> None:
        self.keep(asyncio.get_running_loop().create_task(self._work(delivery, message), context=Context()))

    async def _work(self, delivery: Delivery, message: Message) -> None:
        try:
            if delivery == "each":
                await self._hear("each", message)
                message.ack()
            elif message.redelivered:
                await self._count(message)
            else:
                await self._settle(message, await self._hear("one", message))
        except RpcException as error:
            # Not acknowledged, it comes again.
            logger.debug("%s keeps an event: %s", self.dispatcher.service, error)

    async def _hear(self, delivery: Delivery, message: Message) -> list[BaseException]:
        try:
            packet = with_trace(read_json(self.decode(message.body)), message.headers)
        except PacketError:
            dropped.add(self.dispatcher.service, self.scheme, "no-packet")
            return [PacketError("it is no packet")]
        packet.id = UNSET
        name = _name(message)
        # Not by `handle`: the task around it is counted already.
        task = self.dispatcher.dispatch(
            packet,
            nobody,
            transport=self.scheme,
            peer=self.url,
            channel=name,
            delivery=delivery,
            route=self._routes[delivery].find(name),
            headers=message.headers,
            native=message,
        )
        return [] if task is None else cast("list[BaseException]", await task)

    async def _settle(self, message: Message, failures: list[BaseException]) -> None:
        attempt = _attempt(message)
        if not failures:
            message.ack()
        elif all(isinstance(failure, InvalidPayload | PacketError) for failure in failures):
            await self._bury(message, str(failures[0]))
        elif attempt >= self.options.attempts:
            await self._bury(message, f"attempt {attempt} failed: {failures[0]!r}")
        else:
            await self._again(message, attempt)

    async def _count(self, message: Message) -> None:
        # A process has ended over it, and nobody has counted that.
        attempt = _attempt(message)
        if attempt >= self.options.attempts:
            await self._bury(message, f"its process ended {attempt} times")
        else:
            await self._move(message, self._queue, {_ATTEMPT: attempt + 1})

    async def _again(self, message: Message, attempt: int) -> None:
        pause = milliseconds(min(self.options.retry_after * 5 ** (attempt - 1), _MAX_PAUSE))
        queue = f"{self._queue}.retry.{pause}"
        arguments = {
            "x-message-ttl": pause,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": self._queue,
            "x-expires": 2 * pause + 60_000,  # counted from here: it is declared for each event that it takes
        }
        await self._declare(queue, arguments)
        await self._move(message, queue, {_ATTEMPT: attempt + 1})

    async def _bury(self, message: Message, why: str) -> None:
        logger.error("%s gives up an event of %s: %s", self.dispatcher.service, _name(message), why)
        dropped.add(self.dispatcher.service, self.scheme, "dead-letter")
        await self._move(message, self._dead, {_ERROR: why[:_MAX_ERROR]})

    async def _move(self, message: Message, queue: str, facts: dict[str, Any]) -> None:
        # First there, then gone here: what is killed between leaves two of them, and never none.
        headers = {key: value for key, value in message.headers.items() if not key.startswith(_DEATHS)}
        properties = message.properties
        properties.headers = {**headers, _ROUTE: _name(message), **facts}
        properties.delivery_mode, properties.expiration, properties.user_id = 2, None, None
        taken = await self._retrying.hand_over("", queue, marshalled(properties), message.body, mandatory=True)
        if not taken:
            raise Unavailable(f"The queue {queue} is gone.")
        message.ack()


def _name(message: Message) -> str:
    name = message.headers.get(_ROUTE)
    return name if isinstance(name, str) else message.routing_key


def _attempt(message: Message) -> int:
    attempt = message.headers.get(_ATTEMPT)
    return attempt if type(attempt) is int else 1
