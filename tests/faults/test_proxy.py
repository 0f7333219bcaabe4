"""The proxy does what it says: otherwise the faults that it makes prove nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.proxy import FaultProxy, proxy_to

pytestmark = pytest.mark.asyncio
WAIT = 5


@pytest_asyncio.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    """A proxy before a server that echoes."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1024):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with proxy_to(server.sockets[0].getsockname()[1]) as proxy, asyncio.timeout(WAIT):
        yield proxy
    server.close()


async def connect(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def echoed(proxy: FaultProxy, data: bytes) -> bytes:
    """Return what comes back of `data` until the connection ends."""
    reader, writer = await connect(proxy)
    writer.write(data)
    writer.write_eof()
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_bytes_go_through_and_the_end_as_well(proxy: FaultProxy) -> None:
    assert await echoed(proxy, b"hello" * 100_000) == b"hello" * 100_000


async def test_latency_is_that_of_a_way_and_not_of_each_chunk(proxy: FaultProxy) -> None:
    proxy.faults.latency = 0.05
    loop = asyncio.get_running_loop()
    began = loop.time()

    assert await echoed(proxy, b"x" * 20_000) == b"x" * 20_000  # twenty chunks of the server's

    assert 0.1 <= loop.time() - began < 1


async def test_bandwidth_is_bytes_a_second(proxy: FaultProxy) -> None:
    proxy.faults.bandwidth, proxy.faults.slice = 100_000, 1000
    loop = asyncio.get_running_loop()
    began = loop.time()

    await echoed(proxy, b"x" * 20_000)

    assert loop.time() - began >= 0.2


async def test_slices_arrive_one_by_one(proxy: FaultProxy) -> None:
    proxy.faults.slice = 3
    reader, writer = await connect(proxy)
    writer.write(b"abcdefgh")

    assert await reader.readexactly(8) == b"abcdefgh"
    writer.close()


async def test_a_black_hole_takes_and_gives_nothing(proxy: FaultProxy) -> None:
    reader, writer = await connect(proxy)
    writer.write(b"a")
    assert await reader.read(1) == b"a"

    proxy.faults.black_hole = True
    writer.write(b"b")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.1)
    writer.close()


async def test_connections_are_cut_after_their_bytes(proxy: FaultProxy) -> None:
    proxy.faults.cut_after = lambda: 7
    reader, writer = await connect(proxy)
    writer.write(b"abcde")

    assert await reader.readexactly(2) == b"ab"  # seven in both directions
    with pytest.raises(ConnectionResetError):
        await reader.read()
    assert proxy.cuts == 1
    writer.close()


async def test_open_connections_can_be_reset(proxy: FaultProxy) -> None:
    reader, writer = await connect(proxy)
    writer.write(b"a")
    await reader.read(1)

    proxy.reset()

    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_new_connections_can_be_refused(proxy: FaultProxy) -> None:
    proxy.faults.refuse = True
    reader, writer = await connect(proxy)

    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
