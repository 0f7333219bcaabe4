"""A Redis for all tests of its transports, and one of its own for each test that restarts it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from tests.valkey import Valkey, redis_url


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
