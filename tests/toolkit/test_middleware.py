"""How middlewares fold around a call."""

from typing import Any

import pytest

from microservices.context import RpcContext
from microservices.middleware import Endpoint, Middleware, chain
from tests.toolkit.conftest import context


def noting(name: str, notes: list[str]) -> Middleware:
    """Make a middleware that notes when it is entered and left."""

    def middleware(endpoint: Endpoint) -> Endpoint:
        notes.append(f"fold {name}")

        async def wrapped(data: Any, context: RpcContext) -> Any:
            notes.append(f"enter {name}")
            result = await endpoint(data, context)
            notes.append(f"leave {name}")
            return f"{result} {name}"

        return wrapped

    return middleware


async def answer(data: Any, context: RpcContext) -> Any:
    """An endpoint."""
    return data


@pytest.mark.asyncio
async def test_the_first_middleware_is_the_outermost() -> None:
    notes: list[str] = []
    endpoint = chain(answer, iter([noting("first", notes), noting("second", notes)]))
    notes.clear()

    result = await endpoint("answer", context())

    assert result == "answer second first"
    assert notes == ["enter first", "enter second", "leave second", "leave first"]


@pytest.mark.asyncio
async def test_middlewares_are_folded_once_for_all_calls() -> None:
    notes: list[str] = []
    endpoint = chain(answer, [noting("only", notes)])

    for _ in range(3):
        await endpoint(1, context())

    assert notes.count("fold only") == 1
    assert notes.count("enter only") == 3


@pytest.mark.asyncio
async def test_a_middleware_may_answer_by_itself() -> None:
    def guard(endpoint: Endpoint) -> Endpoint:
        async def refused(data: Any, context: RpcContext) -> Any:
            return "refused"

        return refused

    notes: list[str] = []
    endpoint = chain(answer, [guard, noting("inner", notes)])

    assert await endpoint(1, context()) == "refused"
    assert "enter inner" not in notes


def test_without_middlewares_the_endpoint_is_itself() -> None:
    assert chain(answer, []) is answer
