"""The ways between NestJS and us: each transport with each version of NestJS, and how things look on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.brokers import Broker, Kafka, Mosquitto, Nats, RabbitMQ, Valkey, own
from tests.interop.nest import VERSIONS, free_port

BROKERS: dict[str, type[Broker] | None] = {
    "tcp": None,
    "redis": Valkey,
    "nats": Nats,
    "mqtt": Mosquitto,
    "amqp": RabbitMQ,
    "kafka": Kafka,
}
# What a NestJS server on Kafka calls its patterns: an object is no name of a topic.
ON_KAFKA = {
    '{"cmd":"sum"}': "sum",
    '{"cmd":"null"}': "answer-null",
    "5": "five",
    '{"a":"x","b":1}': "object",
}
REPLIES = (
    *("sum", "echo", "null", "nothing", "stream", "slow", "metadata", "headers", "unknown"),
    *("rpc-text", "rpc-object", "unexpected", "stream-then-error", "first", "second", "noted"),
)


class Link(NamedTuple):
    """A transport and a version of NestJS."""

    scheme: str
    version: str

    def __str__(self) -> str:
        return f"{self.scheme}-{self.version}"

    @property
    def nothing(self) -> list[Any]:
        """What arrives of an answer without a value: on Kafka even that is a value."""
        return [None] if self.scheme == "kafka" else []

    def scalar(self, value: Any) -> Any:
        """Return a value as it arrives: Kafka knows texts, and JSON only of lists and objects."""
        if self.scheme != "kafka" or value is None or isinstance(value, list | dict):
            return value
        return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


LINKS = [Link(scheme, version) for scheme in BROKERS for version in VERSIONS]


@contextmanager
def place(scheme: str, rabbitmq: str) -> Iterator[str]:
    """Give a URL that nobody else uses, of a new broker where the transport has one; `rabbitmq` is one for all."""
    kind = BROKERS[scheme]
    if kind is None:
        yield f"{scheme}://127.0.0.1:{free_port()}"
    elif kind is RabbitMQ:  # it takes seconds to start, and queues keep its users apart
        yield rabbitmq
    else:
        with own(kind) as broker:
            yield broker.url


def for_nest(url: str) -> str:
    """Return a URL without the options that are ours."""
    return re.sub(r"\?.*", "", url)
