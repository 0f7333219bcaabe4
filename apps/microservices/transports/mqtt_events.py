"""Events over MQTT: the same topics and packets as NestJS's, each heard once in a service or in each process."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from typing import ClassVar, cast

from msgspec import UNSET

from ..context import RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import InvalidPayload, RpcException
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Request
from . import Address, Count, Seconds
from .mqtt import MqttClient, MqttServer
from .mqtt_connection import MqttConnection, MqttOptions, Qos, ignore
from .mqtt_packets import Message
from .mqtt_topics import filters

logger = logging.getLogger("microservices.mqtt")


class Options(MqttOptions, frozen=True, kw_only=True):
    """What the URL of a bus may set. With a `client_id` events wait for a process that is away."""

    qos: Qos = 1
    share: bool = True
    """Whether the broker has shared subscriptions; without them every process hears every event."""
    attempts: Count = 3
    """How often an event is tried that its handlers fail to take."""
    retry_after: Seconds = 1
    """The pause before the second attempt; each further one is five times longer."""


class MqttBus(MqttClient):
    """Publishes events; with QoS 1 and 2 `emit` returns when the broker has them."""

    Options: ClassVar[type[MqttOptions]] = Options

    def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")


class MqttListener(MqttServer):
    """Hears the events of a service: each once in the service, or once in each of its processes.

    With QoS 1 and 2 an event is acknowledged when its handlers have ended, so that the broker still has what
    a process has left; it sends that again when the same `client_id` comes back. What its handlers fail to
    take is tried again here, then given up and counted: left unacknowledged it would hold up all others.
    """

    Options: ClassVar[type[MqttOptions]] = Options
    answers = False

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._leaving = False

    @property
    def keeps(self) -> bool:
        return bool(self.options.client_id)

    @property
    def routes(self) -> dict[str, Route]:
        return {name: route for name, route in super().routes.items() if route.events}

    def filters(self) -> dict[Delivery | None, list[str]]:
        # A connection each: nothing in a message of MQTT 3.1.1 tells for which subscription it came.
        group = self.dispatcher.service if self.options.share else ""
        ways: dict[Delivery, str] = {"one": group, "each": ""}
        found: dict[Delivery | None, list[str]] = {}
        for delivery, shared in ways.items():
            routes = [route for route in self.routes if self.dispatcher.hears(route, delivery)]
            if routes:
                found[delivery] = filters(routes, shared)
        return found

    async def listen(self) -> None:
        if self.routes:
            await super().listen()

    async def unsubscribe(self) -> None:
        if self.keeps:
            self._leaving = True
        else:
            await super().unsubscribe()

    def _take(self, delivery: Delivery | None, connection: MqttConnection, message: Message) -> None:
        if self._leaving:
            return  # unacknowledged it waits for the next process of this name
        work = asyncio.get_running_loop().create_task(self._work(delivery, connection, message), context=Context())
        self._watch(connection, self.keep(work))

    async def _work(self, delivery: Delivery | None, connection: MqttConnection, message: Message) -> None:
        for attempt in range(1, self.options.attempts + 1):
            failures = await self._try(delivery, message)
            if not failures:
                break
            if attempt == self.options.attempts or all(isinstance(each, InvalidPayload) for each in failures):
                logger.error("%s gives up an event of %s: %r", self.dispatcher.service, message.topic, failures[0])
                dropped.add(self.dispatcher.service, self.scheme, "failed-event")
                break
            await asyncio.sleep(self.options.retry_after * 5 ** (attempt - 1))
        connection.acknowledge(message)

    async def _try(self, delivery: Delivery | None, message: Message) -> list[BaseException]:
        packet = self.read(message)
        packet.id = UNSET
        # Not by `handle`: the task around it is counted already.
        task = self.dispatcher.dispatch(
            packet,
            ignore,
            transport=self.scheme,
            peer=self.url,
            channel=message.topic,
            delivery=delivery,
            route=self._door(message.topic).route,
            headers=message.headers,
            native=message,
        )
        return [] if task is None else cast("list[BaseException]", await task)
