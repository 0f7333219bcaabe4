from django.db import migrations, models
from django.db.models.functions import Lower

import microservices.ids


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="User",
            fields=[
                (
                    "id",
                    models.CharField(
                        default=microservices.ids.uuid7, editable=False, max_length=36, primary_key=True, serialize=False
                    ),
                ),
                ("email", models.EmailField(blank=True, max_length=254)),
                ("name", models.CharField(blank=True, max_length=100)),
                ("password", models.CharField(max_length=128)),
                (
                    "role",
                    models.CharField(
                        choices=[("customer", "Customer"), ("support", "Support"), ("manager", "Manager")],
                        default="customer",
                        max_length=16,
                    ),
                ),
                (
                    "status",
                    models.CharField(
                        choices=[("active", "Active"), ("suspended", "Suspended"), ("deleted", "Deleted")],
                        default="active",
                        max_length=16,
                    ),
                ),
                ("version", models.PositiveIntegerField(default=1)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
            options={
                "constraints": [
                    models.UniqueConstraint(
                        Lower("email"), condition=~models.Q(email=""), name="users_user_email_unique"
                    ),
                    models.CheckConstraint(
                        condition=models.Q(email="", name="", status="deleted")
                        | (~models.Q(status="deleted") & ~models.Q(email="")),
                        name="users_user_blank_when_deleted",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(role__in=["customer", "support", "manager"]),
                        name="users_user_role_known",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(status__in=["active", "suspended", "deleted"]),
                        name="users_user_status_known",
                    ),
                    models.CheckConstraint(condition=models.Q(version__gte=1), name="users_user_version_positive"),
                ],
            },
        ),
    ]
