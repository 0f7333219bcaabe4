"""Events on their way to a consumer, and its reports on their way back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from microservices.exceptions import RpcException, Unavailable
from microservices.mailbox import Application, Mailbox
from tests.toolkit.conftest import context

SCOPE = {"type": "event", "service": "shop", "consumer": "shop.consumers.Shop"}


@asynccontextmanager
async def mailbox(application: Application, limit: int = 50) -> AsyncIterator[Mailbox]:
    """Give a mailbox before this application."""
    mailbox = Mailbox(SCOPE, application, limit=limit)
    try:
        async with asyncio.timeout(5):
            yield mailbox
    finally:
        await mailbox.close()


async def report_all(scope: Any, receive: Any, send: Any) -> None:
    """Report every event as done, but those with an error in their payload."""
    while True:
        message = await receive()
        error = message["arguments"][0]
        if isinstance(error, Exception):
            await send({"type": "event.failed", "id": message["id"], "error": error})
        else:
            await send({"type": "event.done", "id": message["id"]})


async def turn(times: int = 10) -> None:
    """Let whatever does not wait for something go on."""
    for _ in range(times):
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_a_message_names_the_method_and_what_to_give_it() -> None:
    seen: list[Any] = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        seen.extend([scope, message])
        await send({"type": "event.done", "id": message["id"]})
        await receive()

    facts = context()
    async with mailbox(note) as box:
        await box.deliver("made", ("payload", facts), facts)

    scope, message = seen
    assert scope == {"type": "event", "service": "shop", "consumer": "shop.consumers.Shop"}
    assert message.pop("id")
    assert message == {"type": "event", "method": "made", "arguments": ("payload", facts), "context": facts}


@pytest.mark.asyncio
async def test_a_failure_reaches_the_one_who_delivered_and_no_other() -> None:
    async with mailbox(report_all) as box:
        outcomes = await asyncio.gather(
            box.deliver("made", (1,), context()),
            box.deliver("made", (ValueError("unlucky"),), context()),
            box.deliver("made", (2,), context()),
            return_exceptions=True,
        )

    assert [repr(outcome) for outcome in outcomes] == ["None", "ValueError('unlucky')", "None"]


@pytest.mark.asyncio
async def test_a_failure_without_an_error_is_one_all_the_same() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        while True:
            await send({"type": "event.failed", "id": (await receive())["id"]})

    async with mailbox(fail) as box:
        with pytest.raises(RpcException):
            await box.deliver("made", (), context())


@pytest.mark.asyncio
async def test_events_come_in_order_and_no_more_wait_than_the_limit() -> None:
    taken: list[int] = []
    go_on: asyncio.Queue[None] = asyncio.Queue()
    lengths: list[int] = []

    async def take(scope: Any, receive: Any, send: Any) -> None:
        while True:
            await go_on.get()
            message = await receive()
            taken.append(message["arguments"][0])
            await send({"type": "event.done", "id": message["id"]})

    async with mailbox(take, limit=3) as box:
        deliveries = []
        for number in range(20):
            deliveries.append(asyncio.create_task(box.deliver("made", (number,), context())))
            await turn(number % 3)
            if number % 2:
                go_on.put_nowait(None)  # room for one more, while others come
            lengths.append(box._queue.qsize())
        for _ in range(20):
            go_on.put_nowait(None)
        await asyncio.gather(*deliveries)

    assert taken == list(range(20))
    assert max(lengths) == 3


@pytest.mark.asyncio
async def test_closing_fails_what_was_taken_what_waits_and_who_waits_for_room() -> None:
    taken = asyncio.Event()

    async def hang(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        taken.set()
        await asyncio.Event().wait()

    async with mailbox(hang, limit=2) as box:
        deliveries = [asyncio.create_task(box.deliver("made", (number,), context())) for number in range(6)]
        await taken.wait()
        await turn()
        await box.close()
        outcomes = await asyncio.gather(*deliveries, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [Unavailable] * 6
    assert "The consumer shop.consumers.Shop has ended." in str(outcomes[0])


@pytest.mark.asyncio
async def test_a_consumer_that_breaks_is_told_of_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    starts = 0

    async def break_once(scope: Any, receive: Any, send: Any) -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            await receive()
            raise ValueError("broken")
        await report_all(scope, receive, send)

    async with mailbox(break_once, limit=1) as box:
        first = await asyncio.gather(
            *(box.deliver("made", (number,), context()) for number in range(3)), return_exceptions=True
        )
        await box.deliver("made", (4,), context())

    assert [type(outcome) for outcome in first] == [Unavailable] * 3
    assert starts == 2
    assert "shop.consumers.Shop has ended" in caplog.text
    assert "broken" in caplog.text


@pytest.mark.asyncio
async def test_who_gives_up_is_forgotten_and_his_report_passed_over() -> None:
    go_on, taken = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            taken.set()
            await go_on.wait()
            await send({"type": "event.done", "id": message["id"]})

    async with mailbox(slow, limit=1) as box:
        deliveries = [asyncio.create_task(box.deliver("made", (number,), context())) for number in range(4)]
        await taken.wait()
        for delivery in deliveries[:3]:  # one that is taken, one that waits, one that waits for room
            delivery.cancel()
        go_on.set()
        await asyncio.wait(deliveries)
        left = dict(box._waiting)

    assert [delivery.cancelled() for delivery in deliveries] == [True, True, True, False]
    assert left == {}


@pytest.mark.asyncio
async def test_a_closed_mailbox_opens_again_for_the_next_event() -> None:
    async with mailbox(report_all) as box:
        await box.deliver("made", (1,), context())
        await box.close()
        await box.deliver("made", (2,), context())
