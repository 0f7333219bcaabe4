"""Instances that speak HTTP, called by a client of one's own: the example of the documentation, run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

PATIENCE = 10
EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    sys.modules.pop("search", None)


class Instance:
    """An HTTP server that answers its number, with whatever status it is told."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.status = 200
        self.asked = 0
        self._server: asyncio.Server | None = None
        self._peers: set[asyncio.StreamWriter] = set()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for peer in self._peers:
            peer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peers.add(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.asked += 1
                body = str(self.number).encode()
                head = f"HTTP/1.1 {self.status} Whatever\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._peers.discard(writer)
            writer.close()


@asynccontextmanager
async def searching() -> AsyncIterator[tuple[Any, list[Instance]]]:
    """Serve two instances, and give what calls them."""
    from search import Search  # type: ignore[import-not-found]

    async with AsyncExitStack() as stack, asyncio.timeout(PATIENCE):
        instances = [Instance(number) for number in range(2)]
        for instance in instances:
            await instance.start()
            stack.push_async_callback(instance.stop)
        search = Search(*(instance.url for instance in instances))
        stack.push_async_callback(search.http.aclose)
        yield search, instances


@pytest.mark.asyncio
async def test_all_are_asked() -> None:
    async with searching() as (search, _):
        assert {await search.find("tea") for _ in range(50)} == {0, 1}


@pytest.mark.asyncio
async def test_one_that_answers_with_errors_of_its_own_is_seldom_asked() -> None:
    async with searching() as (search, instances):
        instances[0].status = 503
        answers = {await search.find("tea") for _ in range(50)}

        assert answers == {1}
        assert 0 < instances[0].asked <= 5


@pytest.mark.asyncio
async def test_errors_of_the_caller_leave_nobody_out() -> None:
    async with searching() as (search, instances):
        for instance in instances:
            instance.status = 404
        for _ in range(50):
            with pytest.raises(httpx.HTTPStatusError):
                await search.find("tea")

        assert search.balancer.out == []


@pytest.mark.asyncio
async def test_one_that_goes_costs_nobody_an_answer_and_is_asked_again_when_it_is_back() -> None:
    async with searching() as (search, instances):
        both = {await search.find("tea") for _ in range(50)}
        await instances[0].stop()
        one = {await search.find("tea") for _ in range(50)}
        await instances[0].start()
        await instances[1].stop()
        other = {await search.find("tea") for _ in range(50)}

        assert (both, one, other) == ({0, 1}, {1}, {0})


@pytest.mark.asyncio
async def test_where_nobody_is_there_it_is_told() -> None:
    async with searching() as (search, instances):
        for instance in instances:
            await instance.stop()
        with pytest.raises(LookupError):
            await search.find("tea")
