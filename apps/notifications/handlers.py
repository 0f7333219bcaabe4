"""The request doors of the notifications service."""

from microservices import RpcContext, message_pattern

from . import selectors, services
from .contracts import GetNotifications, MarkRead, Notifications, Unread
from .selectors import notification_shown


@message_pattern({"cmd": "get_notifications"}, retry="safe")
def get_notifications(data: GetNotifications, ctx: RpcContext) -> Notifications:
    """Return a page of a user's notifications."""
    page = selectors.notification_list(user_id=data.user_id, cursor=data.cursor, limit=data.limit)
    return Notifications(
        notifications=[notification_shown(notification) for notification in page.notifications],
        unread=selectors.unread_count(user_id=data.user_id),
        next=page.next,
    )


@message_pattern({"cmd": "mark_read"}, retry="safe")
def mark_read(data: MarkRead, ctx: RpcContext) -> Unread:
    """Mark notifications as read."""
    return Unread(unread=services.notification_read(user_id=data.user_id, notification_id=data.id))
