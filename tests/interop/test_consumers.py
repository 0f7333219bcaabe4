"""An event of NestJS reaches a Channels consumer of ours."""

from __future__ import annotations

import asyncio

import pytest

from microservices.consumers import consumer_handlers
from microservices.dispatcher import Dispatcher
from microservices.executor import Executor
from microservices.transports import load, parse
from tests.brokers import Valkey, own
from tests.interop import consumers
from tests.interop.nest import nest_client

WAIT = 5


@pytest.mark.interop
@pytest.mark.asyncio
async def test_an_emitter_of_nest_reaches_our_consumer(node_modules: None) -> None:
    heard = consumers.OrdersConsumer.heard = asyncio.Queue()
    executor = Executor(1)
    dispatcher = Dispatcher("ours", list(consumer_handlers("ours", consumers)), executor)
    with own(Valkey) as redis:
        listener = load(parse(redis.url), "listener")(parse(redis.url), dispatcher)
        await listener.listen()
        try:
            async with nest_client(redis.url) as nest:
                order = {"id": "o-1", "total": 9.5, "more": []}
                await nest.emit("order_created", order, metadata={"tenant": "blue"})
                told = await asyncio.wait_for(heard.get(), WAIT)
        finally:
            await listener.close(0)
            for handler in dispatcher.handlers:
                await handler.mailbox.close()
            executor.close()

    assert told == (consumers.Order("o-1", 9.5), "blue")
