"""What travels to and from the notifications service, and what it needs of the events that it hears."""

from datetime import datetime
from typing import Annotated, Any

from msgspec import Meta, Struct

MAX_PAGE = 100

# A "$" alone would also match before a last line feed, hence the look-ahead behind it.
_ONE_LINE = r"^[^\x00-\x1f\x7f]+$(?!\n)"

Id = Annotated[str, Meta(min_length=1, max_length=36, pattern=_ONE_LINE)]
Text = Annotated[str, Meta(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)")]
Email = Annotated[str, Meta(min_length=1, max_length=254, pattern=_ONE_LINE)]
Amount = Annotated[int, Meta(ge=0)]
Limit = Annotated[int, Meta(ge=1, le=MAX_PAGE)]


class GetNotifications(Struct):
    """Ask for a page of a user's notifications."""

    user_id: Id
    cursor: str | None = None
    limit: Limit = 50


class MarkRead(Struct):
    """Say that a user has read one notification; without `id`, all of them."""

    user_id: Id
    id: str | None = None


class Notification(Struct):
    """A notification as its user sees it."""

    id: str
    user_id: str
    kind: str
    title: str
    body: str
    data: dict[str, Any]
    read_at: datetime | None
    created_at: datetime


class Notifications(Struct):
    """A page of notifications, the latest first, and how many of all are unread."""

    notifications: list[Notification]
    unread: int
    next: str | None = None


class Unread(Struct):
    """How many notifications a user has not read."""

    unread: int


class UserEvent(Struct):
    """Somebody who has registered."""

    id: Id
    name: Text
    email: Email


class OrderEvent(Struct):
    """An order that has moved on."""

    id: Id
    number: Text
    customer: UserEvent
    total: Amount
    currency: Text
    cancel_reason: Text | None = None


class PaymentEvent(Struct):
    """A payment that has moved on."""

    id: Id
    order_id: Id
    user_id: Id
    amount: Amount
    currency: Text
    decline_code: Text | None = None
