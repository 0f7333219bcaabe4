"""What the payments service can be asked."""

from typing import NamedTuple

from microservices.ids import cursor_after, id_before, is_id

from . import contracts
from .contracts import MAX_PAGE
from .exceptions import InvalidCursor, PaymentNotFound
from .models import Payment, Refund


class Page(NamedTuple):
    """Some payments, and the cursor of those after them."""

    payments: list[Payment]
    next: str | None


def payment_get(*, payment_id: str, for_update: bool = False) -> Payment:
    """Return one payment, its row locked on request. Raises PaymentNotFound."""
    payments = Payment.objects.select_for_update() if for_update else Payment.objects.all()
    payment = payments.filter(pk=payment_id).first() if is_id(payment_id) else None
    if payment is None:
        raise PaymentNotFound()
    return payment


def payment_get_by_key(*, key: str) -> Payment:
    """Return the payment that was authorised with this key, or was to be. Raises PaymentNotFound."""
    payment = Payment.objects.filter(idempotency_key=key).first()
    if payment is None:
        raise PaymentNotFound()
    return payment


def payment_list(
    *, order_id: str | None = None, user_id: str | None = None, cursor: str | None = None, limit: int = 50
) -> Page:
    """Return a page of payments, the latest first. Raises InvalidCursor."""
    limit = min(limit, MAX_PAGE)
    payments = Payment.objects.all()
    if order_id is not None:
        payments = payments.filter(order_id=order_id)
    if user_id is not None:
        payments = payments.filter(user_id=user_id)
    if cursor is not None:
        payments = payments.filter(pk__lt=_read_cursor(cursor))
    # One more than asked for tells whether there is a next page without counting.
    rows = list(payments.order_by("-pk")[: limit + 1])
    page = rows[:limit]
    return Page(page, cursor_after(page[-1].pk) if len(rows) > limit else None)


def payment_shown(payment: Payment) -> contracts.Payment:
    """Return a payment as others may see it."""
    return contracts.Payment(
        id=payment.id,
        order_id=payment.order_id,
        user_id=payment.user_id,
        amount=payment.amount,
        currency=payment.currency,
        status=payment.status,
        decline_code=payment.decline_code or None,
        authorized_at=payment.authorized_at,
        captured_at=payment.captured_at,
        created_at=payment.created_at,
    )


def refund_shown(refund: Refund) -> contracts.RefundReply:
    """Return a refund as others may see it."""
    return contracts.RefundReply(
        payment=payment_shown(refund.payment), refund_id=refund.id, amount=refund.amount, status=refund.status
    )


def _read_cursor(cursor: str) -> str:
    try:
        return id_before(cursor)
    except ValueError as error:
        raise InvalidCursor() from error
