"""What the payments service keeps."""

from django.db import models
from django.db.models import Q

from microservices.ids import uuid7


class Status(models.TextChoices):
    """How far a payment has come."""

    PENDING = "pending"
    AUTHORIZED = "authorized"
    CAPTURED = "captured"
    DECLINED = "declined"
    VOIDED = "voided"
    PART_REFUNDED = "part_refunded"
    REFUNDED = "refunded"
    FAILED = "failed"


class RefundStatus(models.TextChoices):
    """How far a refund has come."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Payment(models.Model):
    """Money for an order. The token that it is paid with is not kept."""

    id = models.CharField(primary_key=True, max_length=36, default=uuid7, editable=False)
    order_id = models.CharField(max_length=36, db_index=True)
    user_id = models.CharField(max_length=36)
    amount = models.PositiveBigIntegerField()
    currency = models.CharField(max_length=3)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.PENDING)
    provider_ref = models.CharField(max_length=100, blank=True)
    decline_code = models.CharField(max_length=50, blank=True)
    idempotency_key = models.CharField(max_length=100, unique=True)
    authorized_at = models.DateTimeField(null=True, blank=True)
    captured_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes = (models.Index(fields=["user_id", "id"], name="payments_payment_of_user"),)
        constraints = (
            models.CheckConstraint(condition=Q(amount__gte=1), name="payments_payment_amount_positive"),
            models.CheckConstraint(condition=Q(status__in=Status.values), name="payments_payment_status_known"),
        )

    def __str__(self) -> str:
        return f"{self.amount} {self.currency} for {self.order_id}"


class Refund(models.Model):
    """Money of a captured payment that goes back."""

    id = models.CharField(primary_key=True, max_length=36, default=uuid7, editable=False)
    payment = models.ForeignKey(Payment, on_delete=models.PROTECT, related_name="refunds")
    amount = models.PositiveBigIntegerField()
    reason = models.CharField(max_length=200, blank=True)
    status = models.CharField(max_length=16, choices=RefundStatus.choices, default=RefundStatus.PENDING)
    provider_ref = models.CharField(max_length=100, blank=True)
    idempotency_key = models.CharField(max_length=100, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = (
            models.CheckConstraint(condition=Q(amount__gte=1), name="payments_refund_amount_positive"),
            models.CheckConstraint(condition=Q(status__in=RefundStatus.values), name="payments_refund_status_known"),
        )

    def __str__(self) -> str:
        return f"{self.amount} of {self.payment_id}"
