"""Where a broker has patterns of its own for many names, NestJS and ourselves hear by them alike, whoever speaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from microservices import RpcContext, message_pattern
from microservices.client import Client
from tests.interop.links import Link, for_nest, place
from tests.interop.nest import VERSIONS, Answer, NestClient, nest_client, nest_server
from tests.interop.ours import OurServer, our_client, our_server

SEPARATORS = {"redis": ".", "nats": ".", "mqtt": "/", "amqp": "."}
ONE_WORD = {"redis": ".*", "nats": ".*", "mqtt": "/+", "amqp": ".*"}
LINKS = [Link(scheme, version) for scheme in SEPARATORS for version in VERSIONS]
WAIT = 5

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
]


@pytest.fixture(scope="class", params=LINKS, ids=str)
def link(request: pytest.FixtureRequest) -> Link:
    """A transport that has wildcards, and a version of NestJS."""
    return request.param


@pytest.fixture(scope="class")
def url(link: Link, node_modules: None, rabbitmq: str) -> Iterator[str]:
    """Where both sides meet; on RabbitMQ that is a topic exchange, named as the queue."""
    with ExitStack() as stack:
        found = stack.enter_context(place(link.scheme, rabbitmq))
        match link.scheme:
            case "redis":
                yield f"{found}?wildcards=true"
            case "amqp":
                yield f"{found}?wildcards=true&auto_delete=true&queue=wildcards-{uuid4().hex}"
            case _:
                yield found


def options(link: Link, url: str) -> dict[str, Any]:
    """Return what NestJS is told beside the URL."""
    match link.scheme:
        case "redis":
            return {"wildcards": True}
        case "amqp":
            queue = url.partition("queue=")[2]
            return {"wildcards": True, "queue": queue, "queueOptions": {"autoDelete": True}}
        case _:
            return {}


def named(link: Link, *words: str) -> str:
    """Return a name of several words."""
    return SEPARATORS[link.scheme].join(words)


# NestJS calls us


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def ours(link: Link, url: str) -> AsyncIterator[OurServer]:
    """Our server, which is asked and hears by wildcards, too."""

    @message_pattern(f"asked{ONE_WORD[link.scheme]}")
    async def answer_asked(data: Any, context: RpcContext) -> dict[str, Any]:
        return {"channel": context.channel, "data": data}

    async with our_server(url, answer_asked, wildcard=f"logged{ONE_WORD[link.scheme]}") as ours:
        yield ours


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def nest(link: Link, url: str, ours: OurServer) -> AsyncIterator[NestClient]:
    """NestJS's client of our server."""
    async with nest_client(for_nest(url), version=link.version, **options(link, url)) as client:
        yield client


class TestNestCallsUs:
    @pytest.mark.case("wildcards: event")
    async def test_our_wildcard_hears_an_event_of_nest(self, link: Link, nest: NestClient, ours: OurServer) -> None:
        for words in (("logged", "a", "b"), ("logged",), ("unlogged", "disk")):
            await nest.emit(named(link, *words), "it fits no pattern")
        answer = await nest.emit(named(link, "logged", "disk"), {"text": "é😀"})
        heard = await asyncio.wait_for(ours.heard.get(), WAIT)
        await nest.send("echo", "all that was sent before has arrived")

        assert answer.error is None
        if link.scheme == "redis" and heard.channel == "logged.a.b":
            heard = await asyncio.wait_for(ours.heard.get(), WAIT)  # its star goes over dots
        assert (heard.channel, heard.data) == (named(link, "logged", "disk"), {"text": "é😀"})
        assert heard.pattern == f"logged{ONE_WORD[link.scheme]}"
        assert ours.heard.empty()

    @pytest.mark.case("wildcards: request")
    async def test_our_wildcard_answers_a_request_of_nest(self, link: Link, nest: NestClient) -> None:
        names = [named(link, "asked", word) for word in ("a", "b")]

        answers = await asyncio.gather(*(nest.send(name, {"n": name}) for name in names))

        assert answers == [Answer([{"channel": name, "data": {"n": name}}]) for name in names]

    @pytest.mark.case("wildcards: plain patterns beside them")
    async def test_nest_still_finds_our_other_handlers(self, nest: NestClient, ours: OurServer) -> None:
        total = await nest.send({"cmd": "sum"}, [1, 2, 3.5])
        streamed = await nest.send("stream", {"count": 3})
        # On RabbitMQ it would not find its own handler, either, with the keys in another order than of routes.
        await nest.emit({"event": "order.placed", "version": 2}, 5)
        heard = await asyncio.wait_for(ours.heard.get(), WAIT)

        assert (total, streamed) == (Answer([6.5]), Answer([0, 1, 2]))
        assert (heard.pattern, heard.data) == ('{"event":"order.placed","version":2}', 5)


# We call NestJS


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def client(link: Link, url: str) -> AsyncIterator[Client]:
    """Our client of NestJS's server, which is asked and hears by wildcards, too."""
    async with (
        nest_server(for_nest(url), version=link.version, **options(link, url)),
        our_client(url) as client,
    ):
        yield client


class TestWeCallNest:
    @pytest.mark.case("wildcards: event")
    async def test_a_wildcard_of_nest_hears_our_event(self, link: Link, client: Client) -> None:
        channel, mark = named(link, "logged", "disk"), uuid4().hex

        await client.emit(channel, {"mark": mark})

        async with asyncio.timeout(WAIT):
            while {"channel": channel, "data": {"mark": mark}} not in await client.send("notes", {}):
                pass

    @pytest.mark.case("wildcards: request")
    async def test_a_wildcard_of_nest_answers_our_request(self, link: Link, client: Client) -> None:
        if link == ("redis", "nest11"):
            pytest.skip("NestJS 11 publishes the answer on the pattern's channel, where nobody listens")
        names = [named(link, "asked", word) for word in ("a", "b")]

        answers = await asyncio.gather(*(client.send(name, {"n": name}) for name in names))

        assert answers == [{"channel": name, "data": {"n": name}} for name in names]

    @pytest.mark.case("wildcards: plain patterns beside them")
    async def test_we_still_find_the_other_handlers_of_nest(self, client: Client) -> None:
        total = await client.send({"cmd": "sum"}, [1, 2, 3.5])
        streamed = [value async for value in client.stream("stream", {"count": 3})]

        assert (total, streamed) == (6.5, [0, 1, 2])
