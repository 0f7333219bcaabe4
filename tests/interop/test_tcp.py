"""What NestJS and ourselves do alike over TCP alone: frames, connections and their ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from msgspec import Raw, Struct

from microservices import ConnectionLost, DeadlineExceeded, RpcException, Unavailable
from microservices.client import Client
from tests.interop.nest import Answer, NestClient, free_port, hang_up, nest_client, nest_server, relay
from tests.interop.ours import OurServer, our_client, our_server
from tests.toolkit.conftest import frame

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
]

NO_HANDLER = "There is no matching message handler defined in the remote service."
LARGE = "é😀x" * 75_000  # 300,000 UTF-16 units, 525,000 bytes
WAIT = 5


class User(Struct):
    name: str
    tags: list[str]


# NestJS calls us


async def test_nest_is_told_which_field_does_not_fit_our_handler(nest: NestClient) -> None:
    answer = await nest.send({"cmd": "place", "version": 2}, {"lines": [{"quantity": 1}, {"quantity": 0}]})

    assert answer.values == []
    assert (answer.error["statusCode"], answer.error["code"]) == (400, "invalid")
    assert [error["pointer"] for error in answer.error["errors"]] == ["/lines/1/quantity"]


async def test_an_event_that_none_of_our_handlers_hears_does_no_harm(nest: NestClient) -> None:
    await nest.emit("unheard", {})

    assert await nest.send("echo", "still there") == Answer(["still there"])


async def test_half_an_emoji_from_nest_costs_no_more_than_itself(nest: NestClient) -> None:
    answer = await nest.send("echo", {"cut": "a\ud83d", "whole": "😀"})

    assert answer == Answer([{"cut": "a\ufffd", "whole": "😀"}])


async def test_nest_hears_when_our_server_goes_away_and_calls_again_when_it_is_back(node_modules: None) -> None:
    port = free_port()
    async with nest_client(f"tcp://127.0.0.1:{port}") as nest:
        async with our_server(f"tcp://127.0.0.1:{port}"):
            pending = asyncio.create_task(nest.send("slow", {"ms": 30_000}))
            await nest.send("echo", "the other call has arrived, too")
        lost = await asyncio.wait_for(pending, WAIT)

        async with our_server(f"tcp://127.0.0.1:{port}"):
            again = await nest.send("echo", "again")
            if again.error and again.error["message"] == "Connection closed":
                # It sent this on the connection whose end it had not read yet, and calls the next one on another.
                again = await nest.send("echo", "again")

    assert (lost.values, lost.error["statusCode"], lost.error["code"]) == ([], 503, "interrupted")
    assert again == Answer(["again"])


async def test_our_server_reads_frames_of_nest_that_break_inside_a_character(ours: OurServer) -> None:
    async with relay(ours.port) as port, nest_client(f"tcp://127.0.0.1:{port}") as nest:
        answer = await nest.send("echo", "é😀e\u0301" * 8)

    assert answer == Answer(["é😀e\u0301" * 8])


# We call NestJS


async def test_a_handler_of_nest_is_found_whatever_the_order_of_our_keys(client: Client) -> None:
    answer = await client.send({"b": 1, "a": "x"}, {})

    assert json.loads(answer) == {"a": "x", "b": 1}


async def test_we_get_an_answer_of_nest_in_a_type_of_our_own(client: Client) -> None:
    user = User("Zoë 😀", ["a", "b"])

    answer = await client.send("echo", user, returns=User)

    assert answer == user


async def test_an_answer_of_nest_in_another_shape_than_expected_is_refused(client: Client) -> None:
    with pytest.raises(RpcException, match="another shape") as caught:
        await client.send("echo", {"name": "Zoë", "tags": 5}, returns=User)

    assert (caught.value.status_code, caught.value.code) == (502, "bad-answer")


async def test_an_event_that_no_handler_of_nest_hears_does_no_harm(client: Client) -> None:
    await client.emit({"event": "unheard"}, {})

    assert await client.send("echo", "still there") == "still there"


async def test_half_an_emoji_in_an_answer_of_nest_costs_no_more_than_itself(client: Client) -> None:
    answer = await client.send("echo", Raw(rb'["a\ud83d", "\ud83d\ude00"]'))

    assert answer == ["a\ufffd", "😀"]


async def test_a_slow_handler_of_nest_fails_its_own_call_only(client: Client) -> None:
    await client.send("echo", "connected")
    connection = client.unwrap()

    async def call_on_until(slow: asyncio.Task[Any]) -> int:
        answers = 0
        while not slow.done():
            assert await client.send("echo", answers) == answers
            answers += 1
        return answers

    slow = asyncio.create_task(client.send("slow", {"ms": 400}, timeout=0.2))
    answers = await asyncio.wait_for(call_on_until(slow), WAIT)
    with pytest.raises(DeadlineExceeded):
        await slow
    afterwards = await client.send("slow", {"ms": 400})  # the late answer comes before this one

    assert answers > 1
    assert afterwards == 400
    assert client.unwrap() is connection


async def test_pending_calls_fail_when_nest_dies_and_the_next_one_connects_again(node_modules: None) -> None:
    port = free_port()
    async with our_client(f"tcp://127.0.0.1:{port}") as client:
        async with nest_server(f"tcp://127.0.0.1:{port}") as process:
            await client.send("echo", "connected")
            pending = asyncio.create_task(client.send("slow", {"ms": 30_000}, timeout=30))
            await client.send("echo", "the other call has been sent")
            process.kill()
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(pending, WAIT)

        with pytest.raises(Unavailable) as refused:
            await client.send("echo", "nobody there")
        async with nest_server(f"tcp://127.0.0.1:{port}"):
            again = await client.send("echo", "again")

    assert refused.value.code == "unavailable"
    assert again == "again"


async def test_we_read_frames_of_nest_that_break_inside_a_character(nest_port: int) -> None:
    async with relay(nest_port) as port, our_client(f"tcp://127.0.0.1:{port}") as client:
        answer = await client.send("echo", "é😀e\u0301" * 8)

    assert answer == "é😀e\u0301" * 8


# The same bytes to both servers


def packet(text: str) -> bytes:
    """Return a frame of this JSON."""
    return frame(text.encode())


async def converse(port: int, sent: bytes, answers: int) -> tuple[list[Any], bool]:
    """Send bytes; return the answers, the last packets of them sorted, and whether a request is still answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(WAIT):
            writer.write(sent)
            received = [await read_packet(reader) for _ in range(answers)]
            writer.write(packet('{"pattern":"echo","data":"alive","id":"last"}'))
            last = await read_packet(reader)
    except (ConnectionError, asyncio.IncompleteReadError):
        return [], False
    finally:
        await hang_up(writer)
    assert last == {"response": "alive", "isDisposed": True, "id": "last"}
    return sorted(received, key=lambda answer: str(answer["id"])), True


