"""What is asked of JetStream: streams that keep messages, and consumers that bring them, by nats-py's own calls."""

from __future__ import annotations

from typing import Any

from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamConfig, StreamInfo
from nats.js.errors import NoStreamResponseError, NotFoundError, ServiceUnavailableError

from ..exceptions import Unavailable
from .nats_connection import Message, NatsConnection

_PATIENCE = 10.0
_FAREWELL = 1.0
_FORGET_AFTER = 3600.0
_MOST_UNACKNOWLEDGED = 20_000  # those that wait for their next attempt are among them


async def make_stream(connection: NatsConnection, name: str, bounds: dict[str, Any]) -> object:
    """Make a stream where there is none, one that is there keeps its bounds; return when it was made.

    Raises Unavailable.
    """
    js = connection.jetstream(timeout=_PATIENCE)

    async def make() -> StreamInfo:
        try:
            return await js.stream_info(name)
        except NotFoundError:
            return await js.add_stream(StreamConfig(name=name, subjects=[f"{name}.>"], **bounds))
        except ServiceUnavailableError as error:
            raise Unavailable(f"{connection.where} has no JetStream.") from error

    return (await connection.ask(make())).created


async def keep(
    connection: NatsConnection, bounds: dict[str, Any], subject: str, body: bytes, headers: dict[str, str] | None
) -> None:
    """Publish a message; return when the stream has it that its subject begins with. Raises RpcException."""
    connection.check_size(body, headers)
    js, failed = connection.jetstream(timeout=_PATIENCE), f"JetStream, {connection.where}, did not keep the event"

    async def publish() -> None:
        try:
            await js.publish(subject, body, headers=headers or None)
        except NoStreamResponseError as error:
            raise Unavailable(f"{failed}: there is no stream for it.") from error

    try:
        await connection.ask(publish(), failed)
    except Unavailable as error:
        if not isinstance(error.__cause__, NoStreamResponseError):
            raise
        # Somebody has removed it.
        await make_stream(connection, subject.partition(".")[0], bounds)
        await connection.ask(publish(), failed)


async def make_consumer(
    connection: NatsConnection, stream: str, name: str, subject: str, ack_wait: float, *, lasts: bool
) -> None:
    """Make a consumer, or go on with it. Raises Unavailable.

    One that lasts has all that the stream holds; another begins with the next message, and goes with its process.
    """
    config = ConsumerConfig(
        name=name,
        durable_name=name,
        filter_subject=subject,
        deliver_policy=DeliverPolicy.ALL if lasts else DeliverPolicy.NEW,
        inactive_threshold=None if lasts else _FORGET_AFTER,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait,
        max_deliver=-1,  # who counts must also bury
        max_ack_pending=_MOST_UNACKNOWLEDGED,
    )
    await connection.ask(connection.jsm(timeout=_PATIENCE).add_consumer(stream, config))


async def remove_consumer(connection: NatsConnection, stream: str, name: str) -> None:
    """Remove a consumer that nobody will use again. Raises Unavailable."""
    await connection.ask(connection.jsm(timeout=_FAREWELL).delete_consumer(stream, name))


async def pull(connection: NatsConnection, stream: str, consumer: str, count: int, wait: float, inbox: str) -> None:
    """Have a consumer send its next `count` messages to a subject, as they come within `wait` seconds.

    Not by the driver's `fetch`: what that has gathered when it is cancelled, nobody can give back.
    """
    body = b'{"batch":%d,"expires":%d}' % (count, int(wait * 1e9))
    await connection.put(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", body, inbox)


def is_end(message: Message) -> bool:
    """Return whether it says that a pull is over. Raises Unavailable where the consumer is."""
    if message.reply:
        return False
    status = message.headers or {}
    if status.get("Status") in ("404", "408"):
        return True
    raise Unavailable(f"the consumer sends nothing more: {status.get('Description', 'there is none')}")
