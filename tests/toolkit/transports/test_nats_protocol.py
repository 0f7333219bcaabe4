"""What our own connection to NATS makes of bytes, whole, in slices and bad, and what it writes."""

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from microservices.exceptions import ConnectionLost, RpcException
from microservices.transports.jetstream import Place, place
from microservices.transports.nats_protocol import Message, NatsConnection, read_headers, write_headers
from tests.toolkit.transports.wire import until

GREETING = b'INFO {"server_id":"x","headers":true,"max_payload":1000}\r\n'
SPOKEN = (
    GREETING
    + b"MSG users.created 1 7\r\n{\"a\":1}\r\n+OK\r\nPING\r\n"
    + b"MSG users.created 1 _INBOX.x.1 0\r\n\r\n"
    + b"HMSG users.created 1 _INBOX.x.2 21 26\r\nNATS/1.0\r\nx: \xc3\xa9 y\r\n\r\n12\r\n3\r\n"
    + b"HMSG _INBOX.x.3 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    + b"MSG of.nobody 99 3\r\nMSG\r\n"
    + b"-ERR 'Permissions Violation for Publish to \"say.\\\"x\\\"\"'\r\nPONG\r\n"
    + b"MSG users.\xff 1 9\r\nMSG a 1 5\r\n"
)  # fmt: skip
HEARD = [
    ("users.created", "", b'{"a":1}', {}, ""),
    ("users.created", "_INBOX.x.1", b"", {}, ""),
    ("users.created", "_INBOX.x.2", b"12\r\n3", {"x": "é y"}, ""),
    ("_INBOX.x.3", "", b"", {}, "503"),
    ("users.\ufffd", "", b"MSG a 1 5", {}, ""),
]


