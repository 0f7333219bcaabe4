"""A Channels consumer of ours for NestJS to reach."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from msgspec import Struct

from microservices import EventConsumer, RpcContext, event_pattern


class Order(Struct):
    id: str
    total: float


class OrdersConsumer(EventConsumer):
    """Notes the orders that it hears of."""

    heard: ClassVar[asyncio.Queue[tuple[Order, str]]]

    @event_pattern("order_created")
    async def order_created(self, data: Order, ctx: RpcContext) -> None:
        self.heard.put_nowait((data, ctx.metadata.get("tenant", "")))
