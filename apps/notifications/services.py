"""What changes notifications: stored in a transaction, sent out after it."""

import logging

from django.core.mail import send_mail
from django.db import IntegrityError, transaction
from django.db.models import F
from django.utils import timezone

from . import push
from .models import Channel, Delivery, Notification, Status
from .selectors import notification_get, notification_shown, unread_count
from .texts import Facts, text

logger = logging.getLogger(__name__)


def notify(*, event_id: str, kind: str, user_id: str, facts: Facts, email: str = "") -> Notification:
    """Tell a user of an event, once: in the inbox, in the browser, and by e-mail where there is an address.

    A repeated event stores and pushes nothing more. An e-mail that is still queued goes out then:
    the process that was to send it has died.
    """
    key = f"{event_id}:{kind}"
    title, body = text(kind, facts)
    notification = Notification(user_id=user_id, kind=kind, title=title, body=body, data=dict(facts), dedupe_key=key)
    if _add(notification, email):
        push.push(notification_shown(notification))
    else:
        notification = Notification.objects.get(dedupe_key=key)
    for delivery in notification.deliveries.filter(channel=Channel.EMAIL, status=Status.QUEUED):
        _send(notification, delivery)
    return notification


def notification_read(*, user_id: str, notification_id: str | None = None) -> int:
    """Mark one notification of a user as read, or all; return how many are not. Raises NotificationNotFound."""
    with transaction.atomic(using="notifications", durable=True):
        read = Notification.objects.filter(user_id=user_id, read_at=None)
        if notification_id is not None:
            read = read.filter(pk=notification_get(notification_id=notification_id, user_id=user_id).pk)
        read.update(read_at=timezone.now())
    return unread_count(user_id=user_id)


def _add(notification: Notification, email: str) -> bool:
    # The key decides, not a look before the write: a bus may deliver an event twice at the same moment.
    try:
        with transaction.atomic(using="notifications", durable=True):
            notification.save(force_insert=True)
            # Who looks into the inbox finds it there: this way it has gone out already.
            sent = {"attempt": 1, "status": Status.SENT, "at": notification.created_at}
            deliveries = [Delivery(notification=notification, channel=Channel.INBOX, **sent)]
            if email:
                deliveries.append(Delivery(notification=notification, channel=Channel.EMAIL, address=email))
            Delivery.objects.bulk_create(deliveries)
    except IntegrityError as error:
        if "dedupe_key" in str(error):
            return False
        raise
    return True


def _send(notification: Notification, delivery: Delivery) -> None:
    status, problem = Status.SENT, ""
    try:
        send_mail(notification.title, notification.body, None, [delivery.address])
    except Exception as error:
        logger.exception("notification %s was not sent by e-mail", notification.id)
        status, problem = Status.FAILED, repr(error)[:200]
    with transaction.atomic(using="notifications", durable=True):
        Delivery.objects.filter(pk=delivery.pk).update(
            status=status, error=problem, attempt=F("attempt") + 1, at=timezone.now()
        )
