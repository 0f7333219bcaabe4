"""The request doors of the payments service."""

from microservices import RpcContext, grpc_method, message_pattern

from . import selectors, services
from .contracts import (
    AuthorizePayment,
    CapturePayment,
    GetPayment,
    GetPaymentByKey,
    GetPayments,
    Payment,
    Payments,
    RefundPayment,
    RefundReply,
    VoidPayment,
)
from .selectors import payment_shown, refund_shown


@message_pattern({"cmd": "authorize_payment"}, retry="keyed")
@grpc_method("PaymentsService", "Authorize", retry="keyed")
def authorize_payment(data: AuthorizePayment, ctx: RpcContext) -> Payment:
    """Hold an amount."""
    payment = services.payment_authorize(
        order_id=data.order_id,
        user_id=data.user_id,
        amount=data.amount,
        currency=data.currency,
        token=data.payment_token,
        key=data.idempotency_key,
    )
    return payment_shown(payment)


@message_pattern({"cmd": "capture_payment"}, retry="keyed")
@grpc_method("PaymentsService", "Capture", retry="keyed")
def capture_payment(data: CapturePayment, ctx: RpcContext) -> Payment:
    """Take a held amount."""
    return payment_shown(services.payment_capture(payment_id=data.id, key=data.idempotency_key))


@message_pattern({"cmd": "void_payment"}, retry="keyed")
@grpc_method("PaymentsService", "Void", retry="keyed")
def void_payment(data: VoidPayment, ctx: RpcContext) -> Payment:
    """Let a held amount go."""
    return payment_shown(services.payment_void(payment_id=data.id, key=data.idempotency_key))


@message_pattern({"cmd": "refund_payment"}, retry="keyed")
@grpc_method("PaymentsService", "Refund", retry="keyed")
def refund_payment(data: RefundPayment, ctx: RpcContext) -> RefundReply:
    """Give back an amount of what was taken."""
    refund = services.payment_refund(
        payment_id=data.id, amount=data.amount, reason=data.reason, key=data.idempotency_key
    )
    return refund_shown(refund)


@message_pattern({"cmd": "get_payment"}, retry="safe")
@grpc_method("PaymentsService", "FindOne", retry="safe")
def get_payment(data: GetPayment, ctx: RpcContext) -> Payment:
    """Return one payment."""
    return payment_shown(selectors.payment_get(payment_id=data.id))


@message_pattern({"cmd": "get_payment_by_key"}, retry="safe")
@grpc_method("PaymentsService", "FindByKey", retry="safe")
def get_payment_by_key(data: GetPaymentByKey, ctx: RpcContext) -> Payment:
    """Return what became of a payment."""
    return payment_shown(services.payment_reconcile(key=data.idempotency_key))


@message_pattern({"cmd": "get_payments"}, retry="safe")
def get_payments(data: GetPayments, ctx: RpcContext) -> Payments:
    """Return a page of payments."""
    page = selectors.payment_list(order_id=data.order_id, user_id=data.user_id, cursor=data.cursor, limit=data.limit)
    return Payments(payments=[payment_shown(payment) for payment in page.payments], next=page.next)
