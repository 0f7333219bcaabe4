"""The brokers that tests bring up: they come back where they were, and leave nothing behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import aio_pika
import nats
import pytest

from tests.brokers import HOST, STOP_LIMIT, Broker, Kafka, Mosquitto, Nats, RabbitMQ, Valkey


@pytest.mark.parametrize("kind", [Valkey, Nats, Mosquitto, Kafka, pytest.param(RabbitMQ, marks=pytest.mark.slow)])
def test_a_broker_comes_back_on_its_port_and_leaves_nothing_behind(kind: type[Broker], tmp_path: Path) -> None:
    with kind(tmp_path / "broker") as server:
        for _ in range(2):
            with socket.create_connection((HOST, server.port), timeout=STOP_LIMIT) as connection:
                server.stop()
                assert closed(connection)
            assert not listens(server.port)
            server.start()
            assert listens(server.port)
        mine = processes_in(tmp_path)
    assert mine
    assert not listens(server.port)
    assert not processes_in(tmp_path)


@pytest.mark.asyncio
async def test_nats_keeps_its_streams(tmp_path: Path) -> None:
    with Nats(tmp_path / "nats") as server:
        async with await nats.connect(server.url) as client:
            await client.jetstream().add_stream(name="orders", subjects=["orders"])
            await client.jetstream().publish("orders", b"paid")
        server.restart()
        async with await nats.connect(server.url) as client:
            assert (await client.jetstream().get_last_msg("orders", "orders")).data == b"paid"


@pytest.mark.slow
@pytest.mark.asyncio
async def test_rabbitmq_keeps_its_durable_queues(own_rabbitmq: RabbitMQ) -> None:
    message = aio_pika.Message(b"paid", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
    async with await aio_pika.connect(own_rabbitmq.url) as client:
        channel = await client.channel()
        queue = await channel.declare_queue("kept", durable=True)
        await channel.default_exchange.publish(message, queue.name)
    own_rabbitmq.restart()
    async with await aio_pika.connect(own_rabbitmq.url) as client:
        queue = await (await client.channel()).get_queue("kept")
        assert (await queue.get(timeout=STOP_LIMIT)).body == b"paid"


@pytest.mark.slow
def test_rabbitmq_drops_its_connections_and_goes_on(own_rabbitmq: RabbitMQ) -> None:
    with socket.create_connection((HOST, own_rabbitmq.port), timeout=STOP_LIMIT) as connection:
        connection.sendall(b"AMQP\0\0\x09\1")
        assert connection.recv(1)
        own_rabbitmq.drop()
        assert closed(connection)
    assert listens(own_rabbitmq.port)


@pytest.mark.parametrize("kind", [Valkey, Nats, Mosquitto, Kafka, RabbitMQ])
def test_a_missing_broker_is_told_and_fails_where_nobody_would_see_that(
    kind: type[Broker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "_program", lambda _: None)
    monkeypatch.delenv(kind.variable, raising=False)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=kind.install):
        kind(tmp_path)
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match=kind.install):
        kind(tmp_path)
    monkeypatch.setenv(kind.variable, f"{kind.scheme}://elsewhere")
    with pytest.raises(pytest.skip.Exception, match="running server"):
        kind(tmp_path)


def listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=STOP_LIMIT).close()
    except ConnectionRefusedError:
        return False
    return True


def closed(connection: socket.socket) -> bool:
    """Read to the end; TimeoutError where there is none."""
    try:
        while connection.recv(65_536):
            pass
    except ConnectionResetError:
        pass
    return True


def processes_in(folder: Path) -> set[int]:
    """The processes that run in a folder."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside = Path(os.readlink(process / "cwd")).is_relative_to(folder)
        except OSError:
            continue
        if inside:
            found.add(int(process.name))
    return found
