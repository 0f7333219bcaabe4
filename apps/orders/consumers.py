"""The event doors of the orders service: it hears what it says itself, in each of its processes."""

from microservices import EventConsumer, RpcContext, event_pattern

from .contracts import OrderChanged
from .watch import feed


class OrdersConsumer(EventConsumer):
    """Wakes those who watch an order, wherever it was changed."""

    @event_pattern(
        ["order_created", "order_confirmed", "order_cancelled", "order_shipped", "order_delivered", "order_refunded"],
        delivery="each",
    )
    async def order_changed(self, data: OrderChanged, ctx: RpcContext) -> None:
        """Wake those who watch this order."""
        feed.changed(data.id)
