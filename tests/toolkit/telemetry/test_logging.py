"""One line a call."""

import asyncio
import io
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from microservices.context import RpcContext
from microservices.exceptions import ConfigurationError, DeadlineExceeded, RpcException
from microservices.middleware import Endpoint
from microservices.telemetry.logging import CallLog, JsonFormatter
from tests.toolkit.conftest import context

SECRET = "a payload that is nobody's business"


class Lines(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.came.set()


@pytest.fixture
def logger(request: pytest.FixtureRequest) -> logging.Logger:
    """A logger of this test alone: the thread of another's log may still write."""
    return logging.getLogger(f"tests.{request.node.name}")


@pytest.fixture
def lines(logger: logging.Logger) -> Iterator[Lines]:
    """What the logger was given."""
    handler = Lines()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
def calls(logger: logging.Logger, lines: Lines) -> CallLog:
    """A call log that writes to `lines`."""
    return CallLog(logger, limit=10)


def raising(error: BaseException) -> Endpoint:
    """Make an endpoint that fails."""

    async def fail(data: Any, context: RpcContext) -> Any:
        raise error

    return fail


async def answer(data: Any, context: RpcContext) -> Any:
    """An endpoint that answers."""
    return data


async def stream(data: Any, context: RpcContext) -> AsyncIterator[Any]:
    """An endpoint that streams; an exception among the values is raised."""

    async def values() -> AsyncIterator[Any]:
        for value in data:
            if isinstance(value, BaseException):
                raise value
            yield value

    return values()


def fields(calls: CallLog, lines: Lines) -> list[dict[str, Any]]:
    """Return the fields of all lines so far."""
    calls.flush()
    return [record.fields for record in lines.records]  # type: ignore[attr-defined]


@pytest.mark.asyncio
async def test_a_call_is_one_line_with_its_facts(calls: CallLog, lines: Lines) -> None:
    facts = {"pattern": '{"cmd":"get_user"}', "peer": "10.0.0.1:5", "raw_id": "1a", "transport": "tcp"}

    result = await calls(answer)(SECRET, context(**facts))

    (line,) = fields(calls, lines)
    assert result == SECRET
    assert line.pop("ms") >= 0
    assert line == {
        "side": "server",
        "service": "shop",
        "pattern": "get_user",
        "status": 200,
        "transport": "tcp",
        "peer": "10.0.0.1:5",
        "id": "1a",
    }
    assert lines.records[0].getMessage().startswith("server shop get_user 200 ")


@pytest.mark.asyncio
async def test_the_time_of_a_call_is_told_in_milliseconds(calls: CallLog, lines: Lines) -> None:
    async def slow(data: Any, context: RpcContext) -> None:
        await asyncio.sleep(0.02)

    await calls(slow)(None, context())

    assert 20 <= fields(calls, lines)[0]["ms"] < 2000


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "status", "level"),
    [
        (RpcException({"statusCode": 404, "message": SECRET}), 404, logging.INFO),
        (RpcException(SECRET), 500, logging.WARNING),
        (DeadlineExceeded(), 504, logging.WARNING),
        (ValueError(SECRET), 500, logging.WARNING),
        (asyncio.CancelledError(), 499, logging.INFO),
    ],
)
async def test_a_failed_call_is_one_line_with_its_status(
    calls: CallLog, lines: Lines, error: BaseException, status: int, level: int
) -> None:
    with pytest.raises(type(error)) as caught:
        await calls(raising(error))(SECRET, context())

    assert caught.value is error
    assert [line["status"] for line in fields(calls, lines)] == [status]
    assert lines.records[0].levelno == level


@pytest.mark.asyncio
async def test_a_call_that_is_cut_off_at_its_deadline_is_504(calls: CallLog, lines: Lines) -> None:
    late = context()
    late.cap_deadline(0)

    with pytest.raises(asyncio.CancelledError):
        await calls(raising(asyncio.CancelledError()))(None, late)

    assert [line["status"] for line in fields(calls, lines)] == [504]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("values", "status"),
    [([1, 2, 3], 200), ([], 200), ([1, RpcException({"statusCode": 409})], 409), ([1, ValueError(SECRET)], 500)],
)
async def test_a_stream_is_one_line_when_it_ends(calls: CallLog, lines: Lines, values: list[Any], status: int) -> None:
    taken, before_the_end = [], []

    try:
        async for value in await calls(stream)(values, context()):
            taken.append(value)
            before_the_end += fields(calls, lines)
    except (RpcException, ValueError) as error:
        taken.append(error)

    assert taken == values
    assert before_the_end == []
    assert [line["status"] for line in fields(calls, lines)] == [status]


@pytest.mark.asyncio
async def test_a_stream_that_its_reader_leaves_is_no_failure_and_is_closed(calls: CallLog, lines: Lines) -> None:
    closed = []

    async def endless(data: Any, context: RpcContext) -> AsyncIterator[int]:
        async def values() -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
            finally:
                closed.append(True)

        return values()

    values = await calls(endless)(None, context())
    await anext(values)
    await values.aclose()

    assert [line["status"] for line in fields(calls, lines)] == [499]
    assert lines.records[0].levelno == logging.INFO
    assert closed == [True]


