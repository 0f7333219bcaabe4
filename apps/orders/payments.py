"""What the orders service asks of payments, and what it needs to know of the answer."""

import logging
from http import HTTPStatus
from typing import Any

from msgspec import Struct

from microservices import RpcException, clients
from microservices.context import beyond_deadline

from .exceptions import PaymentDeclined, PaymentUnknown
from .models import Order

logger = logging.getLogger(__name__)

# Short of the five seconds that a caller usually waits: some must be left to ask what became of it.
AUTHORIZE_TIMEOUT = 3.0
ASK_TIMEOUT = 1.0

# States of a payment whose money was taken, whatever of it has gone back.
TAKEN = ("captured", "part_refunded", "refunded")


class Payment(Struct):
    """What matters of a payment here."""

    id: str
    status: str
    decline_code: str | None = None


class Refund(Struct):
    """What matters of a refund here."""

    amount: int


def authorize(order: Order, *, token: str) -> Payment:
    """Have the total of an order held. Raises PaymentDeclined, and PaymentUnknown when nobody can say."""
    data = {
        "order_id": order.id,
        "user_id": order.user_id,
        "amount": order.total,
        "currency": order.currency,
        "payment_token": token,
        "idempotency_key": f"{order.id}:authorize",
    }
    cause: RpcException | None = None
    try:
        payment: Payment | None = _send("authorize_payment", data, AUTHORIZE_TIMEOUT)
    except RpcException as error:
        if error.status_code == HTTPStatus.PAYMENT_REQUIRED:
            raise PaymentDeclined(order.id, _decline_code(error)) from error
        logger.warning("order %s: authorize_payment failed: %s", order.id, error)
        cause = error
        payment = _ask(order)
    if payment is not None and payment.status in ("authorized", "captured"):
        return payment
    if payment is not None and payment.status == "declined":
        raise PaymentDeclined(order.id, payment.decline_code or "declined") from cause
    late = cause is not None and cause.status_code == HTTPStatus.GATEWAY_TIMEOUT
    raise PaymentUnknown(order.id, late=late, payment_id=payment.id if payment else None) from cause


def capture(order: Order) -> None:
    """Have what is held for an order taken. Raises RpcException."""
    with beyond_deadline():
        _send("capture_payment", {"id": order.payment_id, "idempotency_key": f"{order.id}:capture"}, AUTHORIZE_TIMEOUT)


def void(order: Order, *, payment_id: str) -> None:
    """Have what is held for an order let go, if that can be done now."""
    try:
        with beyond_deadline():
            _send("void_payment", {"id": payment_id, "idempotency_key": f"{order.id}:void"}, ASK_TIMEOUT)
    except RpcException as error:
        # The provider lets go by itself after some days, and the order is cancelled already.
        logger.error("order %s: payment %s was not voided: %s", order.id, payment_id, error)


def give_back(order: Order) -> int:
    """Let go what is held for a cancelled order, or give back what was taken; return how much that was.

    Raises RpcException where it could not be done now; what was done of it is not done again by a repeat.
    """
    with beyond_deadline():
        payment = _of(order)
        if payment is None or (payment.status not in TAKEN and _let_go(order, payment)):
            return 0
        return _refund(order, payment)


def _of(order: Order) -> Payment | None:
    """Return the payment of an order; None where it has never been asked for."""
    if order.payment_id:
        return _send("get_payment", {"id": order.payment_id}, ASK_TIMEOUT)
    try:
        return _send("get_payment_by_key", {"idempotency_key": f"{order.id}:authorize"}, ASK_TIMEOUT)
    except RpcException as error:
        if error.status_code == HTTPStatus.NOT_FOUND:
            return None
        raise


def _let_go(order: Order, payment: Payment) -> bool:
    """Let go what is held; False where it turns out to be taken."""
    try:
        _send("void_payment", {"id": payment.id, "idempotency_key": f"{order.id}:void"}, ASK_TIMEOUT)
    except RpcException as error:
        if error.status_code != HTTPStatus.CONFLICT:
            raise
        # A capture is under way, or its answer was lost: with its own key it is brought to an end, not repeated.
        data = {"id": payment.id, "idempotency_key": f"{order.id}:capture"}
        _send("capture_payment", data, AUTHORIZE_TIMEOUT)
        return False
    return True


def _refund(order: Order, payment: Payment) -> int:
    data = {
        "id": payment.id,
        "amount": order.total - order.refunded,
        "reason": order.cancel_reason,
        "idempotency_key": f"{order.id}:refund",
    }
    sync = clients["payments"].sync
    refund: Refund = sync.send({"cmd": "refund_payment"}, data, returns=Refund, timeout=AUTHORIZE_TIMEOUT)
    return refund.amount


def _ask(order: Order) -> Payment | None:
    """Return what became of the authorisation, as far as payments can tell now."""
    try:
        with beyond_deadline():
            return _send("get_payment_by_key", {"idempotency_key": f"{order.id}:authorize"}, ASK_TIMEOUT)
    except RpcException as error:
        logger.warning("order %s: what became of its payment is unknown: %s", order.id, error)
        return None


def _send(pattern: str, data: dict[str, Any], timeout: float) -> Payment:
    payment: Payment = clients["payments"].sync.send({"cmd": pattern}, data, returns=Payment, timeout=timeout)
    return payment


def _decline_code(error: RpcException) -> str:
    code = error.error.get("decline_code") if isinstance(error.error, dict) else None
    return code if isinstance(code, str) else "declined"
