"""What only Kafka has: groups of servers that share partitions, clients with partitions of their own, and keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from microservices import RpcContext, message_pattern
from microservices.client import Client
from tests.brokers import Kafka, own
from tests.interop.groups import ALIKE, COUNT, GROUP, Group
from tests.interop.links import Link
from tests.interop.nest import VERSIONS, Answer, NestClient, nest_client, nest_server
from tests.interop.ours import our_client, our_server

REPLIES = ("echo", "who", "notes", "key")
WAIT = 10

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
]


class Clients(NamedTuple):
    """Two clients of NestJS and two of ours, at the same time."""

    nests: list[NestClient]
    ours: list[Client]


@pytest.fixture(scope="class", params=[Link("kafka", version) for version in VERSIONS], ids=str)
def link(request: pytest.FixtureRequest, node_modules: None) -> Link:
    """A version of NestJS, over Kafka."""
    return request.param


@pytest.fixture(scope="class")
def url(link: Link) -> Iterator[str]:
    """A Kafka of its own."""
    with own(Kafka) as broker:
        yield broker.url


@message_pattern("key")
async def tell_key(data: Any, context: RpcContext) -> str:
    return context.native.key.decode()


async def enter_clients(stack: AsyncExitStack, link: Link, url: str) -> Clients:
    """Start them; those of NestJS need a group each, where a topic of answers has one partition."""
    peers = (
        nest_client(url, version=link.version, replies=REPLIES, consumer={"groupId": f"caller-{n}"}) for n in (1, 2)
    )
    nests = await asyncio.gather(*map(stack.enter_async_context, peers))
    ours = [await stack.enter_async_context(our_client(url)) for _ in range(2)]
    return Clients(nests, ours)


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def calling_us(link: Link, url: str) -> AsyncIterator[tuple[Group, Clients]]:
    """Two servers of ours in one group, and clients."""
    group = Group()
    async with AsyncExitStack() as stack:
        servers = [
            our_server(f"{url}?partitions=2", *group.handlers(name), tell_key, name=GROUP) for name in ("a", "b")
        ]
        *group.ours, clients = await asyncio.gather(
            *map(stack.enter_async_context, servers), enter_clients(stack, link, url)
        )
        yield group, clients


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def calling_nest(link: Link, url: str) -> AsyncIterator[tuple[Group, Clients]]:
    """Two servers of NestJS's in one group, and clients."""
    # From the beginning: else what comes while the second of them joins the group is lost to both.
    told = {"version": link.version, "consumer": {"groupId": GROUP}, "subscribe": {"fromBeginning": True}}
    async with AsyncExitStack() as stack:
        servers = (nest_server(url, name=name, **told) for name in ("a", "b"))
        *_, clients = await asyncio.gather(*map(stack.enter_async_context, servers), enter_clients(stack, link, url))
        yield Group(), clients


async def ask_all(clients: Clients) -> None:
    """Let all clients ask at the same time, and fail unless each gets the answers to its own questions."""

    def asked(kind: str, number: int) -> list[dict[str, Any]]:
        return [{"asks": f"{kind} {number}", "n": n} for n in range(20)]

    async def by_nest(number: int, client: NestClient) -> None:
        answers = await asyncio.gather(*(client.send("echo", each) for each in asked("nest", number)))
        assert answers == [Answer([each]) for each in asked("nest", number)]

    async def by_us(number: int, client: Client) -> None:
        answers = await asyncio.gather(*(client.send("echo", each, timeout=WAIT) for each in asked("ours", number)))
        assert answers == asked("ours", number)

    await asyncio.gather(
        *(by_nest(*each) for each in enumerate(clients.nests)), *(by_us(*each) for each in enumerate(clients.ours))
    )


class TestNestCallsUs:
    @pytest.mark.case("several clients at once, NestJS's and ours")
    async def test_each_client_gets_our_answers_to_its_own_requests(self, calling_us: tuple[Group, Clients]) -> None:
        await ask_all(calling_us[1])

    @pytest.mark.case(ALIKE)
    async def test_each_message_of_nest_goes_to_one_of_our_group(self, calling_us: tuple[Group, Clients]) -> None:
        group, ((nest, _), _) = calling_us
        answers = await asyncio.gather(*(nest.send("who", {}) for _ in range(COUNT)))
        await asyncio.gather(*(nest.emit("noted", {"n": n}) for n in range(COUNT)))

        async def notes() -> Any:
            return (await nest.send("notes", {})).values[0]

        heard = await group.heard(notes)

        assert {answer.error for answer in answers} == {None}
        assert group.once([value for answer in answers for value in answer.values], heard)

    @pytest.mark.case("keys keep an order")
    async def test_what_nest_sends_with_one_key_is_heard_in_its_order(self, calling_us: tuple[Group, Clients]) -> None:
        group, ((nest, _), _) = calling_us
        told = await nest.send("key", {}, record={"key": "user-1", "headers": {}})
        for n in range(10):
            await nest.emit("noted", {"n": n}, record={"key": "user-1", "headers": {}})
        heard: list[tuple[int, int]] = []
        async with asyncio.timeout(WAIT):
            while len(heard) < 10:
                await asyncio.sleep(0.01)
                for number, server in enumerate(group.ours):
                    heard += [(number, server.heard.get_nowait().data["n"]) for _ in range(server.heard.qsize())]

        assert told == Answer(["user-1"])
        assert [n for _, n in heard] == list(range(10))
        assert len({number for number, _ in heard}) == 1  # a key has one partition, and that one server


class TestWeCallNest:
    @pytest.mark.case("several clients at once, NestJS's and ours")
    async def test_each_client_gets_nests_answers_to_its_own_requests(
        self, calling_nest: tuple[Group, Clients]
    ) -> None:
        await ask_all(calling_nest[1])

    @pytest.mark.case(ALIKE)
    async def test_each_message_of_ours_goes_to_one_of_nests_group(self, calling_nest: tuple[Group, Clients]) -> None:
        group, (_, (client, _)) = calling_nest
        answers = await asyncio.gather(*(client.send("who", {}, timeout=WAIT) for _ in range(COUNT)))
        await asyncio.gather(*(client.emit("noted", {"n": n}) for n in range(COUNT)))
        # Dealt out in turn, `noted` and `notes` come to the same server, as `who` stands between them.
        heard = await group.heard(lambda: client.send("notes", {}))

        assert group.once(answers, heard)
