"""Over gRPC, with one small service of all four kinds of calls, we and NestJS 11 and 12 do the same, both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from msgspec import Struct

from microservices import DeadlineExceeded, NoHandler, RpcContext, RpcException, grpc_method
from microservices.client import Client
from microservices.dispatcher import Dispatcher
from microservices.executor import Executor
from microservices.handlers import Handler
from microservices.stubs import GrpcServices, Stub
from microservices.transports import Address, protos
from microservices.transports.grpc import GrpcClient, GrpcServer
from tests.interop.links import Link
from tests.interop.nest import HERE, VERSIONS, Answer, NestClient, free_port, nest_client, nest_server

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
]

PROTOS = (str(HERE / "talk.proto"), str(HERE.parents[1] / "proto" / "orders.proto"))
TEXT = "é😀\u2028"
LARGE = "é😀x" * 75_000  # 525,000 bytes
TALK = "TalkService"


@pytest.fixture(scope="class", params=[Link("grpc", version) for version in VERSIONS], ids=str)
def link(request: pytest.FixtureRequest, node_modules: None) -> Link:
    """A version of NestJS, over gRPC."""
    return request.param


def at(port: int) -> Address:
    """Return an address on loopback."""
    return Address("grpc", "127.0.0.1", port, {"proto_path": list(PROTOS)})


def lines(*texts: str) -> list[dict[str, str]]:
    """Return what a talk is made of."""
    return [{"text": text} for text in texts]


# NestJS calls us


class Line(Struct):
    text: str = ""


class Limit(Struct):
    count: int = 0


class Summary(Struct):
    lines: int
    text: str


@grpc_method(TALK)
async def say(line: Line, context: RpcContext) -> Line:
    match line.text:
        case "broken":
            raise RpcException({"code": 3, "message": "broken"})
        case "text":
            raise RpcException("boom")
        case "bug":
            raise ValueError("secret")
        case "slow":
            await asyncio.sleep(30)
        case "metadata":
            return Line(context.metadata["trace-id"])
    return Line(f"re: {line.text}")


@grpc_method(TALK)
async def count(limit: Limit) -> AsyncIterator[Line]:
    for number in range(1, limit.count + 1):
        yield Line(str(number))


@grpc_method(TALK)
async def collect(given: AsyncIterator[Line]) -> Summary:
    texts = [line.text async for line in given]
    return Summary(len(texts), "".join(texts))


@grpc_method(TALK)
async def chat(given: AsyncIterator[Line]) -> AsyncIterator[Line]:
    async for line in given:
        if line.text == "broken":
            raise RpcException({"code": 3, "message": "broken"})
        yield Line(f"re: {line.text}")


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def nest(link: Link) -> AsyncIterator[NestClient]:
    """NestJS's ClientGrpc of our server."""
    executor = Executor(1)
    dispatcher = Dispatcher("talk", [Handler(function) for function in (say, count, collect, chat)], executor)
    server = GrpcServer(at(free_port()), dispatcher)
    await server.listen()
    try:
        async with nest_client(f"grpc://127.0.0.1:{server.port}", version=link.version) as client:
            yield client
    finally:
        await server.close(grace=0)
        executor.close()


