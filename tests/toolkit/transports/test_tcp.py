"""NestJS's TCP transport: the contract over real sockets, and a server among peers of all manners."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from microservices.dispatcher import Dispatcher
from microservices.exceptions import RpcException
from microservices.handlers import event_pattern, message_pattern
from microservices.transports import Address, parse
from microservices.transports.base import ClientProxy, Status
from microservices.transports.tcp import TcpClient, TcpServer, _ClientConnection
from tests.toolkit.conftest import frame, service
from tests.toolkit.transports.contract import PATIENCE, TransportContract, echo
from tests.toolkit.transports.wire import Wire, asked, connection, framed, until

TEXT = "e\u0301 é 漢 😀\u2028"


class TestTcp(TransportContract):
    most_ahead = 8000  # the kernel's own buffers hold some megabytes

    async def serve(self, dispatcher: Dispatcher) -> TcpServer:
        server = TcpServer(Address("tcp", "127.0.0.1", 0, {**self.server_options}), dispatcher)
        await server.listen()
        return server

    def proxy(self, dispatcher: Dispatcher, server: TcpServer) -> ClientProxy:
        return TcpClient(parse(f"tcp://127.0.0.1:{server.port}"), "shop")


@asynccontextmanager
async def serving(*functions: Callable[..., Any], **options: Any) -> AsyncIterator[TcpServer]:
    """Serve these handlers with the options of a URL."""
    address = Address("tcp", "127.0.0.1", 0, {name: str(value) for name, value in options.items()})
    server = TcpServer(address, service(*functions))
    await server.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            yield server
    finally:
        await server.close(0)


def connections(server: TcpServer) -> list[Any]:
    """Return what the server holds of its peers."""
    return list(server._connections)


async def answered(peer: Wire, data: Any = "still here") -> bool:
    """Return whether a server still answers this peer."""
    await peer.say(asked("echo", data, id="check"))
    return await peer.hear() == {"response": data, "isDisposed": True, "id": "check"}


# Frames


@pytest.mark.asyncio
async def test_a_frame_may_arrive_byte_by_byte() -> None:
    async with serving(echo) as server, connection(server.port) as peer:
        for byte in asked("echo", TEXT):
            await peer.say(bytes([byte]))
            await asyncio.sleep(0)

        assert await peer.hear() == {"response": TEXT, "isDisposed": True, "id": "1"}


@pytest.mark.asyncio
async def test_a_frame_may_be_split_anywhere_even_inside_a_character() -> None:
    frame = asked("echo", TEXT)

    async with serving(echo) as server, connection(server.port) as peer:
        for cut in range(1, len(frame)):
            await peer.say(frame[:cut])
            assert await answered_elsewhere(server)  # the server has read the first part by now
            await peer.say(frame[cut:])

            assert (await peer.hear())["response"] == TEXT


async def answered_elsewhere(server: TcpServer) -> bool:
    """Return whether a server answers a new peer."""
    async with connection(server.port) as other:
        return await answered(other)


@pytest.mark.asyncio
async def test_frames_that_arrive_together_are_all_answered() -> None:
    async with serving(echo) as server, connection(server.port) as peer:
        await peer.say(b"".join(asked("echo", number, id=str(number)) for number in range(300)))
        answers = await peer.hear_all(300)

    assert sorted(answer["response"] for answer in answers) == list(range(300))
    assert all(answer["id"] == str(answer["response"]) for answer in answers)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"abc#{}", id="garbage in the header"),
        pytest.param(b"#{}", id="empty header"),
        pytest.param(b"-2#{}", id="negative length"),
        pytest.param(b"12345678901", id="header without an end"),
        pytest.param(b"2097152#{", id="oversized frame"),
        pytest.param(b"1#{}", id="length too short"),
        pytest.param(b"0#{}", id="length of nothing"),
        pytest.param(b"2#{]", id="no JSON"),
        pytest.param(b'13#{"pattern":\xff}', id="no UTF-8"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01", id="a TLS greeting"),
    ],
)
async def test_bytes_that_are_no_frame_end_that_connection_alone(
    bad: bytes, losses: Callable[[str, str], int], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(echo) as server, connection(server.port) as peer, connection(server.port) as other:
        before = await answered(peer)
        await peer.say(bad)
        end = await peer.hear()
        others_served = await answered(other)

    assert before
    assert end is None
    assert others_served
    assert losses("tcp", "bad-frame") == 1
    assert "Invalid message from tcp peer" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("odd", ["5", "null", "[]", '"text"', "{}", '{"id":"1"}', '{"pattern":null}'])
async def test_json_that_is_no_packet_is_passed_over(odd: str) -> None:
    async with serving(echo) as server, connection(server.port) as peer:
        await peer.say(framed(odd))
        await peer.say(asked("echo", 1, id="check"))
        answers = [await peer.hear()]
        if "id" in odd:  # a request, though for nobody
            answers.append(await peer.hear())

    assert answers[-1] == {"response": 1, "isDisposed": True, "id": "check"}


@pytest.mark.asyncio
async def test_half_a_frame_is_waited_for_only_so_long(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        serving(echo, incomplete_message_timeout=0.1) as server,
        connection(server.port) as peer,
        connection(server.port) as patient,
    ):
        first = await answered(patient)
        await peer.say(asked("echo", "é")[:-3])
        end = await peer.hear()
        still = await answered(patient)  # who says nothing at all has no time to keep

    assert end is None
    assert (first, still) == (True, True)
    assert "did not come in time" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("id", ["text", "é", "", 5, -0.5, None, True, {"a": [1]}])
async def test_an_id_is_echoed_as_it_came(id: Any) -> None:
    async with serving(echo) as server, connection(server.port) as peer:
        await peer.say(asked("echo", 1, id=id), asked("unknown", 1, id=id))
        answers = await peer.hear_all(2)

    assert [answer["id"] for answer in answers] == [id, id]


# Bounds


@pytest.mark.asyncio
async def test_an_idle_connection_is_closed_but_not_one_that_waits() -> None:
    go_on = asyncio.Event()

    @message_pattern("slow")
    async def slow() -> str:
        await go_on.wait()
        return "done"

    async with (
        serving(slow, echo, idle_timeout=0.1) as server,
        connection(server.port) as idle,
        connection(server.port) as waiting,
    ):
        await waiting.say(asked("slow"))
        end = await idle.hear()
        go_on.set()
        answer = await waiting.hear()

    assert end is None
    assert answer["response"] == "done"


@pytest.mark.asyncio
async def test_an_idle_peer_that_reads_nothing_is_cut_off() -> None:
    size = 3_000_000  # more than the kernel takes, less than holds the server back

    @message_pattern("much", inline=True)
    def much() -> str:
        return "x" * size

    options = {"idle_timeout": 0.1, "max_buffer_size": 2 * size, "max_send_buffer_size": 4 * size}

    async with serving(much, **options) as server, connection(server.port) as peer:
        peer.stop_reading()
        await peer.say(asked("much"), asked("much", id="2"))
        await until(lambda: bool(connections(server)))
        await until(lambda: not connections(server))


@pytest.mark.asyncio
async def test_a_connection_too_many_is_refused_until_there_is_room(losses: Callable[[str, str], int]) -> None:
    async with serving(echo, max_connections=1) as server:
        async with connection(server.port) as first:
            assert await answered(first)
            async with connection(server.port) as second:
                assert await second.hear() is None
            assert await answered(first)
        await until(lambda: not connections(server))

        assert await answered_elsewhere(server)
        assert losses("tcp", "too-many-connections") == 1


@pytest.mark.asyncio
async def test_one_address_leaves_room_for_others(losses: Callable[[str, str], int]) -> None:
    async with serving(echo, max_connections=3, max_connections_per_peer=2) as server:
        async with connection(server.port) as first, connection(server.port) as second:
            assert await answered(first)
            assert await answered(second)
            async with connection(server.port) as third:
                assert await third.hear() is None
            async with connection(server.port, source="127.0.0.2") as other:
                assert await answered(other)
                async with connection(server.port, source="127.0.0.3") as beyond_all:
                    assert await beyond_all.hear() is None
        await until(lambda: not connections(server))

        assert await answered_elsewhere(server)
        assert not server._by_host or set(server._by_host) == {"127.0.0.1"}
        assert losses("tcp", "too-many-connections") == 2


@pytest.mark.asyncio
async def test_a_peer_that_sends_much_at_once_leaves_turns_to_others() -> None:
    loop = asyncio.get_running_loop()
    taken, most = 0, 0

    @message_pattern("take", inline=True)
    def take() -> None:
        nonlocal taken
        taken += 1

    def turn() -> None:
        nonlocal taken, most, turning
        most, taken = max(most, taken), 0
        turning = loop.call_soon(turn)

    turning = loop.call_soon(turn)
    try:
        async with serving(take) as server, connection(server.port) as peer:
            await peer.say(b"".join(asked("take", id=str(number)) for number in range(1000)))
            answers = await peer.hear_all(1000)
    finally:
        turning.cancel()

    assert [answer["id"] for answer in answers] == [str(number) for number in range(1000)]
    assert 1 < most <= 64


# Hostile JSON: what the standard library, or another parser, would take


@pytest.mark.asyncio
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "[1,NaN]", "0x10", "01", "1.", "+1", "1_000"])
async def test_numbers_that_are_none_in_json_end_the_connection(number: str) -> None:
    async with serving(echo) as server, connection(server.port) as peer, connection(server.port) as other:
        await peer.say(framed(f'{{"pattern":"echo","data":{number},"id":"1"}}'))
        end = await peer.hear()

        assert end is None
        assert await answered(other)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "number", ["1e400", "-1e99999", "1" * 5000, "[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65]
)
async def test_data_beyond_what_it_may_be_is_refused_alone(number: str) -> None:
    async with serving(echo) as server, connection(server.port) as peer:
        await peer.say(framed(f'{{"pattern":"echo","data":{number},"id":"1"}}'))
        answer = await peer.hear()

        assert answer["err"]["statusCode"] == 400
        assert await answered(peer)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a":1,"a":2}', {"a": 2}),  # as JavaScript reads it
        ("[" * 64 + "]" * 64, None),
        ("9007199254740993", 9007199254740993),  # JavaScript would round it
        ('"\\ud83d"', "\ufffd"),
        ("1e308", 1e308),
    ],
)
async def test_odd_data_that_is_json_is_taken(text: str, value: Any) -> None:
    async with serving(echo) as server, connection(server.port) as peer:
        await peer.say(framed(f'{{"pattern":"echo","data":{text},"id":"1"}}'))
        answer = await peer.hear()

    assert "err" not in answer
    assert value is None or answer["response"] == value


@pytest.mark.asyncio
@pytest.mark.parametrize("pattern", ["__class__", "echo.__globals__", "_dispatch", {"cmd": "__init__"}, "os.system"])
async def test_a_pattern_reaches_handlers_alone(pattern: Any) -> None:
    async with serving(echo) as server, connection(server.port) as peer:
        await peer.say(asked(pattern))
        answer = await peer.hear()

        assert answer["err"] == "There is no matching message handler defined in the remote service."
        assert await answered(peer)


@pytest.mark.asyncio
async def test_requests_beyond_max_in_flight_wait_unread_and_none_is_lost() -> None:
    running, most, started = 0, 0, 0
    go_on = asyncio.Event()

    @message_pattern("slow")
    async def slow(data: int) -> int:
        nonlocal running, most, started
        started, running = started + 1, running + 1
        most = max(most, running)
        await go_on.wait()
        running -= 1
        return data

    async with serving(slow, echo, max_in_flight=3) as server, connection(server.port) as peer:
        await peer.say(b"".join(asked("slow", number, id=str(number)) for number in range(100)))
        await until(lambda: started == 3)
        for _ in range(5):  # time enough to start a fourth, if it were allowed to
            assert await answered_elsewhere(server)
        started_meanwhile = started
        go_on.set()
        answers = await peer.hear_all(100)

    assert started_meanwhile == 3
    assert most == 3
    assert sorted(answer["response"] for answer in answers) == list(range(100))


@pytest.mark.asyncio
async def test_a_flood_of_events_waits_unread_and_none_is_lost() -> None:
    running, most, heard = 0, 0, 0
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made() -> None:
        nonlocal running, most, heard
        running, heard = running + 1, heard + 1
        most = max(most, running)
        await go_on.wait()
        running -= 1

    async with serving(made, echo, max_in_flight=3) as server, connection(server.port) as peer:
        await peer.say(framed({"pattern": "made", "data": 1}) * 100)
        await until(lambda: heard == 3)
        for _ in range(5):
            assert await answered_elsewhere(server)
        heard_meanwhile = heard
        go_on.set()
        await until(lambda: heard == 100)

    assert (heard_meanwhile, most) == (3, 3)


@pytest.mark.asyncio
async def test_a_peer_that_stops_reading_a_stream_is_cut_off_in_the_end() -> None:
    closed = asyncio.Event()

    @message_pattern("flood")
    async def flood() -> AsyncIterator[str]:
        try:
            while True:
                yield "x" * 10_000
        finally:
            closed.set()

    async with serving(flood, idle_timeout=0.1) as server, connection(server.port) as deaf:
        await deaf.say(asked("flood"))
        deaf.stop_reading()
        await closed.wait()
        await until(lambda: not connections(server))


@pytest.mark.asyncio
async def test_a_stream_to_a_peer_that_never_reads_is_held_back() -> None:
    sent, closed = 0, asyncio.Event()

    @message_pattern("flood")
    async def flood() -> AsyncIterator[str]:
        nonlocal sent
        try:
            while True:
                yield "x" * 10_000
                sent += 1
        finally:
            closed.set()

    async with serving(flood, echo) as server:
        async with connection(server.port) as deaf:
            deaf.stop_reading()
            await deaf.say(asked("flood"))
            quiet_for, before = 0, 0
            while quiet_for < 20:  # others are served meanwhile
                assert await answered_elsewhere(server)
                quiet_for, before = (quiet_for + 1 if sent == before else 0), sent
            deaf.reset()
        await closed.wait()

    assert 0 < sent < 2000  # 20 MB, most of them in the kernel


@pytest.mark.asyncio
async def test_answers_that_nobody_reads_stop_the_reading_of_requests() -> None:
    handled = 0

    @message_pattern("much", inline=True)
    def much() -> str:
        nonlocal handled
        handled += 1
        return "x" * 100_000

    async with serving(much, echo) as server, connection(server.port) as deaf:
        deaf.stop_reading()
        await deaf.say(b"".join(asked("much", id=str(number)) for number in range(500)))
        quiet_for, before = 0, 0
        while quiet_for < 20:
            assert await answered_elsewhere(server)
            quiet_for, before = (quiet_for + 1 if handled == before else 0), handled
        handled_unread = handled
        deaf.go_on_reading()
        answers = await deaf.hear_all(500)

    assert 0 < handled_unread < 200
    assert [answer["id"] for answer in answers] == [str(number) for number in range(500)]


@pytest.mark.asyncio
async def test_a_stream_past_its_deadline_leaves_the_others_of_its_connection_alone() -> None:
    given_up = asyncio.Event()

    @message_pattern("flood")
    async def flood(data: int) -> AsyncIterator[str]:
        try:
            for _ in range(data):
                yield "x" * 10_000
        except GeneratorExit:
            given_up.set()

    async with serving(flood) as server, connection(server.port) as peer:
        peer.stop_reading()
        await peer.say(asked("flood", 2000, id="patient"))
        await peer.say(asked("flood", 10**6, id="hasty", metadata={"deadline": "200"}))
        await given_up.wait()
        peer.go_on_reading()
        values, ends = 0, {}
        while len(ends) < 2:
            packet = await peer.hear()
            values += packet["id"] == "patient" and "response" in packet
            if packet.get("isDisposed"):
                ends[packet["id"]] = packet.get("err", {}).get("statusCode")

    assert values == 2000
    assert ends == {"patient": None, "hasty": 504}


@pytest.mark.asyncio
async def test_an_answer_too_large_is_an_error_and_the_connection_goes_on() -> None:
    @message_pattern("much")
    async def much() -> str:
        return "x" * 5000

    async with serving(much, echo, max_buffer_size=1000) as server, connection(server.port) as peer:
        await peer.say(asked("much"))
        answer = await peer.hear()
        still = await answered(peer)

    assert answer["err"]["code"] == "packet-too-large"
    assert still


# Coming and going


@pytest.mark.asyncio
async def test_a_peer_that_closed_its_writing_half_still_gets_its_answers() -> None:
    go_on = asyncio.Event()

    @message_pattern("slow")
    async def slow(data: int) -> int:
        await go_on.wait()
        return data

    async with serving(slow, echo) as server, connection(server.port) as peer:
        await peer.say(asked("slow", 1), asked("slow", 2, id="2"))
        peer.writer.write_eof()
        assert await answered_elsewhere(server)
        go_on.set()
        answers = await peer.hear_all(3)

    assert [answer and answer["response"] for answer in answers] == [1, 2, None]


@pytest.mark.asyncio
async def test_a_peer_that_goes_ends_its_requests_but_not_its_events() -> None:
    cancelled, heard, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    started: asyncio.Queue[str] = asyncio.Queue()

    @message_pattern("ask")
    async def ask() -> None:
        started.put_nowait("ask")
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    @event_pattern("made")
    async def made() -> None:
        started.put_nowait("made")
        await go_on.wait()
        heard.set()

    async with serving(ask, made) as server:
        async with connection(server.port) as peer:
            await peer.say(asked("ask"), framed({"pattern": "made", "data": 1}))
            await started.get()
            await started.get()
            peer.reset()
        await cancelled.wait()
        go_on.set()
        await heard.wait()


@pytest.mark.asyncio
async def test_a_closed_server_takes_nobody_and_leaves_nobody_connected() -> None:
    async with serving(echo) as server, connection(server.port) as peer:
        port = server.port
        assert await answered(peer)
        await server.close(1)

        assert await peer.hear() is None
        assert server.status is Status.CLOSED
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


@pytest.mark.asyncio
async def test_closing_does_not_wait_for_handlers_longer_than_it_may() -> None:
    cancelled, started = asyncio.Event(), asyncio.Event()

    @message_pattern("never")
    async def never() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with serving(never) as server, connection(server.port) as peer:
        await peer.say(asked("never"))
        await started.wait()
        await server.close(0.05)

        assert cancelled.is_set()
        told = await peer.hear()
        assert told is not None
        assert (told["id"], told["err"]["statusCode"], told["err"]["code"]) == ("1", 503, "interrupted")
        assert await peer.hear() is None


@pytest.mark.asyncio
async def test_whoever_asks_a_door_that_closes_is_told_so_and_nothing_is_begun() -> None:
    gate, started, begun = asyncio.Event(), asyncio.Event(), 0

    @message_pattern("slow")
    async def slow() -> str:
        nonlocal begun
        begun += 1
        started.set()
        await gate.wait()
        return "done"

    async with serving(slow) as server, connection(server.port) as peer:
        await peer.say(asked("slow", id="first"))
        await started.wait()
        closing = asyncio.create_task(server.close(PATIENCE))
        await asyncio.sleep(0)
        await peer.say(asked("slow", id="second"))
        told = await peer.hear()
        gate.set()
        answer = await peer.hear()
        await closing

    assert told is not None
    assert (told["id"], told["err"]["statusCode"], told["err"]["code"]) == ("second", 503, "draining")
    assert answer == {"response": "done", "isDisposed": True, "id": "first"}
    assert begun == 1


class CountedTransport:
    """Passes everything on and counts the writes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.writes = 0

    def write(self, data: bytes) -> None:
        self.writes += 1
        self.transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


