"""What the notifications service can be asked."""

from typing import NamedTuple

from microservices.ids import cursor_after, id_before, is_id

from . import contracts
from .contracts import MAX_PAGE
from .exceptions import InvalidCursor, NotificationNotFound
from .models import Notification


class Page(NamedTuple):
    """Some notifications, and the cursor of those after them."""

    notifications: list[Notification]
    next: str | None


def notification_get(*, notification_id: str, user_id: str) -> Notification:
    """Return one notification of a user. Raises NotificationNotFound."""
    mine = Notification.objects.filter(user_id=user_id)
    notification = mine.filter(pk=notification_id).first() if is_id(notification_id) else None
    if notification is None:
        raise NotificationNotFound()
    return notification


def notification_list(*, user_id: str, cursor: str | None = None, limit: int = 50) -> Page:
    """Return a page of a user's notifications, the latest first. Raises InvalidCursor."""
    limit = min(limit, MAX_PAGE)
    notifications = Notification.objects.filter(user_id=user_id)
    if cursor is not None:
        notifications = notifications.filter(pk__lt=_read_cursor(cursor))
    # One more than asked for tells whether there is a next page without counting.
    rows = list(notifications.order_by("-pk")[: limit + 1])
    page = rows[:limit]
    return Page(page, cursor_after(page[-1].pk) if len(rows) > limit else None)


def unread_count(*, user_id: str) -> int:
    """Return how many notifications a user has not read."""
    return Notification.objects.filter(user_id=user_id, read_at=None).count()


def notification_shown(notification: Notification) -> contracts.Notification:
    """Return a notification as its user sees it."""
    return contracts.Notification(
        id=notification.id,
        user_id=notification.user_id,
        kind=notification.kind,
        title=notification.title,
        body=notification.body,
        data=notification.data,
        read_at=notification.read_at,
        created_at=notification.created_at,
    )


def _read_cursor(cursor: str) -> str:
    try:
        return id_before(cursor)
    except ValueError as error:
        raise InvalidCursor() from error