class TestNestCallsUs:
    @pytest.mark.case("one value")
    @pytest.mark.parametrize("text", ["", TEXT])
    async def test_nest_gets_one_value(self, nest: NestClient, text: str) -> None:
        assert await nest.call(TALK, "say", {"text": text}) == Answer(lines(f"re: {text}"))

    @pytest.mark.case("large payload, beyond ASCII")
    async def test_a_large_payload_goes_to_us_and_back(self, nest: NestClient) -> None:
        assert await nest.call(TALK, "say", {"text": LARGE}) == Answer(lines(f"re: {LARGE}"))

    @pytest.mark.case("200 requests at once")
    async def test_nest_gets_each_answer_for_its_own_request(self, nest: NestClient) -> None:
        answers = await asyncio.gather(*(nest.call(TALK, "say", {"text": f"{n}"}) for n in range(200)))

        assert answers == [Answer(lines(f"re: {n}")) for n in range(200)]

    @pytest.mark.case("stream of answers")
    @pytest.mark.parametrize("number", [0, 1, 1000])
    async def test_nest_gets_every_value_in_order(self, nest: NestClient, number: int) -> None:
        answer = await nest.call(TALK, "count", {"count": number})

        assert answer == Answer(lines(*map(str, range(1, number + 1))))

    @pytest.mark.case("stream of requests")
    @pytest.mark.parametrize("number", [0, 1, 100])
    async def test_we_collect_what_nest_streams(self, nest: NestClient, number: int) -> None:
        texts = [f"é{n};" for n in range(number)]

        [summary] = (await nest.call_with_stream(TALK, "collect", lines(*texts))).values

        # proto-loader leaves out what is empty.
        assert (summary.get("lines", 0), summary.get("text", "")) == (number, "".join(texts))

    @pytest.mark.case("stream of both")
    async def test_we_answer_each_line_before_nest_says_the_next(self, nest: NestClient) -> None:
        answer = await nest.call_with_stream(TALK, "chat", lines("a", TEXT, "c"), pause=20)
        # The whole of it would take longer than its deadline of ten seconds.
        first = await nest.call_with_stream(TALK, "chat", lines(*"abc" * 20), pause=200, first=1)

        assert answer == Answer(lines("re: a", f"re: {TEXT}", "re: c"))
        assert first == Answer(lines("re: a"))

    @pytest.mark.case("errors: text, object with a code, unexpected")
    @pytest.mark.parametrize(
        ("text", "code", "details"),
        [("text", 2, "boom"), ("broken", 3, "broken"), ("bug", 13, "Internal server error")],
    )
    async def test_nest_gets_our_error_as_a_status(self, nest: NestClient, text: str, code: int, details: str) -> None:
        answer = await nest.call(TALK, "say", {"text": text})

        assert answer.values == []
        assert (answer.error["code"], answer.error["details"]) == (code, details)

    @pytest.mark.case("values, then an error")
    async def test_nest_gets_the_values_before_an_error(self, nest: NestClient) -> None:
        answer = await nest.call_with_stream(TALK, "chat", lines("a", "b", "broken", "c"), pause=20)

        assert answer.values == lines("re: a", "re: b")
        assert (answer.error["code"], answer.error["details"]) == (3, "broken")

    @pytest.mark.case("metadata")
    async def test_our_handler_is_told_nests_metadata(self, nest: NestClient) -> None:
        answer = await nest.call(TALK, "say", {"text": "metadata"}, metadata={"trace-id": "7"})

        assert answer == Answer(lines("7"))

    @pytest.mark.case("deadline")
    async def test_nests_deadline_ends_the_call(self, nest: NestClient) -> None:
        answer = await nest.call(TALK, "say", {"text": "slow"}, deadline=100)

        assert (answer.values, answer.error["code"]) == ([], 4)

    @pytest.mark.case("a method that is not served")
    async def test_nest_is_told_of_a_method_that_we_do_not_serve(self, nest: NestClient) -> None:
        answer = await nest.call("UsersService", "findOne", {"id": "1"})

        assert (answer.values, answer.error["code"]) == ([], 12)


# We call NestJS


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def client(link: Link) -> AsyncIterator[Client]:
    """Our client of NestJS's server."""
    port = free_port()
    async with nest_server(f"grpc://127.0.0.1:{port}", version=link.version):
        client = Client("talk", lambda: GrpcClient(at(port), "talk"))
        yield client
        await client.close()


@pytest.fixture(scope="class")
def talk(client: Client) -> Stub:
    """NestJS's service as an object."""
    return GrpcServices(client, protos.load(PROTOS)).service(TALK)


async def spoken(*texts: str) -> AsyncIterator[dict[str, str]]:
    """Stream lines."""
    for line in lines(*texts):
        yield line


