"""Peers of a TCP door that do what no client of ours does, and what others notice of them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from tests.faults.conftest import Work, calling
from tests.faults.figures import Figures
from tests.faults.load import Results, make
from tests.faults.proxy import proxy_to
from tests.faults.tier import FULL, seconds

pytestmark = [pytest.mark.slow, pytest.mark.asyncio, pytest.mark.timeout(180)]
WAIT = 20
MIB = 1024**2


def frame(pattern: str, data: object, id: str) -> bytes:
    """Return a request as NestJS writes it; ASCII only, so that bytes are UTF-16 units."""
    text = json.dumps({"pattern": pattern, "data": data, "id": id})
    return f"{len(text)}#{text}".encode()


def source(number: int) -> str:
    """Return one of fifty addresses, since a door takes so many connections of one peer and no more."""
    return f"127.0.1.{1 + number % 50}"


@asynccontextmanager
async def peer(
    work: Work, address: str = "127.0.0.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", work.port, local_addr=(address, 0), limit=MIB)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> float:
    """Wait until a connection is ended, and return how many seconds that took."""
    began = asyncio.get_running_loop().time()
    with suppress(ConnectionError):
        async with asyncio.timeout(WAIT):
            await reader.read(-1)
    return asyncio.get_running_loop().time() - began


@asynccontextmanager
async def bystander(work: Work, what: str, figures: Figures) -> AsyncIterator[None]:
    """Let a client with manners call during the block: none of its calls may fail, nor be late."""
    async with calling(work.url) as client:
        done = Results()
        over = asyncio.Event()

        async def call_on() -> None:
            while not over.is_set() or len(done) < 50:
                await make(lambda number: client.send("echo", number), len(done), done)
                await asyncio.sleep(0.005)

        calls = asyncio.create_task(call_on())
        try:
            yield
        finally:
            over.set()
            await asyncio.wait([calls], timeout=WAIT)
        figures.at_most(what, "calls of others that failed", sum(done.failures.values()), 0)
        figures.at_most(what, "slowest of others", done.slowest * 1000, 250, "ms")


async def test_a_peer_that_never_reads_fills_no_memory(work: Work, figures: Figures) -> None:
    request = frame("echo", "x" * 10_000, "1")
    before = work.memory
    async with bystander(work, "peer that never reads", figures), peer(work) as (reader, writer):
        reader._transport.pause_reading()  # type: ignore[attr-defined] - else asyncio reads ahead
        sent = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds(2, 5)):
                while sent < 200 * MIB:
                    writer.write(request)
                    sent += len(request)
                    await writer.drain()

    figures.at_most("peer that never reads", "read from it", sent / MIB, 30, "MiB")
    figures.at_most("peer that never reads", "memory", work.memory - before, 15, "MiB")


async def test_a_frame_of_100_mb_is_refused_by_its_length(work: Work, figures: Figures) -> None:
    before = work.memory
    async with bystander(work, "100 MB frame", figures), peer(work) as (reader, writer):
        writer.write(b"104857600#" + b"x" * 100_000)
        took = await ended(reader)

    figures.at_most("100 MB frame", "until it is hung up", took * 1000, 500, "ms")
    figures.at_most("100 MB frame", "memory", work.memory - before, 5, "MiB")


async def test_garbage_ends_its_own_connection_only(work: Work, figures: Figures, chance: random.Random) -> None:
    count = 1000 if FULL else 200

    def garbage() -> bytes:
        kinds: list[Callable[[], bytes]] = [
            lambda: chance.randbytes(chance.randrange(1, 2000)),
            lambda: b"GET / HTTP/1.1\r\nHost: users\r\n\r\n",
            lambda: b"-5#hello",
            lambda: b"5#\xff\xfe\xfd\xfc\xfb",
            lambda: b"9" * 20,
            lambda: b"6#[1,2,}",
            lambda: frame("echo", 1, "1")[:-1] + b"x",
        ]
        return chance.choice(kinds)()

    async with bystander(work, "garbage", figures):
        for _ in range(count // 50):
            async with asyncio.TaskGroup() as group:
                for _ in range(50):
                    group.create_task(_throw(work, garbage()))
    async with asyncio.timeout(WAIT):
        while work.files > 40:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)


async def _throw(work: Work, data: bytes) -> None:
    async with peer(work) as (reader, writer):
        writer.write(data)
        with suppress(ConnectionError):
            writer.write_eof()
            await ended(reader)


async def test_frames_that_come_byte_by_byte_are_frames(work: Work, figures: Figures) -> None:
    async with proxy_to(work.port) as proxy, calling(f"tcp://127.0.0.1:{proxy.port}") as client:
        proxy.faults.slice = 1
        texts = [f"Zoë 😀 {number}" for number in range(50)]
        answers = await asyncio.gather(*(client.send("echo", text) for text in texts))

    figures.at_least("byte by byte", "right answers", sum(map(str.__eq__, answers, texts)), len(texts))


async def test_payloads_nested_without_end_hurt_nobody(work: Work, figures: Figures) -> None:
    async with bystander(work, "100,000 nested lists", figures), peer(work) as (reader, writer):
        for depth in (900, 5_000, 100_000):
            text = f'{{"pattern":"work","data":{"[" * depth}{"]" * depth},"id":"deep"}}'
            writer.write(f"{len(text)}#{text}".encode() + frame("echo", depth, str(depth)))
            async with asyncio.timeout(WAIT):
                while True:
                    length = await reader.readuntil(b"#")
                    answer = (await reader.readexactly(int(length[:-1]))).decode()
                    if f'"id":"{depth}"' in answer:
                        break


async def test_half_frames_are_not_waited_for(start: Callable[..., Work], figures: Figures) -> None:
    work = start("?incomplete_message_timeout=1")
    count = 1000 if FULL else 200

    async def half(number: int) -> float:
        async with peer(work, source(number)) as (reader, writer):
            writer.write(frame("echo", "x" * 1000, "1")[: 5 + number])

            async def drip() -> None:  # a byte now and then gives it no more time
                while True:
                    await asyncio.sleep(0.3)
                    writer.write(b"x")

            dripping = asyncio.create_task(drip())
            try:
                return await ended(reader)
            finally:
                dripping.cancel()

    async with bystander(work, "half frames", figures):
        took = await asyncio.gather(*map(half, range(count)))

    figures.at_most("half frames", "until the last is hung up, of 1 s", max(took), 2, "s")


async def test_twenty_thousand_frames_at_once_are_answered_one_by_one(work: Work, figures: Figures) -> None:
    count = 20_000
    before = work.memory
    ids: set[str] = set()
    async with bystander(work, "20,000 pipelined frames", figures), peer(work) as (reader, writer):
        writer.write(b"".join(frame("echo", number, str(number)) for number in range(count)))
        async with asyncio.timeout(WAIT):
            while len(ids) < count:
                length = await reader.readuntil(b"#")
                answer = json.loads(await reader.readexactly(int(length[:-1])))
                assert answer["response"] == int(answer["id"])
                ids.add(answer["id"])

    figures.at_least("20,000 pipelined frames", "answers", len(ids), count)
    figures.at_most("20,000 pipelined frames", "memory", work.memory - before, 20, "MiB")


async def test_five_thousand_idle_connections_cost_little(start: Callable[..., Work], figures: Figures) -> None:
    count = 5000
    work = start("?max_connections=6000")
    before = work.memory
    writers: list[asyncio.StreamWriter] = []
    try:
        async with bystander(work, "5,000 idle connections", figures):
            for number in range(count):
                _, writer = await asyncio.open_connection("127.0.0.1", work.port, local_addr=(source(number), 0))
                writers.append(writer)
            async with asyncio.timeout(WAIT):
                while work.files < count:  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.02)
        figures.at_most("5,000 idle connections", "memory of each", (work.memory - before) * 1024 / count, 20, "KiB")
    finally:
        for writer in writers:
            writer.transport.abort()


async def test_more_connections_than_it_has_room_for_are_hung_up(start: Callable[..., Work], figures: Figures) -> None:
    work = start("?max_connections=1000&max_connections_per_peer=100")
    async with bystander(work, "300 connections where 100 may be", figures):
        here = ("127.0.1.1", 0)  # one address has no more than its share
        opened = [await asyncio.open_connection("127.0.0.1", work.port, local_addr=here) for _ in range(300)]
        try:
            took = await asyncio.gather(*(ended(reader) for reader, _ in opened[100:]))
        finally:
            for _, writer in opened:
                writer.transport.abort()

    figures.at_most("300 connections where 100 may be", "until the rest is hung up", max(took) * 1000, 1000, "ms")
