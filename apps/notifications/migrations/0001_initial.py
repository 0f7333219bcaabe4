from django.db import migrations, models

import microservices.ids


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Notification",
            fields=[
                (
                    "id",
                    models.CharField(
                        default=microservices.ids.uuid7,
                        editable=False,
                        max_length=36,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                ("user_id", models.CharField(max_length=36)),
                ("kind", models.CharField(max_length=50)),
                ("title", models.CharField(max_length=200)),
                ("body", models.TextField()),
                ("data", models.JSONField(default=dict)),
                ("dedupe_key", models.CharField(max_length=200, unique=True)),
                ("read_at", models.DateTimeField(blank=True, null=True)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
            options={
                "indexes": [
                    models.Index(fields=["user_id", "id"], name="notifications_inbox"),
                    models.Index(condition=models.Q(read_at=None), fields=["user_id"], name="notifications_unread"),
                ],
            },
        ),
        migrations.CreateModel(
            name="Delivery",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("channel", models.CharField(choices=[("email", "Email"), ("inbox", "Inbox")], max_length=16)),
                ("address", models.EmailField(blank=True, max_length=254)),
                ("attempt", models.PositiveIntegerField(default=0)),
                (
                    "status",
                    models.CharField(
                        choices=[("queued", "Queued"), ("sent", "Sent"), ("failed", "Failed")],
                        default="queued",
                        max_length=16,
                    ),
                ),
                ("error", models.CharField(blank=True, max_length=200)),
                ("at", models.DateTimeField(blank=True, null=True)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                (
                    "notification",
                    models.ForeignKey(
                        on_delete=models.CASCADE, related_name="deliveries", to="notifications.notification"
                    ),
                ),
            ],
            options={
                "verbose_name_plural": "deliveries",
                "constraints": [
                    models.UniqueConstraint(
                        fields=("notification", "channel"), name="notifications_delivery_channel_unique"
                    ),
                    models.CheckConstraint(
                        condition=models.Q(channel__in=["email", "inbox"]), name="notifications_delivery_channel_known"
                    ),
                    models.CheckConstraint(
                        condition=models.Q(status__in=["queued", "sent", "failed"]),
                        name="notifications_delivery_status_known",
                    ),
                ],
            },
        ),
    ]
