"""Servers that share their work take each message once, whether they are NestJS's, ours, or one of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from tests.interop.groups import ALIKE, COUNT, GROUP, Group
from tests.interop.links import Link, for_nest, place
from tests.interop.nest import VERSIONS, nest_client, nest_server
from tests.interop.ours import our_client, our_server

LINKS = [Link(scheme, version) for scheme in ("nats", "mqtt", "amqp") for version in VERSIONS]
MIXED = "a group of NestJS's server and ours shares requests and events"

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
    pytest.mark.parametrize("link", LINKS, ids=str),
]


@pytest.fixture
def url(link: Link, node_modules: None, rabbitmq: str) -> Iterator[str]:
    """Where all meet, with what makes our servers a group: on NATS that is their name."""
    with ExitStack() as stack:
        found = stack.enter_context(place(link.scheme, rabbitmq))
        told = {"nats": "", "mqtt": f"?share={GROUP}", "amqp": f"?queue=group-{uuid4().hex}&auto_delete=true"}
        yield f"{found}{told[link.scheme]}"


def options(link: Link, url: str, *, serving: bool) -> dict[str, Any]:
    """Return what NestJS is told beside the URL."""
    match link.scheme:
        case "nats":
            return {"queue": GROUP} if serving else {}
        case "mqtt":
            return {"share": GROUP} if serving else {}
        case _:
            queue = url.partition("queue=")[2].partition("&")[0]
            return {"queue": queue, "queueOptions": {"autoDelete": True}}


@asynccontextmanager
async def grouped(link: Link, url: str, members: Sequence[str]) -> AsyncIterator[Group]:
    """Run two servers, each "nest" or "ours"."""
    group = Group()
    told = options(link, url, serving=True)
    async with AsyncExitStack() as stack:
        nests = []
        for name, kind in zip("ab", members, strict=True):
            if kind == "nest":
                nests.append(nest_server(for_nest(url), version=link.version, name=name, **told))
            else:
                server = our_server(url, *group.handlers(name), name=GROUP)
                group.ours.append(await stack.enter_async_context(server))
        await asyncio.gather(*map(stack.enter_async_context, nests))
        yield group


class TestNestCallsUs:
    @pytest.mark.parametrize(
        "members",
        [
            pytest.param(["ours", "ours"], marks=pytest.mark.case(ALIKE)),
            pytest.param(["nest", "ours"], marks=pytest.mark.case(MIXED)),
        ],
        ids="-".join,
    )
    async def test_each_message_of_nest_goes_to_one_of_the_group(
        self, link: Link, url: str, members: list[str]
    ) -> None:
        asking = nest_client(for_nest(url), version=link.version, **options(link, url, serving=False))
        async with grouped(link, url, members) as group, asking as nest:
            answers = await asyncio.gather(*(nest.send("who", {}) for _ in range(COUNT)))
            await asyncio.gather(*(nest.emit("noted", {"n": n}) for n in range(COUNT)))

            async def notes() -> Any:
                return (await nest.send("notes", {})).values[0]

            heard = await group.heard(notes)

        assert {answer.error for answer in answers} == {None}
        assert group.shared([value for answer in answers for value in answer.values], heard)


class TestWeCallNest:
    @pytest.mark.parametrize(
        "members",
        [
            pytest.param(["nest", "nest"], marks=pytest.mark.case(ALIKE)),
            pytest.param(["nest", "ours"], marks=pytest.mark.case(MIXED)),
        ],
        ids="-".join,
    )
    async def test_each_message_of_ours_goes_to_one_of_the_group(
        self, link: Link, url: str, members: list[str]
    ) -> None:
        async with grouped(link, url, members) as group, our_client(url) as client:
            answers = await asyncio.gather(*(client.send("who", {}) for _ in range(COUNT)))
            await asyncio.gather(*(client.emit("noted", {"n": n}) for n in range(COUNT)))
            heard = await group.heard(lambda: client.send("notes", {}))

        assert group.shared(answers, heard)