@pytest.mark.asyncio
async def test_no_payload_and_no_answer_is_in_a_line(calls: CallLog, lines: Lines) -> None:
    await calls(answer)(SECRET, context(metadata={"identity": SECRET}))
    with pytest.raises(RpcException):
        await calls(raising(RpcException(SECRET)))(SECRET, context())
    calls.flush()

    for record in lines.records:
        for formatter in (logging.Formatter("%(message)s"), JsonFormatter()):
            assert SECRET not in formatter.format(record)


@pytest.mark.asyncio
async def test_lines_that_nobody_writes_are_bounded_and_counted(
    calls: CallLog, lines: Lines, losses: Callable[[str, str], int]
) -> None:
    logged = calls(answer)

    with calls._writing:  # the writer is held up
        for _ in range(25):
            await logged(None, context())

    assert len(fields(calls, lines)) == 10
    assert losses("call-log", "full") == 15


@pytest.mark.asyncio
async def test_lines_are_written_without_being_asked_for(calls: CallLog, lines: Lines) -> None:
    await calls(answer)(None, context())

    assert await asyncio.to_thread(lines.came.wait, 5)


@pytest.mark.asyncio
async def test_a_line_has_the_time_of_its_call_not_of_its_writing(calls: CallLog, lines: Lines) -> None:
    with calls._writing:  # the writer is held up
        await calls(answer)(None, context())
        ended = time.time()
    fields(calls, lines)
    await asyncio.to_thread(lines.came.wait, 5)

    assert lines.records[0].created <= ended


@pytest.mark.asyncio
async def test_a_beat_is_told_only_to_those_who_look_closely_unless_it_fails(calls: CallLog, lines: Lines) -> None:
    await calls(answer)(None, context(pattern="instance_up"))
    with pytest.raises(RpcException):
        await calls(raising(RpcException()))(None, context(pattern="instance_up"))
    await calls(answer)(None, context(pattern="instance_down"))
    calls.flush()

    assert [record.levelno for record in lines.records] == [logging.DEBUG, logging.WARNING, logging.INFO]


@pytest.mark.asyncio
async def test_a_level_that_is_switched_off_is_not_written(
    calls: CallLog, lines: Lines, logger: logging.Logger
) -> None:
    logger.setLevel(logging.WARNING)

    await calls(answer)(None, context())
    with pytest.raises(RpcException):
        await calls(raising(RpcException()))(None, context())

    assert [line["status"] for line in fields(calls, lines)] == [500]


# JSON


def formatted(log: Callable[[logging.Logger], None]) -> dict[str, Any]:
    """Return what the formatter makes of one record."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("tests.json")
    logger.propagate = False
    logger.addHandler(handler)
    try:
        log(logger)
    finally:
        logger.removeHandler(handler)
    (line,) = out.getvalue().splitlines()
    return dict(json.loads(line))


def test_a_record_is_one_line_of_json() -> None:
    line = formatted(lambda logger: logger.warning("two\nlines for %s", "é"))

    assert (line["level"], line["logger"], line["message"]) == ("WARNING", "tests.json", "two\nlines for é")
    assert line["time"][10] == "T"


def test_an_exception_is_in_the_same_line() -> None:
    def fail(logger: logging.Logger) -> None:
        try:
            raise LookupError("gone")
        except LookupError:
            logger.exception("failed")

    line = formatted(fail)

    assert line["message"] == "failed"
    assert "LookupError: gone" in line["exception"]


@pytest.mark.asyncio
async def test_a_call_is_json_by_its_facts(calls: CallLog, lines: Lines) -> None:
    await calls(answer)(None, context(pattern="order_created", raw_id=None))
    calls.flush()

    line = json.loads(JsonFormatter().format(lines.records[0]))

    assert (line["pattern"], line["status"], line["id"], line["peer"]) == ("order_created", 200, "-", "-")
    assert "message" not in line


@pytest.mark.asyncio
@pytest.mark.parametrize("in_place", [True, False])
async def test_a_part_of_the_calls_is_noted_and_every_failure(
    logger: logging.Logger, lines: Lines, in_place: bool
) -> None:
    calls = CallLog(logger, sample=0.25)

    def handle(data: Any, context: RpcContext) -> Any:
        if data == "bad":
            raise RpcException({"statusCode": 409, "message": "no"})
        return data

    async def endpoint(data: Any, context: RpcContext) -> Any:
        return handle(data, context)

    async def call(data: Any) -> None:
        if in_place:
            calls.in_place(handle)(data, context())
        else:
            await calls(endpoint)(data, context())

    for _ in range(8):
        await call("good")
    for _ in range(3):
        with pytest.raises(RpcException):
            await call("bad")

    assert [line["status"] for line in fields(calls, lines)] == [200, 200, 409, 409, 409]


@pytest.mark.asyncio
async def test_a_bug_in_an_inline_handler_is_one_line_of_status_500(calls: CallLog, lines: Lines) -> None:
    def broken(data: Any, context: RpcContext) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calls.in_place(broken)(None, context())

    assert [line["status"] for line in fields(calls, lines)] == [500]


@pytest.mark.parametrize("sample", [-0.1, 1.1])
def test_a_sample_is_a_part(sample: float) -> None:
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        CallLog(sample=sample)