async def read_packet(reader: asyncio.StreamReader) -> Any:
    """Read one packet of a frame whose text is ASCII or says so in its length."""
    units = int((await reader.readuntil(b"#"))[:-1])
    text = ""
    while len(text.encode("utf-16-le")) < 2 * units:
        first = await reader.readexactly(1)
        width = 1 if first[0] < 0x80 else 2 if first[0] < 0xE0 else 3 if first[0] < 0xF0 else 4
        text += (first + await reader.readexactly(width - 1)).decode()
    return json.loads(text)


@pytest.mark.parametrize(
    ("sent", "ids"),
    [
        pytest.param(packet('{"pattern":"echo","data":"é😀","id":"1"}'), ["1"], id="not-ascii"),
        pytest.param(packet('{"pattern":"echo","data":null,"id":"1"}'), ["1"], id="null"),
        pytest.param(packet('{"pattern":"nothing","id":"1"}'), ["1"], id="no-data-no-value"),
        pytest.param(packet(' { "id" : 7 , "data":[1,2], "pattern" : { "cmd" : "sum" } } '), [7], id="spaces"),
        pytest.param(packet('{"pattern":"echo","data":1,"id":null}'), [None], id="id-null"),
        pytest.param(packet(r'{"pattern":"{ \"cmd\" : \"sum\" }","data":[1],"id":"1"}'), ["1"], id="text-of-pattern"),
        pytest.param(packet('{"pattern":5.0,"data":1,"id":"1"}'), ["1"], id="number"),
        pytest.param(packet('{"data":1,"id":"1"}'), ["1"], id="no-pattern"),
        pytest.param(packet('{"pattern":true,"data":1,"id":"1"}'), ["1"], id="pattern-that-never-matches"),
        pytest.param(packet('{"pattern":"echo","data":1,"id":"1","more":{}}'), ["1"], id="unknown-key"),
        pytest.param(packet('{"pattern":"echo","data":1,"id":"1","metadata":[]}'), ["1"], id="metadata-of-no-use"),
        pytest.param(packet('{"pattern":"stream-then-error","data":1,"id":"1"}'), ["1", "1"], id="value-then-error"),
        pytest.param(
            packet('{"pattern":"echo","data":1,"id":"1"}') + packet('{"pattern":"nobody","data":1,"id":"2"}'),
            ["1", "2"],
            id="two-at-once",
        ),
        pytest.param(b"0041" + packet('{"pattern":"echo","data":"aaaa","id":"1"}')[2:], ["1"], id="leading-zeros"),
        pytest.param(packet('{"pattern":"nobody","data":1}'), [], id="unknown-event"),
        pytest.param(b"4#null", [], id="body-null"),
        pytest.param(b'5#"abc"', [], id="body-text"),
        pytest.param(b"2#[]", [], id="body-list"),
    ],
)
async def test_nest_and_we_give_the_same_answers(nest_port: int, ours: OurServer, sent: bytes, ids: list[Any]) -> None:
    theirs, our = await asyncio.gather(converse(nest_port, sent, len(ids)), converse(ours.port, sent, len(ids)))

    assert our == theirs
    assert [answer["id"] for answer in our[0]] == ids
    assert our[1]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b'40#{"pattern":"echo","data":"aaaa","id":"1"}', id="one-unit-too-short"),
        pytest.param(b'42#{"pattern":"echo","data":"aaaa","id":"1"}', id="one-unit-too-long"),
        pytest.param('45#{"pattern":"echo","data":"é😀","id":"1"}'.encode(), id="length-in-bytes"),
        pytest.param(b"xx#{}", id="no-number"),
        pytest.param(b"#{}", id="no-length"),
        pytest.param(b"0#", id="nothing"),
        pytest.param(b"-2#{}", id="negative"),
        pytest.param(packet('{"pattern":"echo","data":NaN,"id":"1"}'), id="not-a-number"),
        pytest.param(packet('{"pattern":"echo","data":[1,],"id":"1"}'), id="trailing-comma"),
        pytest.param(packet('{"pattern":"echo","data":"a\nb","id":"1"}'), id="control-character"),
    ],
)
async def test_nest_and_we_end_a_connection_whose_bytes_make_no_sense(
    nest_port: int, ours: OurServer, sent: bytes
) -> None:
    theirs, our = await asyncio.gather(converse(nest_port, sent, 0), converse(ours.port, sent, 0))

    assert our == theirs == ([], False)
