"""The README's example is code that runs."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from microservices.client import Client
from microservices.dispatcher import Dispatcher
from microservices.executor import Executor, lending
from microservices.handlers import handlers_in
from microservices.transports.local import LocalClient
from users.models import User

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def greetings() -> Iterator[Client]:
    """The service of the README, called in process."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "handlers.py" in block)
    module = ModuleType("greetings.handlers")
    sys.modules[module.__name__] = module  # where its annotations are looked up
    exec(compile(code, "README.md", "exec"), module.__dict__)  # noqa: S102 - our own text
    dispatcher = Dispatcher("greetings", handlers_in(module), Executor(2))
    yield Client("greetings", lambda: LocalClient(dispatcher))
    del sys.modules[module.__name__]


@pytest.mark.django_db(databases=["users"])
def test_the_service_in_20_lines_greets_a_user_of_another_service(greetings: Client) -> None:
    user = User.objects.create(name="Ada", email="ada@example.org", password="")

    with lending():
        greeting = greetings.sync.send({"cmd": "greet"}, {"user_id": user.id})

    assert greeting == {"text": "Hello, Ada!"}


def test_the_service_in_20_lines_streams(greetings: Client) -> None:
    async def collect() -> list[int]:
        return [number async for number in greetings.stream("countdown", 3)]

    numbers = asyncio.run(collect())

    assert numbers == [3, 2, 1]
