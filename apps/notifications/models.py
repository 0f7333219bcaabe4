"""What the notifications service keeps."""

from django.db import models
from django.db.models import Q

from microservices.ids import uuid7


class Channel(models.TextChoices):
    """By which way a notification goes out."""

    EMAIL = "email"
    INBOX = "inbox"


class Status(models.TextChoices):
    """How far a delivery has come."""

    QUEUED = "queued"
    SENT = "sent"
    FAILED = "failed"


class Notification(models.Model):
    """Something that a user is told, once for each event: that is what `dedupe_key` is for."""

    id = models.CharField(primary_key=True, max_length=36, default=uuid7, editable=False)
    user_id = models.CharField(max_length=36)
    kind = models.CharField(max_length=50)
    title = models.CharField(max_length=200)
    body = models.TextField()
    data = models.JSONField(default=dict)
    dedupe_key = models.CharField(max_length=200, unique=True)
    read_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes = (
            models.Index(fields=["user_id", "id"], name="notifications_inbox"),
            models.Index(fields=["user_id"], condition=Q(read_at=None), name="notifications_unread"),
        )

    def __str__(self) -> str:
        return self.title


class Delivery(models.Model):
    """One way on which a notification goes out, and how that went."""

    notification = models.ForeignKey(Notification, on_delete=models.CASCADE, related_name="deliveries")
    channel = models.CharField(max_length=16, choices=Channel.choices)
    address = models.EmailField(blank=True)
    attempt = models.PositiveIntegerField(default=0)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.QUEUED)
    error = models.CharField(max_length=200, blank=True)
    at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        verbose_name_plural = "deliveries"
        constraints = (
            models.UniqueConstraint(fields=["notification", "channel"], name="notifications_delivery_channel_unique"),
            models.CheckConstraint(
                condition=Q(channel__in=Channel.values), name="notifications_delivery_channel_known"
            ),
            models.CheckConstraint(condition=Q(status__in=Status.values), name="notifications_delivery_status_known"),
        )

    def __str__(self) -> str:
        return f"{self.channel}, {self.status}"
