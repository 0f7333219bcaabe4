"""The event doors of the notifications service."""

from microservices import EventConsumer, RpcContext, event_pattern

from . import services
from .contracts import OrderEvent, PaymentEvent, UserEvent


class NotificationsConsumer(EventConsumer):
    """Tells people what has happened."""

    @event_pattern("user_created")
    def user_created(self, data: UserEvent, ctx: RpcContext) -> None:
        """Welcome a new customer."""
        services.notify(
            event_id=_event_id(ctx, data.id),
            kind="user_created",
            user_id=data.id,
            facts={"name": data.name},
            email=data.email,
        )

    @event_pattern("order_created")
    def order_created(self, data: OrderEvent, ctx: RpcContext) -> None:
        """Say that an order has arrived."""
        _tell_of_order("order_created", data, ctx)

    @event_pattern("order_confirmed")
    def order_confirmed(self, data: OrderEvent, ctx: RpcContext) -> None:
        """Say that an order is on its way to be packed."""
        _tell_of_order("order_confirmed", data, ctx)

    @event_pattern("order_cancelled")
    def order_cancelled(self, data: OrderEvent, ctx: RpcContext) -> None:
        """Say that an order will not come, and why."""
        _tell_of_order("order_cancelled", data, ctx)

    @event_pattern("payment_captured")
    def payment_captured(self, data: PaymentEvent, ctx: RpcContext) -> None:
        """Thank for a payment."""
        _tell_of_payment("payment_captured", data, ctx)

    @event_pattern("payment_failed")
    def payment_failed(self, data: PaymentEvent, ctx: RpcContext) -> None:
        """Say that a payment was declined."""
        _tell_of_payment("payment_failed", data, ctx)


def _tell_of_order(kind: str, order: OrderEvent, ctx: RpcContext) -> None:
    services.notify(
        event_id=_event_id(ctx, order.id),
        kind=kind,
        user_id=order.customer.id,
        facts={
            "order_id": order.id,
            "number": order.number,
            "name": order.customer.name,
            "amount": order.total,
            "currency": order.currency,
            "reason": order.cancel_reason,
        },
        email=order.customer.email,
    )


def _tell_of_payment(kind: str, payment: PaymentEvent, ctx: RpcContext) -> None:
    # The event knows no address: it is for the inbox and the browser alone.
    services.notify(
        event_id=_event_id(ctx, payment.id),
        kind=kind,
        user_id=payment.user_id,
        facts={
            "payment_id": payment.id,
            "order_id": payment.order_id,
            "amount": payment.amount,
            "currency": payment.currency,
            "reason": payment.decline_code,
        },
    )


def _event_id(ctx: RpcContext, subject: str) -> str:
    """Return what tells a repeated event from another: its id, or what happened to whom."""
    id = ctx.metadata.get("id")
    # A peer may send anything there.
    return id if isinstance(id, str) and 0 < len(id) <= 100 else f"{ctx.pattern}:{subject}"
