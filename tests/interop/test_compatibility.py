"""Over every transport, NestJS 11 and 12 and ourselves understand each other, whoever calls whom.

What passes here is the compatibility statement: docs/nestjs-compatibility.md is written by the run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from microservices import DeadlineExceeded, NoHandler, RpcException, Unavailable
from microservices.client import Client
from microservices.packets import route
from tests.interop.links import LINKS, ON_KAFKA, REPLIES, Link, for_nest, place
from tests.interop.nest import Answer, NestClient, nest_client, nest_server
from tests.interop.ours import OurServer, our_client, our_server

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
]

LARGE = "é😀x" * 75_000  # 525,000 bytes
NO_HANDLER = "There is no matching message handler defined in the remote service."
WAIT = 5


@pytest.fixture(scope="class", params=LINKS, ids=str)
def link(request: pytest.FixtureRequest) -> Link:
    """A transport and a version of NestJS."""
    return request.param


@pytest.fixture(scope="class")
def url(link: Link, node_modules: None, rabbitmq: str) -> Iterator[str]:
    """Where both sides meet."""
    with ExitStack() as stack:
        found = stack.enter_context(place(link.scheme, rabbitmq))
        queue = f"?queue=compatibility-{uuid4().hex}&auto_delete=true" if link.scheme == "amqp" else ""
        version = "?version=5" if link.scheme == "mqtt" else ""
        yield f"{found}{queue}{version}"


def options(link: Link, url: str) -> dict[str, Any]:
    """Return what NestJS is told beside the URL."""
    match link.scheme:
        case "amqp":
            queue = url.partition("queue=")[2].partition("&")[0]
            return {"queue": queue, "queueOptions": {"autoDelete": True}}
        case "mqtt":
            return {"protocolVersion": 5, "subscribeOptions": {"qos": 1}}
        case _:
            return {}


# NestJS calls us


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def ours(url: str) -> AsyncIterator[OurServer]:
    """Our server."""
    async with our_server(url) as ours:
        yield ours


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def nest(link: Link, url: str, ours: OurServer) -> AsyncIterator[NestClient]:
    """NestJS's client of our server."""
    replies = REPLIES if link.scheme == "kafka" else ()
    async with nest_client(for_nest(url), version=link.version, replies=replies, **options(link, url)) as client:
        yield client


def to_us(link: Link, pattern: Any) -> Any:
    """Return what NestJS calls a pattern of ours. On Kafka an object has no name there, but ours has one."""
    if link.scheme != "kafka" or isinstance(pattern, str):
        return pattern
    if isinstance(pattern, dict) and list(pattern) == ["cmd"]:
        return pattern["cmd"]
    return pytest.skip("an object is no topic")


