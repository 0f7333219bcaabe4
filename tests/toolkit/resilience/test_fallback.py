"""What is answered where a service could not, and the time of one attempt."""

from __future__ import annotations

import time
from typing import Any

import pytest

from microservices.context import RpcContext
from microservices.exceptions import DeadlineExceeded, RpcException, Unavailable
from microservices.resilience.fallback import Fallback
from microservices.resilience.timeout import AttemptTimeout
from tests.toolkit.conftest import context
from tests.toolkit.resilience.conftest import Service, raw

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("error", [Unavailable("away"), DeadlineExceeded(), RpcException("a bug")])
async def test_a_service_that_could_not_answer_is_spoken_for(error: RpcException) -> None:
    told: list[Any] = []

    def fallback(data: Any, error: RpcException) -> Any:
        told.append((data, error))
        return {"name": "unknown"}

    assert await Fallback(fallback)(Service([error]))({"id": 1}, context()) == raw('{"name":"unknown"}')
    assert told == [({"id": 1}, error)]


async def test_a_fallback_may_be_asynchronous_and_may_fail() -> None:
    async def fallback(data: Any, error: RpcException) -> Any:
        raise RpcException({"statusCode": 418, "message": "neither"})

    with pytest.raises(RpcException, match="neither"):
        await Fallback(fallback)(Service([Unavailable("away")]))(None, context())


async def test_a_refusal_is_an_answer() -> None:
    gone = RpcException({"statusCode": 404, "message": "gone"})

    with pytest.raises(RpcException, match="gone"):
        await Fallback(lambda data, error: "never")(Service([gone]))(None, context())


async def test_an_attempt_has_a_deadline_of_its_own_that_does_not_outlast_the_calls() -> None:
    shop = Service(["answer"])
    endpoint = AttemptTimeout(0.5)(shop)
    short, long, none = (time.monotonic() + seconds for seconds in (0.1, 60, 0))
    call = context(deadline=long)

    await endpoint(None, call)
    await endpoint(None, context(deadline=short))
    await endpoint(None, context())

    first, second, third = (each.deadline or 0 for _, each in shop.calls)
    assert call.deadline == long
    assert first <= none + 1
    assert second == short
    assert third <= none + 1


async def test_the_id_of_the_attempt_is_that_of_the_call_in_the_log() -> None:
    async def endpoint(data: Any, context: RpcContext) -> None:
        context.id = "42"

    call = context()
    await AttemptTimeout(1)(endpoint)(None, call)

    assert call.id == "42"
