from django.db import migrations, models

import microservices.ids


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Payment",
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
                ("order_id", models.CharField(db_index=True, max_length=36)),
                ("user_id", models.CharField(max_length=36)),
                ("amount", models.PositiveBigIntegerField()),
                ("currency", models.CharField(max_length=3)),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("pending", "Pending"),
                            ("authorized", "Authorized"),
                            ("captured", "Captured"),
                            ("declined", "Declined"),
                            ("voided", "Voided"),
                            ("part_refunded", "Part Refunded"),
                            ("refunded", "Refunded"),
                            ("failed", "Failed"),
                        ],
                        default="pending",
                        max_length=16,
                    ),
                ),
                ("provider_ref", models.CharField(blank=True, max_length=100)),
                ("decline_code", models.CharField(blank=True, max_length=50)),
                ("idempotency_key", models.CharField(max_length=100, unique=True)),
                ("authorized_at", models.DateTimeField(blank=True, null=True)),
                ("captured_at", models.DateTimeField(blank=True, null=True)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
            options={
                "indexes": [models.Index(fields=["user_id", "id"], name="payments_payment_of_user")],
                "constraints": [
                    models.CheckConstraint(condition=models.Q(amount__gte=1), name="payments_payment_amount_positive"),
                    models.CheckConstraint(
                        condition=models.Q(
                            status__in=[
                                "pending",
                                "authorized",
                                "captured",
                                "declined",
                                "voided",
                                "part_refunded",
                                "refunded",
                                "failed",
                            ]
                        ),
                        name="payments_payment_status_known",
                    ),
                ],
            },
        ),
        migrations.CreateModel(
            name="Refund",
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
                ("amount", models.PositiveBigIntegerField()),
                ("reason", models.CharField(blank=True, max_length=200)),
                (
                    "status",
                    models.CharField(
                        choices=[("pending", "Pending"), ("done", "Done"), ("failed", "Failed")],
                        default="pending",
                        max_length=16,
                    ),
                ),
                ("provider_ref", models.CharField(blank=True, max_length=100)),
                ("idempotency_key", models.CharField(max_length=100, unique=True)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                ("payment", models.ForeignKey(on_delete=models.PROTECT, related_name="refunds", to="payments.payment")),
            ],
            options={
                "constraints": [
                    models.CheckConstraint(condition=models.Q(amount__gte=1), name="payments_refund_amount_positive"),
                    models.CheckConstraint(
                        condition=models.Q(status__in=["pending", "done", "failed"]),
                        name="payments_refund_status_known",
                    ),
                ],
            },
        ),
    ]