class TestNestCallsUs:
    @pytest.mark.case("one value")
    @pytest.mark.parametrize(
        ("pattern", "data", "value"),
        [
            ({"cmd": "sum"}, [1, 2, 3.5], 6.5),
            ("echo", {"text": "é😀\u2028", "list": [1, None, True]}, {"text": "é😀\u2028", "list": [1, None, True]}),
            ("second", {}, "second"),
        ],
    )
    async def test_nest_gets_one_value(self, link: Link, nest: NestClient, pattern: Any, data: Any, value: Any) -> None:
        answer = await nest.send(to_us(link, pattern), data)

        assert answer == Answer([link.scalar(value)])

    @pytest.mark.case("patterns that are numbers and objects")
    @pytest.mark.parametrize(("pattern", "name"), [(5, "5"), ({"b": 1, "a": "x"}, '{"a":"x","b":1}')])
    async def test_nest_finds_our_handler_by_any_pattern(
        self, link: Link, nest: NestClient, pattern: Any, name: str
    ) -> None:
        answer = await nest.send(to_us(link, pattern), {})

        assert answer == Answer([name])

    @pytest.mark.case("null")
    async def test_nest_gets_null(self, link: Link, nest: NestClient) -> None:
        answer = await nest.send(to_us(link, {"cmd": "null"}), {})

        assert answer == Answer([None])

    @pytest.mark.case("no value")
    async def test_nest_gets_no_value(self, link: Link, nest: NestClient) -> None:
        answer = await nest.send("nothing", {})

        assert answer == Answer(link.nothing)

    @pytest.mark.case("large payload, beyond ASCII")
    async def test_a_large_payload_goes_to_us_and_back(self, nest: NestClient) -> None:
        answer = await nest.send("echo", {"text": LARGE})

        assert answer == Answer([{"text": LARGE}])

    @pytest.mark.case("200 requests at once")
    async def test_nest_gets_each_answer_for_its_own_request(self, nest: NestClient) -> None:
        answer = await nest.send_many("echo", 200)

        assert answer == Answer([{"n": n, "text": f"é😀{n}"} for n in range(200)])

    @pytest.mark.case("stream")
    @pytest.mark.parametrize("count", [0, 1, 3, 1000])
    async def test_nest_gets_every_value_in_order(self, link: Link, nest: NestClient, count: int) -> None:
        answer = await nest.send("stream", {"count": count})

        assert answer == Answer([link.scalar(number) for number in range(count)] or link.nothing)

    @pytest.mark.case("errors: text, object, unexpected")
    @pytest.mark.parametrize(
        ("pattern", "error"),
        [
            ("rpc-text", {"status": "error", "message": "boom"}),
            ("rpc-object", {"statusCode": 404, "code": "user-not-found", "message": "nf"}),
            ("unexpected", {"status": "error", "message": "Internal server error"}),
        ],
    )
    async def test_nest_gets_our_error_and_no_more_than_it(self, nest: NestClient, pattern: str, error: Any) -> None:
        answer = await nest.send(pattern, {})

        assert answer == Answer([], error)

    @pytest.mark.case("values, then an error")
    async def test_nest_gets_the_values_before_an_error(self, link: Link, nest: NestClient) -> None:
        answer = await nest.send("stream-then-error", {})

        assert answer == Answer([link.scalar(1)], {"status": "error", "message": "broken"})

    @pytest.mark.case("unknown pattern")
    async def test_nest_is_told_of_a_pattern_that_we_do_not_handle(self, link: Link, nest: NestClient) -> None:
        if link.scheme in ("redis", "mqtt", "kafka"):
            pytest.skip("NestJS waits for ever where nobody listens")
        answer = await nest.send("unknown", {})

        if link.scheme == "nats":
            assert "There are no subscribers listening to that message" in answer.error["message"]
        else:
            assert answer == Answer([], NO_HANDLER)

    @pytest.mark.case("event")
    @pytest.mark.parametrize("pattern", ["noted", {"version": 2, "event": "order.placed"}])
    async def test_our_handler_hears_an_event(
        self, link: Link, nest: NestClient, ours: OurServer, pattern: Any
    ) -> None:
        sent = {"text": "é😀", "mark": uuid4().hex}

        answer = await nest.emit(to_us(link, pattern), sent)
        heard = await asyncio.wait_for(ours.heard.get(), WAIT)

        assert (answer.error, heard.pattern, heard.data) == (None, route(pattern), sent)

    @pytest.mark.case("metadata and deadline of a packet")
    async def test_our_handler_is_told_metadata_and_keeps_the_deadline(self, link: Link, nest: NestClient) -> None:
        if link.version == "nest11":
            pytest.skip("NestJS 11 sends no metadata")
        if link.scheme == "kafka":
            pytest.skip("NestJS drops it on Kafka")
        told = await nest.send("metadata", {}, metadata={"tenant": "blüe"})
        late = await nest.send("slow", {"ms": 30_000}, metadata={"deadline": "50"})

        assert told.values[0]["tenant"] == "blüe"
        assert (late.values, late.error["code"]) == ([], "deadline-exceeded")

    @pytest.mark.case("record builder")
    async def test_our_handler_sees_what_a_record_builder_adds(self, link: Link, nest: NestClient) -> None:
        if link.scheme in ("tcp", "redis"):
            pytest.skip("it has no record builder")
        key = "userProperties" if link.scheme == "mqtt" else "headers"

        answer = await nest.send("headers", {}, record={key: {"x-version": "1.0"}})

        assert answer.values[0]["x-version"] == "1.0"


# We call NestJS


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def nest_serves(link: Link, url: str) -> AsyncIterator[None]:
    """NestJS's server."""
    async with nest_server(for_nest(url), version=link.version, **options(link, url)):
        yield


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def client(link: Link, url: str, nest_serves: None) -> AsyncIterator[Client]:
    """Our client of NestJS's server."""
    async with our_client(url) as client:
        yield client


def to_nest(link: Link, pattern: Any) -> Any:
    """Return what NestJS's server calls a pattern; on Kafka an object is no topic."""
    return ON_KAFKA.get(route(pattern) or "", pattern) if link.scheme == "kafka" else pattern


