"""What travels to and from the payments service."""

from datetime import datetime
from typing import Annotated

from msgspec import Meta, Struct

MAX_PAGE = 100

# A "$" alone would also match before a last line feed, hence the look-ahead behind it.
_ONE_LINE = r"^[^\x00-\x1f\x7f]+$(?!\n)"

Id = Annotated[str, Meta(min_length=1, max_length=36, pattern=_ONE_LINE)]
Key = Annotated[str, Meta(min_length=1, max_length=100, pattern=_ONE_LINE)]
Token = Annotated[str, Meta(min_length=1, max_length=200, pattern=_ONE_LINE)]
# Minor units. What JavaScript can count exactly is the limit: its numbers are doubles.
Amount = Annotated[int, Meta(ge=1, le=2**53 - 1)]
Reason = Annotated[str, Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)")]
Currency = Annotated[str, Meta(pattern=r"^[A-Z]{3}$(?!\n)")]
Limit = Annotated[int, Meta(ge=1, le=MAX_PAGE)]


class AuthorizePayment(Struct):
    """Ask for an amount to be held; a repeated key holds it once."""

    order_id: Id
    user_id: Id
    amount: Amount
    currency: Currency
    payment_token: Token
    idempotency_key: Key


class CapturePayment(Struct):
    """Ask for a held amount to be taken."""

    id: str
    idempotency_key: Key


class VoidPayment(Struct):
    """Ask for a held amount to be let go."""

    id: str
    idempotency_key: Key


class RefundPayment(Struct):
    """Ask for an amount of what was taken to be given back; a repeated key gives it back once."""

    id: str
    amount: Amount
    idempotency_key: Key
    reason: Reason = ""


class GetPayment(Struct):
    """Ask for one payment."""

    id: str


class GetPaymentByKey(Struct):
    """Ask what became of an `authorize_payment` with this key."""

    idempotency_key: Key


class GetPayments(Struct):
    """Ask for a page of payments, of an order or of a user."""

    order_id: Id | None = None
    user_id: Id | None = None
    cursor: str | None = None
    limit: Limit = 50


class Payment(Struct):
    """A payment as others may see it; the same travels in each `payment_*` event."""

    id: str
    order_id: str
    user_id: str
    amount: int
    currency: str
    status: str
    decline_code: str | None
    authorized_at: datetime | None
    captured_at: datetime | None
    created_at: datetime


class RefundReply(Struct):
    """A refund, and its payment as it stands by now."""

    payment: Payment
    refund_id: str
    amount: int
    status: str


class Payments(Struct):
    """A page of payments, the latest first; `next` is the cursor of the page after it, if there is one."""

    payments: list[Payment]
    next: str | None = None
