"""What is asked of JetStream: streams that keep messages, and consumers that bring them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..exceptions import Unavailable
from .nats_protocol import Message, NatsConnection

_PATIENCE = 10.0
_FAREWELL = 1.0
_FORGET_AFTER = 3600.0
_MOST_UNACKNOWLEDGED = 20_000  # those that wait for their next attempt are among them
_NOBODY, _NOT_FOUND = "503", 404


class _Error(msgspec.Struct):
    code: int
    description: str = ""


class _Answer(msgspec.Struct):
    error: _Error | None = None
    created: str = ""


class Refused(Unavailable):
    """JetStream said no; `status` is its number for the reason."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NoStream(Unavailable):
    """No stream keeps what was published."""


class Place(msgspec.Struct, frozen=True):
    """Where a message stands, and how often it was delivered."""

    number: int
    attempt: int


async def make_stream(connection: NatsConnection, name: str, bounds: dict[str, Any]) -> str:
    """Make a stream where there is none, one that is there keeps its bounds; return when it was made.

    Raises Unavailable.
    """
    try:
        found = await _ask(connection, f"STREAM.INFO.{name}")
    except Refused as error:
        if error.status != _NOT_FOUND:
            raise
        config = {"name": name, "subjects": [f"{name}.>"], "retention": "limits", "storage": "file", **bounds}
        found = await _ask(connection, f"STREAM.CREATE.{name}", config)
    return found.created


async def keep(
    connection: NatsConnection, bounds: dict[str, Any], subject: str, body: bytes, headers: Mapping[str, str] | None
) -> None:
    """Publish a message; return when the stream has it that its subject begins with. Raises RpcException."""
    try:
        await _keep(connection, subject, body, headers)
    except NoStream:
        # Somebody has removed it.
        await make_stream(connection, subject.partition(".")[0], bounds)
        await _keep(connection, subject, body, headers)


async def make_consumer(
    connection: NatsConnection, stream: str, name: str, subject: str, ack_wait: float, *, lasts: bool
) -> None:
    """Make a consumer, or go on with it. Raises Unavailable.

    One that lasts has all that the stream holds; another begins with the next message, and goes with its process.
    """
    config = {
        "name": name,
        "durable_name": name,
        "filter_subject": subject,
        "deliver_policy": "all" if lasts else "new",
        "ack_policy": "explicit",
        "replay_policy": "instant",
        "ack_wait": nanoseconds(ack_wait),
        "max_deliver": -1,  # who counts must also bury
        "max_ack_pending": _MOST_UNACKNOWLEDGED,
    }
    if not lasts:
        config["inactive_threshold"] = nanoseconds(_FORGET_AFTER)
    request = {"stream_name": stream, "config": config}
    await _ask(connection, f"CONSUMER.CREATE.{stream}.{name}.{subject}", request)


async def remove_consumer(connection: NatsConnection, stream: str, name: str) -> None:
    """Remove a consumer that nobody will use again. Raises Unavailable."""
    await _ask(connection, f"CONSUMER.DELETE.{stream}.{name}", patience=_FAREWELL)


def pull(connection: NatsConnection, stream: str, consumer: str, count: int, wait: float, inbox: str) -> None:
    """Have a consumer send its next `count` messages to a subject, as they come within `wait` seconds.

    Raises ConnectionLost.
    """
    body = b'{"batch":%d,"expires":%d}' % (count, nanoseconds(wait))
    connection.put(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", body, inbox)


def is_end(message: Message) -> bool:
    """Return whether it says that a pull is over. Raises Unavailable where the consumer is."""
    if message.reply:
        return False
    number, _, reason = message.status.partition(" ")
    if number in ("404", "408"):
        return True
    raise Unavailable(f"the consumer sends nothing more: {reason or 'there is none'}")


def place(message: Message) -> Place:
    """Return where a message stands in its stream."""
    # $JS.ACK[.domain.account].stream.consumer.attempt.number.of consumer.time.pending[.token]
    words = message.reply.split(".")
    first = 2 if len(words) == 9 else 4
    return Place(attempt=int(words[first + 2]), number=int(words[first + 3]))


def nanoseconds(seconds: float) -> int:
    """Return what JetStream counts in."""
    return int(seconds * 1e9)


async def _keep(connection: NatsConnection, subject: str, body: bytes, headers: Mapping[str, str] | None) -> None:
    answer = await connection.request(subject, body, _PATIENCE, headers)
    failed = f"JetStream, {connection.where}, did not keep the event"
    if answer.status.startswith(_NOBODY):
        raise NoStream(f"{failed}: there is no stream for it.")
    _check(answer, failed)


async def _ask(connection: NatsConnection, what: str, request: object = None, patience: float = _PATIENCE) -> _Answer:
    body = b"" if request is None else msgspec.json.encode(request)
    answer = await connection.request(f"$JS.API.{what}", body, patience)
    if answer.status.startswith(_NOBODY):
        raise Unavailable(f"{connection.where} has no JetStream.")
    return _check(answer, connection.where)


def _check(message: Message, failed: str) -> _Answer:
    try:
        answer = msgspec.json.decode(message.data, type=_Answer)
    except msgspec.DecodeError as error:
        raise Unavailable(f"{failed}: {error}.") from error
    if answer.error is None:
        return answer
    raise Refused(f"{failed}: {answer.error.description}.", answer.error.code)