@pytest.mark.asyncio
@pytest.mark.parametrize("inline", [True, False])
async def test_answers_to_requests_that_came_together_leave_together(inline: bool) -> None:
    @message_pattern("plain", inline=True)
    def plain(data: int) -> int:
        return data

    @message_pattern("task")
    async def task(data: int) -> int:
        return data

    async with serving(plain, task, echo) as server, connection(server.port) as peer:
        assert await answered(peer)
        counted = connections(server)[0].transport = CountedTransport(connections(server)[0].transport)
        pattern = "plain" if inline else "task"
        await peer.say(b"".join(asked(pattern, number, id=str(number)) for number in range(60)))
        answers = await peer.hear_all(60)

    assert [answer["response"] for answer in answers] == list(range(60))
    assert counted.writes <= 3


@pytest.mark.asyncio
async def test_a_taken_port_is_told() -> None:
    async with serving(echo) as server:
        second = TcpServer(parse(f"tcp://127.0.0.1:{server.port}"), service(echo))

        with pytest.raises(OSError, match="in use"):
            await second.listen()


@pytest.mark.asyncio
async def test_an_error_mapping_without_a_json_form_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    @message_pattern("fail")
    async def fail() -> None:
        raise RpcException({"statusCode": 400, "message": object()})

    async with serving(fail) as server, connection(server.port) as peer:
        await peer.say(asked("fail"))

        assert (await peer.hear())["err"] == {"status": "error", "message": "Internal server error"}
        assert "fail failed" in caplog.text


@pytest.mark.asyncio
async def test_a_client_whose_requests_are_not_taken_still_hears_its_answers() -> None:
    """Held by each other, both ends would wait for ever."""

    class Transport(asyncio.Transport):
        def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

        def is_closing(self) -> bool:
            return False

        def write(self, data: Any) -> None: ...

        def pause_reading(self) -> None:
            raise AssertionError("it reads no more")

    heard = []
    proxy = TcpClient(parse("tcp://127.0.0.1:1"), "shop")
    proxy.receive = heard.append  # type: ignore[method-assign,assignment]
    connection = _ClientConnection(proxy)
    connection.connection_made(Transport())

    connection.pause_writing()
    connection.data_received(frame(b'{"response":1,"isDisposed":true,"id":"a"}'))

    assert [reply.id for reply in heard] == ["a"]
