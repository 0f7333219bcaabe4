"""Brokers for all tests of their transports, and one of its own for each test that restarts it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from tests.brokers import Kafka, Mosquitto, Nats, RabbitMQ, Valkey, broker_url, own, redis_url


@pytest.fixture(scope="session")
def _redis() -> Iterator[str]:
    with redis_url() as url:
        yield url


@pytest_asyncio.fixture
async def foreign(_redis: str) -> AsyncIterator[Redis]:
    """A client of Redis that knows nothing of the toolkit; its database is empty."""
    async with Redis.from_url(_redis) as client:
        await client.flushdb()
        yield client


@pytest.fixture
def redis(_redis: str, foreign: Redis) -> str:
    """The URL of a Redis; its database is empty."""
    return _redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Valkey]:
    """A Redis that this test may stop and start."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture(scope="session")
def nats_url() -> Iterator[str]:
    """The URL of a NATS with JetStream."""
    with broker_url(Nats) as url:
        yield url


@pytest.fixture(scope="session")
def nats_mqtt_url() -> Iterator[str]:
    """The URL of NATS's listener for MQTT 3.1.1."""
    with own(Nats) as server:
        yield server.mqtt_url


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[Nats]:
    """A NATS that this test may stop and start."""
    with Nats(tmp_path / "nats") as server:
        yield server


@pytest.fixture(scope="session")
def mqtt_url() -> Iterator[str]:
    """The URL of an MQTT broker that knows MQTT 5."""
    with broker_url(Mosquitto) as url:
        yield url


@pytest.fixture
def own_mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """An MQTT broker that this test may stop and start."""
    with Mosquitto(tmp_path / "mosquitto") as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_url() -> Iterator[str]:
    """The URL of a RabbitMQ."""
    with broker_url(RabbitMQ) as url:
        yield url


@pytest.fixture(scope="session")
def _own_rabbitmq() -> Iterator[RabbitMQ]:
    with own(RabbitMQ) as server:
        yield server


@pytest.fixture
def own_rabbitmq(_own_rabbitmq: RabbitMQ) -> Iterator[RabbitMQ]:
    """A RabbitMQ that this test may stop and start; tests share it one after another, with its queues."""
    yield _own_rabbitmq
    _own_rabbitmq.start()


@pytest.fixture(scope="session")
def kafka_url() -> Iterator[str]:
    """The URL of a Kafka."""
    with broker_url(Kafka) as url:
        yield url


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[Kafka]:
    """A Kafka that this test may stop and start."""
    with Kafka(tmp_path / "kafka") as server:
        yield server
