"""NestJS and ourselves, each as a server and as a client, alive for the whole session."""

import os
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from microservices.client import Client
from tests.interop.nest import NestClient, free_port, install, nest_client, nest_server
from tests.interop.ours import OurServer, our_client, our_server
from tests.valkey import redis_url


@pytest.fixture(scope="session")
def node_modules() -> None:
    """NestJS for Node; without it the tests are skipped, or fail where nobody would see that."""
    missing = install()
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing, pytrace=False)
    if missing:
        pytest.skip(missing)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nest_port(node_modules: None) -> AsyncIterator[int]:
    """The port of NestJS's server."""
    port = free_port()
    async with nest_server(port):
        yield port


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def ours(node_modules: None) -> AsyncIterator[OurServer]:
    """Our server."""
    async with our_server(free_port()) as ours:
        yield ours


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nest(ours: OurServer) -> AsyncIterator[NestClient]:
    """NestJS's client of our server."""
    async with nest_client(ours.port) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def client(nest_port: int) -> AsyncIterator[Client]:
    """Our client of NestJS's server."""
    async with our_client(nest_port) as client:
        yield client


# The same over Redis


@pytest.fixture(scope="session")
def redis_port(node_modules: None) -> Iterator[int]:
    """The port of a Redis on loopback."""
    with redis_url() as url:
        redis = urlsplit(url)
        if redis.password or redis.hostname not in ("127.0.0.1", "localhost"):
            pytest.skip("REDIS_URL names a server elsewhere, or one with a password")
        yield redis.port or 6379
