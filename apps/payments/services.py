"""What changes payments: the provider is asked between transactions, never inside one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import transaction
from django.db.models import Sum
from django.utils import timezone

from microservices.db import emit_on_commit

from .exceptions import KeyReused, PaymentDeclined, ProviderSilent, RefundTooLarge, WrongState
from .models import Payment, Refund, RefundStatus, Status
from .provider import Charge, NoAnswer, Provider, Refused, get_provider
from .selectors import payment_get, payment_get_by_key, payment_shown

# States of a payment whose money was taken, whatever of it has gone back.
_TAKEN = (Status.CAPTURED, Status.PART_REFUNDED, Status.REFUNDED)


def payment_authorize(*, order_id: str, user_id: str, amount: int, currency: str, token: str, key: str) -> Payment:
    """Hold an amount; a repeat with the same key returns the first payment.

    Raises PaymentDeclined, KeyReused, and ProviderSilent when the outcome is unknown.
    """
    # Committed before the provider is asked: should this process die meanwhile, the key still
    # leads to what became of it.
    with transaction.atomic(using="payments", durable=True):
        payment, _ = Payment.objects.get_or_create(
            idempotency_key=key,
            defaults={"order_id": order_id, "user_id": user_id, "amount": amount, "currency": currency},
        )
    if (payment.order_id, payment.amount, payment.currency) != (order_id, amount, currency):
        raise KeyReused()
    if payment.status == Status.PENDING:
        # Also for a repeat, whose first call may never have come this far: the provider knows the key.
        with _provider(payment) as provider:
            charge = provider.authorize(key=key, token=token, amount=amount, currency=currency)
        _settle(payment, charge)
    if payment.status == Status.DECLINED:
        raise PaymentDeclined(payment.decline_code)
    return payment


def payment_reconcile(*, key: str) -> Payment:
    """Return what became of a payment, asking the provider where that is open.

    Raises PaymentNotFound and ProviderSilent.
    """
    payment = payment_get_by_key(key=key)
    _ask_if_pending(payment)
    return payment


def payment_capture(*, payment_id: str, key: str) -> Payment:
    """Take a held amount; what is taken already stays so. Raises PaymentNotFound, WrongState, ProviderSilent."""
    payment = payment_get(payment_id=payment_id)
    if payment.status == Status.AUTHORIZED:
        with _provider(payment) as provider:
            provider.capture(key=key, ref=payment.provider_ref, amount=payment.amount)
        captured = {"status": Status.CAPTURED, "captured_at": timezone.now()}
        _move(payment, "payment_captured", before=Status.AUTHORIZED, **captured)
    if payment.status not in _TAKEN:
        raise WrongState(payment.status)
    return payment


def payment_void(*, payment_id: str, key: str) -> Payment:
    """Let a held amount go; nothing happens where none is held. Raises PaymentNotFound, WrongState, ProviderSilent."""
    payment = payment_get(payment_id=payment_id)
    _ask_if_pending(payment)
    if payment.status == Status.PENDING:
        # The provider may still be at it: whoever waits for its answer will find the payment voided.
        _move(payment, "payment_voided", before=Status.PENDING, status=Status.VOIDED)
    if payment.status == Status.AUTHORIZED:
        with _provider(payment) as provider:
            provider.void(key=key, ref=payment.provider_ref)
        _move(payment, "payment_voided", before=Status.AUTHORIZED, status=Status.VOIDED)
    if payment.status in _TAKEN:
        raise WrongState(payment.status)
    return payment


def payment_refund(*, payment_id: str, amount: int, reason: str, key: str) -> Refund:
    """Give back an amount of what was taken; a repeat with the same key returns the first refund.

    Raises PaymentNotFound, WrongState, KeyReused, RefundTooLarge, and ProviderSilent when the outcome is
    unknown: the refund is pending then, and a repeat finishes it.
    """
    refund = _open_refund(payment_id, amount, reason, key)
    if refund.status == RefundStatus.PENDING:
        # Also for a repeat, as in payment_authorize.
        try:
            with _provider(refund.payment) as provider:
                ref = provider.refund(key=key, ref=refund.payment.provider_ref, amount=amount)
        except WrongState:
            _end_refund(refund, status=RefundStatus.FAILED)
            raise
        _end_refund(refund, status=RefundStatus.DONE, provider_ref=ref)
    if refund.status == RefundStatus.FAILED:
        raise WrongState(refund.payment.status)
    return refund


def _open_refund(payment_id: str, amount: int, reason: str, key: str) -> Refund:
    with transaction.atomic(using="payments", durable=True):
        # Locked: of two refunds at once, the second must see what the first has left.
        payment = payment_get(payment_id=payment_id, for_update=True)
        refund = Refund.objects.filter(idempotency_key=key).first()
        if refund is None:
            _check_left(payment, amount)
            facts = {"payment": payment, "amount": amount, "reason": reason}
            # Another payment's refund, which this lock does not hold up, may take the key meanwhile.
            refund, _ = Refund.objects.get_or_create(idempotency_key=key, defaults=facts)
    if (refund.payment_id, refund.amount) != (payment.id, amount):
        raise KeyReused()
    refund.payment = payment
    return refund


def _check_left(payment: Payment, amount: int) -> None:
    if payment.status not in (Status.CAPTURED, Status.PART_REFUNDED):
        raise WrongState(payment.status)
    # Those that are pending count: the provider may have given that money back already.
    left = payment.amount - _refunded(payment, RefundStatus.PENDING, RefundStatus.DONE)
    if amount > left:
        raise RefundTooLarge(left)


def _end_refund(refund: Refund, **after: Any) -> None:
    """Settle a pending refund, unless somebody else was faster; either way it and its payment are as stored then."""
    with transaction.atomic(using="payments", durable=True):
        payment = payment_get(payment_id=refund.payment_id, for_update=True)
        ended = Refund.objects.filter(pk=refund.pk, status=RefundStatus.PENDING).update(**after)
        refund.refresh_from_db()
        refund.payment = payment
        if ended and refund.status == RefundStatus.DONE:
            whole = _refunded(payment, RefundStatus.DONE) == payment.amount
            payment.status = Status.REFUNDED if whole else Status.PART_REFUNDED
            payment.save(update_fields=["status"])
            emit_on_commit("payment_refunded", payment_shown(payment), using="payments")


def _refunded(payment: Payment, *statuses: RefundStatus) -> int:
    total: int | None = payment.refunds.filter(status__in=statuses).aggregate(total=Sum("amount"))["total"]
    return total or 0


def _ask_if_pending(payment: Payment) -> None:
    if payment.status != Status.PENDING:
        return
    with _provider(payment) as provider:
        charge = provider.find(key=payment.idempotency_key)
    if charge is not None:
        _settle(payment, charge)


def _settle(payment: Payment, charge: Charge) -> None:
    if charge.state == "declined":
        declined = {"status": Status.DECLINED, "decline_code": charge.decline_code}
        _move(payment, "payment_failed", before=Status.PENDING, **declined)
        return
    authorized = {"status": Status.AUTHORIZED, "provider_ref": charge.ref, "authorized_at": timezone.now()}
    _move(payment, "payment_authorized", before=Status.PENDING, **authorized)
    if payment.status == Status.VOIDED:
        # Voided while the provider was at it: only here is it known that the money is held after all.
        with _provider(payment) as provider:
            provider.void(key=f"{payment.id}:void", ref=charge.ref)


def _move(payment: Payment, event: str, *, before: Status, **after: Any) -> None:
    """Change a payment and tell so, unless somebody else was faster; either way it is as stored then."""
    with transaction.atomic(using="payments", durable=True):
        # The condition decides, not what was read before the provider was asked.
        moved = Payment.objects.filter(pk=payment.pk, status=before).update(**after)
        payment.refresh_from_db()
        if moved:
            emit_on_commit(event, payment_shown(payment), using="payments")


@contextmanager
def _provider(payment: Payment) -> Iterator[Provider]:
    try:
        yield get_provider()
    except NoAnswer as error:
        raise ProviderSilent() from error
    except Refused as error:
        raise WrongState(payment.status) from error
