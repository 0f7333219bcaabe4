"""NestJS and ourselves, each as a server and as a client, alive for the whole session."""

import os
from collections.abc import AsyncIterator, Generator, Iterator

import pytest
import pytest_asyncio

from microservices.client import Client
from tests.brokers import RabbitMQ, broker_url
from tests.interop.nest import NestClient, free_port, install, nest_client, nest_server
from tests.interop.ours import OurServer, our_client, our_server
from tests.interop.table import Table


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
    async with nest_server(f"tcp://127.0.0.1:{port}"):
        yield port


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def ours(node_modules: None) -> AsyncIterator[OurServer]:
    """Our server."""
    async with our_server(f"tcp://127.0.0.1:{free_port()}") as ours:
        yield ours


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nest(ours: OurServer) -> AsyncIterator[NestClient]:
    """NestJS's client of our server."""
    async with nest_client(f"tcp://127.0.0.1:{ours.port}") as client:
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def client(nest_port: int) -> AsyncIterator[Client]:
    """Our client of NestJS's server."""
    async with our_client(f"tcp://127.0.0.1:{nest_port}") as client:
        yield client


@pytest.fixture(scope="session")
def rabbitmq(node_modules: None) -> Iterator[str]:
    """The URL of a RabbitMQ."""
    with broker_url(RabbitMQ) as url:
        yield url


# What the whole run says of NestJS and us

_table = Table()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note the outcome of each case."""
    report = yield
    _table.note(item, report)
    return report


def pytest_sessionfinish() -> None:
    """Write it down."""
    _table.write()