class TestWeCallNest:
    @pytest.mark.case("one value")
    @pytest.mark.parametrize(
        ("pattern", "data", "value"),
        [
            ({"cmd": "sum"}, [1, 2, 3.5], 6.5),
            ("echo", {"text": "é😀\u2028", "list": [1, None, True]}, {"text": "é😀\u2028", "list": [1, None, True]}),
            ("second", {}, "second"),
        ],
    )
    async def test_we_get_one_value(self, link: Link, client: Client, pattern: Any, data: Any, value: Any) -> None:
        answer = await client.send(to_nest(link, pattern), data)

        assert answer == link.scalar(value)

    @pytest.mark.case("patterns that are numbers and objects")
    @pytest.mark.parametrize("pattern", [5, {"b": 1, "a": "x"}])
    async def test_we_find_a_handler_of_nest_by_any_pattern(self, link: Link, client: Client, pattern: Any) -> None:
        if link.scheme == "kafka":
            pytest.skip("an object is no topic")
        answer = await client.send(pattern, {})

        # What it answers is the pattern as it came: raw, or the name of a channel made of it.
        assert answer == pattern or answer in (json.dumps(pattern, separators=(",", ":")), route(pattern))

    @pytest.mark.case("null")
    async def test_we_get_null(self, link: Link, client: Client) -> None:
        answer = await client.send(to_nest(link, {"cmd": "null"}), {})

        assert answer is None

    @pytest.mark.case("no value")
    async def test_we_get_no_value(self, link: Link, client: Client) -> None:
        values = [value async for value in client.stream("nothing", {})]

        assert values == link.nothing

    @pytest.mark.case("large payload, beyond ASCII")
    async def test_a_large_payload_goes_to_nest_and_back(self, client: Client) -> None:
        answer = await client.send("echo", {"text": LARGE})

        assert answer == {"text": LARGE}

    @pytest.mark.case("200 requests at once")
    async def test_we_get_each_answer_for_its_own_request(self, client: Client) -> None:
        requests = [{"n": n, "text": f"é😀{n}"} for n in range(200)]

        answers = await asyncio.gather(*(client.send("echo", request, timeout=10) for request in requests))

        assert answers == requests

    @pytest.mark.case("stream")
    @pytest.mark.parametrize("count", [0, 1, 3, 1000])
    async def test_we_get_every_value_in_order(self, link: Link, client: Client, count: int) -> None:
        if link == ("kafka", "nest11") and not count:
            pytest.skip("a handler of NestJS 11 whose Observable is empty stops its consumer for ever")
        values = [value async for value in client.stream("stream", {"count": count})]

        assert values == [link.scalar(number) for number in range(count)] or link.nothing

    @pytest.mark.case("errors: text, object, unexpected")
    @pytest.mark.parametrize(
        ("pattern", "status_code", "code", "message"),
        [
            ("rpc-text", 500, "rpc-error", "boom"),
            ("rpc-object", 404, "user-not-found", "nf"),
            ("unexpected", 500, "internal", "Internal server error"),
        ],
    )
    async def test_we_get_the_error_of_nest(
        self, client: Client, pattern: str, status_code: int, code: str, message: str
    ) -> None:
        with pytest.raises(RpcException) as caught:
            await client.send(pattern, {})

        assert (caught.value.status_code, caught.value.code, caught.value.message) == (status_code, code, message)

    @pytest.mark.case("values, then an error")
    async def test_we_get_the_values_before_an_error(self, link: Link, client: Client) -> None:
        values = client.stream("stream-then-error", {})

        first = await anext(values)

        assert first == link.scalar(1)
        with pytest.raises(RpcException, match="broken"):
            await anext(values)

    @pytest.mark.case("unknown pattern")
    async def test_we_are_told_of_a_pattern_that_nest_does_not_handle(self, link: Link, client: Client) -> None:
        told = {"tcp": NoHandler, "amqp": NoHandler, "redis": Unavailable, "nats": Unavailable}
        with pytest.raises(told.get(link.scheme, DeadlineExceeded)):
            await client.send("unknown", {}, timeout=WAIT if link.scheme in told else 0.5)

    @pytest.mark.case("event")
    @pytest.mark.parametrize(("pattern", "key"), [("noted", "note"), ("order_created", "order")])
    async def test_a_handler_of_nest_hears_our_event(self, client: Client, pattern: str, key: str) -> None:
        sent = {"text": "é😀", "mark": uuid4().hex}
        stored = {"order": sent} if key == "order" else sent

        await client.emit(pattern, sent)

        async with asyncio.timeout(WAIT):
            while stored not in await client.send("notes", {}):  # Nest may answer before it has heard
                pass

    @pytest.mark.case("metadata and deadline of a packet")
    async def test_nest_sees_our_metadata_and_the_milliseconds_left(self, link: Link, client: Client) -> None:
        if link.version == "nest11" or link.scheme not in ("tcp", "redis"):
            pytest.skip("its handlers are not told")
        seen = await client.send("metadata", {}, metadata={"tenant": "blüe"}, timeout=3)

        assert 0 < int(seen.pop("deadline")) <= 3000
        assert seen == {"tenant": "blüe"}

    @pytest.mark.case("record builder")
    async def test_a_handler_of_nest_sees_the_options_of_our_message(self, link: Link, client: Client) -> None:
        if link.scheme in ("tcp", "redis"):
            pytest.skip("it has no record builder")
        beside = {"headers": {"x-version": "1.0"}}
        if link.scheme == "amqp":
            beside |= {"priority": 3, "message_id": "m-1", "persistent": True}
        elif link.scheme == "mqtt":
            beside |= {"qos": 1}
        elif link.scheme == "kafka":
            beside |= {"key": "k-1"}

        seen = await client.send("headers", {}, options=beside)

        assert seen["headers"]["x-version"] == "1.0"
        if link.scheme == "amqp":
            assert (seen["priority"], seen["messageId"], seen["persistent"]) == (3, "m-1", True)
        elif link.scheme == "mqtt":
            assert seen["qos"] == 1
        elif link.scheme == "kafka":
            assert seen["messageKey"] == "k-1"
