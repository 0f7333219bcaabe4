from django.db import migrations, models

import microservices.ids


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="OrderSequence",
            fields=[
                ("year", models.PositiveSmallIntegerField(primary_key=True, serialize=False)),
                ("last", models.PositiveIntegerField(default=0)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
        ),
        migrations.CreateModel(
            name="Order",
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
                ("number", models.CharField(max_length=16, unique=True)),
                ("user_id", models.CharField(max_length=36)),
                ("customer_name", models.CharField(max_length=100)),
                ("customer_email", models.EmailField(max_length=254)),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("pending", "Pending"),
                            ("confirmed", "Confirmed"),
                            ("shipped", "Shipped"),
                            ("delivered", "Delivered"),
                            ("cancelled", "Cancelled"),
                            ("refunded", "Refunded"),
                        ],
                        default="pending",
                        max_length=16,
                    ),
                ),
                ("total", models.PositiveBigIntegerField()),
                ("currency", models.CharField(max_length=3)),
                ("payment_id", models.CharField(blank=True, max_length=36)),
                ("refunded", models.PositiveBigIntegerField(default=0)),
                ("placed_at", models.DateTimeField()),
                ("confirmed_at", models.DateTimeField(blank=True, null=True)),
                ("shipped_at", models.DateTimeField(blank=True, null=True)),
                ("delivered_at", models.DateTimeField(blank=True, null=True)),
                ("cancelled_at", models.DateTimeField(blank=True, null=True)),
                ("cancel_reason", models.CharField(blank=True, max_length=50)),
                ("version", models.PositiveIntegerField(default=1)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
            options={
                "indexes": [models.Index(fields=["user_id", "id"], name="orders_order_of_user")],
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(
                            status__in=["pending", "confirmed", "shipped", "delivered", "cancelled", "refunded"]
                        ),
                        name="orders_order_status_known",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(refunded__lte=models.F("total")), name="orders_order_refunded_paid"
                    ),
                    models.CheckConstraint(condition=models.Q(version__gte=1), name="orders_order_version_positive"),
                ],
            },
        ),
        migrations.CreateModel(
            name="Product",
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
                ("sku", models.CharField(max_length=32, unique=True)),
                ("name", models.CharField(max_length=100)),
                ("description", models.TextField(blank=True)),
                ("price", models.PositiveIntegerField()),
                ("currency", models.CharField(max_length=3)),
                ("active", models.BooleanField(default=True)),
                ("on_hand", models.PositiveIntegerField(default=0)),
                ("reserved", models.PositiveIntegerField(default=0)),
                ("version", models.PositiveIntegerField(default=1)),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
            options={
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(reserved__gte=0, reserved__lte=models.F("on_hand")),
                        name="orders_product_reserved_on_hand",
                    ),
                    models.CheckConstraint(condition=models.Q(price__gte=1), name="orders_product_price_positive"),
                    models.CheckConstraint(condition=models.Q(version__gte=1), name="orders_product_version_positive"),
                ],
            },
        ),
        migrations.CreateModel(
            name="OrderLine",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("product_id", models.CharField(max_length=36)),
                ("sku", models.CharField(max_length=32)),
                ("name", models.CharField(max_length=100)),
                ("unit_price", models.PositiveIntegerField()),
                ("quantity", models.PositiveIntegerField()),
                ("line_total", models.PositiveBigIntegerField()),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                ("order", models.ForeignKey(on_delete=models.CASCADE, related_name="lines", to="orders.order")),
            ],
            options={
                "ordering": ("pk",),
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(quantity__gte=1), name="orders_orderline_quantity_positive"
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="Reservation",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("quantity", models.PositiveIntegerField()),
                (
                    "state",
                    models.CharField(
                        choices=[("held", "Held"), ("committed", "Committed"), ("released", "Released")],
                        default="held",
                        max_length=16,
                    ),
                ),
                ("expires_at", models.DateTimeField()),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                ("order", models.ForeignKey(on_delete=models.CASCADE, related_name="reservations", to="orders.order")),
                (
                    "product",
                    models.ForeignKey(on_delete=models.PROTECT, related_name="reservations", to="orders.product"),
                ),
            ],
            options={
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(quantity__gte=1), name="orders_reservation_quantity_positive"
                    ),
                    models.CheckConstraint(
                        condition=models.Q(state__in=["held", "committed", "released"]),
                        name="orders_reservation_state_known",
                    ),
                ],
            },
        ),
    ]