class TestWeCallNest:
    @pytest.mark.case("one value")
    @pytest.mark.parametrize("text", ["", TEXT])
    async def test_we_get_one_value(self, talk: Stub, text: str) -> None:
        assert await talk.Say({"text": text}) == {"text": f"re: {text}"}

    @pytest.mark.case("large payload, beyond ASCII")
    async def test_a_large_payload_goes_to_nest_and_back(self, talk: Stub) -> None:
        assert await talk.Say({"text": LARGE}) == {"text": f"re: {LARGE}"}

    @pytest.mark.case("200 requests at once")
    async def test_we_get_each_answer_for_its_own_request(self, talk: Stub) -> None:
        answers = await asyncio.gather(*(talk.Say({"text": f"{n}"}, timeout=10) for n in range(200)))

        assert answers == lines(*(f"re: {n}" for n in range(200)))

    @pytest.mark.case("stream of answers")
    @pytest.mark.parametrize("number", [0, 1, 1000])
    async def test_we_get_every_value_in_order(self, talk: Stub, number: int) -> None:
        values = [line["text"] async for line in talk.Count({"count": number})]

        assert values == [str(n) for n in range(1, number + 1)]

    @pytest.mark.case("stream of requests")
    @pytest.mark.parametrize("number", [0, 1, 100])
    async def test_nest_collects_what_we_stream(self, talk: Stub, number: int) -> None:
        texts = [f"é{n};" for n in range(number)]

        summary: Any = await talk.Collect(spoken(*texts))

        assert summary == {"lines": number, "text": "".join(texts)}

    @pytest.mark.case("stream of both")
    async def test_nest_answers_each_line_before_we_say_the_next(self, talk: Stub) -> None:
        answered = asyncio.Event()

        async def conversation() -> AsyncIterator[dict[str, str]]:
            for line in lines("a", TEXT, "c"):
                yield line
                await asyncio.wait_for(answered.wait(), 5)
                answered.clear()

        answers = []
        async for answer in talk.Chat(conversation()):
            answers.append(answer)
            answered.set()

        assert answers == lines("re: a", f"re: {TEXT}", "re: c")

    @pytest.mark.case("errors: text, object with a code, unexpected")
    @pytest.mark.parametrize(
        ("text", "status_code", "code", "message"),
        [
            ("text", 500, "rpc-error", "boom"),
            ("broken", 400, "invalid-argument", "broken"),
            ("bug", 500, "internal", "Internal server error"),
        ],
    )
    async def test_we_get_nests_error_by_its_status(
        self, talk: Stub, text: str, status_code: int, code: str, message: str
    ) -> None:
        with pytest.raises(RpcException) as caught:
            await talk.Say({"text": text})

        assert (caught.value.status_code, caught.value.code, caught.value.message) == (status_code, code, message)

    @pytest.mark.case("values, then an error")
    async def test_we_get_the_values_before_an_error(self, talk: Stub) -> None:
        values = talk.Chat(spoken("a", "b", "broken", "c"))

        before = [await anext(values), await anext(values)]

        assert before == lines("re: a", "re: b")
        with pytest.raises(RpcException, match="broken"):
            await anext(values)

    @pytest.mark.case("metadata")
    async def test_a_handler_of_nest_is_told_our_metadata(self, talk: Stub) -> None:
        answer = await talk.Say({"text": "metadata"}, metadata={"trace-id": "7"})

        assert answer == {"text": "7"}

    @pytest.mark.case("deadline")
    async def test_our_deadline_ends_the_call(self, talk: Stub) -> None:
        started = asyncio.get_running_loop().time()

        with pytest.raises(DeadlineExceeded):
            await talk.Say({"text": "slow"}, timeout=0.1)

        assert asyncio.get_running_loop().time() - started < 5

    @pytest.mark.case("a method that is not served")
    async def test_we_are_told_of_a_method_that_nest_does_not_serve(self, client: Client) -> None:
        with pytest.raises(NoHandler):
            await client.send("OrdersService/CancelOrder", {"id": "1"})
