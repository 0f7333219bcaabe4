"""What the users service keeps."""

from django.db import models
from django.db.models import Q
from django.db.models.functions import Lower

from microservices.ids import uuid7

EMAIL_UNIQUE = "users_user_email_unique"


class Role(models.TextChoices):
    """What a user may do in the shop."""

    CUSTOMER = "customer"
    SUPPORT = "support"
    MANAGER = "manager"


class Status(models.TextChoices):
    """Whether a user may use the shop at all."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    DELETED = "deleted"


class User(models.Model):
    """A customer or a member of staff. The row of a deleted user stays, without the person."""

    id = models.CharField(primary_key=True, max_length=36, default=uuid7, editable=False)
    email = models.EmailField(blank=True)
    name = models.CharField(max_length=100, blank=True)
    password = models.CharField(max_length=128)
    role = models.CharField(max_length=16, choices=Role.choices, default=Role.CUSTOMER)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.ACTIVE)
    version = models.PositiveIntegerField(default=1)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = (
            # Deleted users all have the same empty address.
            models.UniqueConstraint(Lower("email"), condition=~Q(email=""), name=EMAIL_UNIQUE),
            models.CheckConstraint(
                condition=Q(status="deleted", email="", name="") | (~Q(status="deleted") & ~Q(email="")),
                name="users_user_blank_when_deleted",
            ),
            models.CheckConstraint(condition=Q(role__in=Role.values), name="users_user_role_known"),
            models.CheckConstraint(condition=Q(status__in=Status.values), name="users_user_status_known"),
            models.CheckConstraint(condition=Q(version__gte=1), name="users_user_version_positive"),
        )

    def __str__(self) -> str:
        return self.email or self.id