class Line(asyncio.Transport):
    """The other end of a connection: keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False
        self.paused = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def abort(self) -> None:
        self.closed = True

    close = abort

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...


class Talk:
    """A connection with what it has heard."""

    def __init__(self) -> None:
        self.line = Line()
        self.connection = NatsConnection("NATS at x", "_INBOX.x")
        self.connection.connection_made(self.line)
        self.heard: list[Message] = []
        self.connection.hear("users.*", self.heard.append)

    def read(self) -> list[Any]:
        """Return what was heard as plain values."""
        return [(each.subject, each.reply, each.data, dict(each.headers), each.status) for each in self.heard]

    def wrote(self) -> bytes:
        """Return what it has written."""
        self.connection.flush()
        return b"".join(self.line.written)


@pytest_asyncio.fixture
async def talk() -> Any:
    talk = Talk()
    yield talk
    if not talk.connection.ended.done():
        talk.connection.connection_lost(None)


def whole() -> Iterator[int]:
    while True:
        yield len(SPOKEN)


def single_bytes() -> Iterator[int]:
    while True:
        yield 1


def random_slices() -> Iterator[int]:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    while True:
        yield chosen.randint(1, 40)


@pytest.mark.asyncio
@pytest.mark.parametrize("sizes", [whole, single_bytes, *[random_slices] * 20])
async def test_messages_are_the_same_however_their_bytes_are_cut(
    talk: Talk, sizes: Callable[[], Iterator[int]]
) -> None:
    asked = talk.connection.ping()
    talk.connection.flush()
    position = 0
    for size in sizes():
        if position >= len(SPOKEN):
            break
        talk.connection.data_received(SPOKEN[position : position + size])
        position += size

    assert talk.read() == HEARD
    assert asked.done()
    assert talk.connection.denied == {'say."x"': 1}
    assert talk.wrote().endswith(b"PING\r\nPONG\r\n")
    assert not talk.line.closed


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "words",
    [
        b"nonsense\r\n",
        b"\r\n",
        b"MSG\r\n",
        b"MSG 1\r\n",
        b"MSG users.x 1\r\n1\r\n",
        b"MSG users.x 1 a b 1\r\n1\r\n",
        b"MSG users.x 1 -4\r\n",
        b"MSG users.x 1 four\r\n",
        b"MSG users.x 1 99999999999\r\n",
        b"MSG users.x 1 3\r\n12345\r\n",
        b"HMSG users.x 1 5\r\n12345\r\n",
        b"HMSG users.x 1 9 5\r\n12345\r\n",
        b"HMSG users.x 1 -9 5\r\n12345\r\n",
        b"INFO\r\n",
        b"INFO []\r\n",
        b'INFO {"max_payload":"x"}\r\n',
        b"INFO \xff\r\n",
        b"x" * 70_000,
    ],
)
async def test_bad_lines_end_the_connection_and_all_that_waits_for_it(talk: Talk, words: bytes) -> None:
    asked = talk.connection.ping()
    talk.connection.flush()
    talk.connection.data_received(GREETING + words + b"MSG users.x 1 1\r\n1\r\n")

    assert talk.line.closed
    assert talk.heard == []
    talk.connection.connection_lost(None)
    assert isinstance(asked.exception(), ConnectionLost)
    assert "it said what is no word of NATS" in str(asked.exception())
    with pytest.raises(ConnectionLost):
        await talk.connection.taken()
    with pytest.raises(ConnectionLost):
        talk.connection.put("users.x", b"1")
    assert talk.connection.post("users.x", b"1") is None


@pytest.mark.asyncio
async def test_what_nats_complains_of_is_the_reason_of_the_end(talk: Talk) -> None:
    talk.connection.data_received(b"-ERR 'Stale Connection'\r\n")
    talk.connection.connection_lost(None)

    assert talk.line.closed
    assert await talk.connection.until_ended() == "the connection was lost: Stale Connection"


@pytest.mark.asyncio
async def test_a_large_message_comes_in_many_pieces(talk: Talk) -> None:
    body = random.randbytes(8 * 2**20)
    stream = b"MSG users.x 1 %d\r\n%b\r\nMSG users.y 1 1\r\n2\r\n" % (len(body), body)

    for start in range(0, len(stream), 10_000):
        talk.connection.data_received(stream[start : start + 10_000])

    assert [message.data for message in talk.heard] == [body, b"2"]


@pytest.mark.asyncio
async def test_a_message_too_large_for_nats_is_refused_before_it_is_sent(talk: Talk) -> None:
    talk.connection.data_received(GREETING)
    before = talk.wrote()

    for headers in ({}, {"x": "y"}):
        with pytest.raises(RpcException) as caught:
            talk.connection.put("users.x", b"x" * (1001 - len(headers)), headers=headers)
        assert (caught.value.status_code, caught.value.code) == (413, "too-large")
    with pytest.raises(ValueError, match="a message of 1001 bytes, where NATS takes 1000"):
        talk.connection.post("users.x", b"x" * 1001)
    assert talk.wrote() == before

    talk.connection.data_received(b'INFO {"headers":true,"max_payload":1001}\r\n')
    talk.connection.put("users.x", b"x" * 1001)
    assert talk.wrote().endswith(b"PUB users.x 1001\r\n" + b"x" * 1001 + b"\r\n")


@pytest.mark.asyncio
async def test_messages_of_one_turn_leave_together_and_share_one_ping(talk: Talk) -> None:
    talk.connection.data_received(GREETING)
    talk.wrote()
    talk.line.written.clear()
    waiting = [asyncio.create_task(talk.connection.taken()) for _ in range(2)]
    talk.connection.put("a", b"1", "_INBOX.x.1")
    talk.connection.put("b", b"2", headers={"x": "é\r\ny"})
    talk.connection.post("c", b"")
    await until(lambda: bool(talk.line.written))
    (written,) = talk.line.written
    waiting[0].cancel()  # who gives up does not take it from the other
    await asyncio.wait(waiting[:1])
    talk.connection.data_received(b"PONG\r\n")
    await waiting[1]

    assert written == (
        b"PUB a _INBOX.x.1 1\r\n1\r\nHPUB b 22 23\r\nNATS/1.0\r\nx: \xc3\xa9  y\r\n\r\n2\r\nPUB c 0\r\n\r\nPING\r\n"
    )


@pytest.mark.asyncio
async def test_what_is_held_is_read_on_where_it_was_left(talk: Talk) -> None:
    connection = talk.connection

    def take(message: Message) -> None:
        talk.heard.append(message)
        connection.hold()

    connection.hear("orders.*", take)
    connection.data_received(b"MSG orders.1 2 1\r\n1\r\nMSG orders.2 2 1\r\n2\r\nMSG orders.3 2")
    paused, first = talk.line.paused, len(talk.heard)
    connection.release()
    connection.data_received(b" 1\r\n3\r\n")
    second = len(talk.heard)
    connection.release()

    assert (paused, first, second) == (True, 1, 2)
    assert [message.data for message in talk.heard] == [b"1", b"2", b"3"]


@pytest.mark.asyncio
async def test_a_message_that_is_stumbled_over_hurts_no_other(talk: Talk, caplog: pytest.LogCaptureFixture) -> None:
    def stumble(message: Message) -> None:
        raise KeyError(message.subject)

    talk.connection.hear("bad", stumble)
    talk.connection.data_received(b"MSG bad 2 1\r\n1\r\nMSG users.x 1 1\r\n2\r\n")

    assert [message.data for message in talk.heard] == [b"2"]
    assert "stumbled over" in caplog.text


@pytest.mark.asyncio
async def test_no_headers_are_sent_to_a_nats_that_takes_none(talk: Talk) -> None:
    with pytest.raises(RpcException, match="this NATS takes none"):
        talk.connection.put("a", b"1", headers={"x": "y"})


@pytest.mark.parametrize(
    ("head", "headers"),
    [
        (b"NATS/1.0\r\n\r\n", {}),
        (b"NATS/1.0\r\na:1\r\nb: 2 \r\na: 3\r\n\r\n", {"a": "3", "b": "2"}),
        (b"NATS/1.0\r\nno colon\r\nb c: 1\r\n: 2\r\n\xff: 3\r\nd: \xff\r\n\r\n", {"d": "\ufffd"}),
        (b"NATS/1.0 100 Idle\r\na: 1\r\n\r\n", {"a": "1"}),
        (b"\xff", {}),
    ],
)
def test_headers_are_read_as_far_as_they_are_some(head: bytes, headers: dict[str, str]) -> None:
    assert read_headers(head) == headers


def test_headers_are_read_as_they_were_written() -> None:
    headers = {"x-version": "é: 1", "traceparent": "00-1"}

    assert read_headers(write_headers(headers)) == headers


@pytest.mark.parametrize(
    "reply", ["$JS.ACK.events.shop.2.17.9.1700000000.0", "$JS.ACK._.hash.events.shop.2.17.9.1700000000.0.token"]
)
def test_the_place_of_a_message_stands_in_its_reply(reply: str) -> None:
    assert place(Message("x", reply, b"")) == Place(number=17, attempt=2)
