"""What the orders service keeps."""

from django.db import models
from django.db.models import F, Q

from microservices.ids import uuid7


class Status(models.TextChoices):
    """How far an order has come."""

    PENDING = "pending"
    CONFIRMED = "confirmed"
    SHIPPED = "shipped"
    DELIVERED = "delivered"
    CANCELLED = "cancelled"
    REFUNDED = "refunded"


class State(models.TextChoices):
    """What became of reserved stock."""

    HELD = "held"
    COMMITTED = "committed"
    RELEASED = "released"


class Product(models.Model):
    """Something to sell: `reserved` of what is `on_hand` is promised to orders that are not paid yet."""

    id = models.CharField(primary_key=True, max_length=36, default=uuid7, editable=False)
    sku = models.CharField(max_length=32, unique=True)
    name = models.CharField(max_length=100)
    description = models.TextField(blank=True)
    price = models.PositiveIntegerField()
    currency = models.CharField(max_length=3)
    active = models.BooleanField(default=True)
    on_hand = models.PositiveIntegerField(default=0)
    reserved = models.PositiveIntegerField(default=0)
    version = models.PositiveIntegerField(default=1)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = (
            models.CheckConstraint(
                condition=Q(reserved__gte=0, reserved__lte=F("on_hand")), name="orders_product_reserved_on_hand"
            ),
            models.CheckConstraint(condition=Q(price__gte=1), name="orders_product_price_positive"),
            models.CheckConstraint(condition=Q(version__gte=1), name="orders_product_version_positive"),
        )

    def __str__(self) -> str:
        return self.sku


class OrderSequence(models.Model):
    """The last order number of a year."""

    year = models.PositiveSmallIntegerField(primary_key=True)
    last = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.year}: {self.last}"


class Order(models.Model):
    """What somebody has ordered; the customer is a copy, as known when the order was placed."""

    id = models.CharField(primary_key=True, max_length=36, default=uuid7, editable=False)
    number = models.CharField(max_length=16, unique=True)
    user_id = models.CharField(max_length=36)
    customer_name = models.CharField(max_length=100)
    customer_email = models.EmailField()
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.PENDING)
    total = models.PositiveBigIntegerField()
    currency = models.CharField(max_length=3)
    payment_id = models.CharField(max_length=36, blank=True)
    refunded = models.PositiveBigIntegerField(default=0)
    placed_at = models.DateTimeField()
    confirmed_at = models.DateTimeField(null=True, blank=True)
    shipped_at = models.DateTimeField(null=True, blank=True)
    delivered_at = models.DateTimeField(null=True, blank=True)
    cancelled_at = models.DateTimeField(null=True, blank=True)
    cancel_reason = models.CharField(max_length=50, blank=True)
    version = models.PositiveIntegerField(default=1)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes = (models.Index(fields=["user_id", "id"], name="orders_order_of_user"),)
        constraints = (
            models.CheckConstraint(condition=Q(status__in=Status.values), name="orders_order_status_known"),
            models.CheckConstraint(condition=Q(refunded__lte=F("total")), name="orders_order_refunded_paid"),
            models.CheckConstraint(condition=Q(version__gte=1), name="orders_order_version_positive"),
        )

    def __str__(self) -> str:
        return self.number


class OrderLine(models.Model):
    """A line of an order. All of it is copied: a change of price never alters what was ordered."""

    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="lines")
    product_id = models.CharField(max_length=36)
    sku = models.CharField(max_length=32)
    name = models.CharField(max_length=100)
    unit_price = models.PositiveIntegerField()
    quantity = models.PositiveIntegerField()
    line_total = models.PositiveBigIntegerField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("pk",)
        constraints = (models.CheckConstraint(condition=Q(quantity__gte=1), name="orders_orderline_quantity_positive"),)

    def __str__(self) -> str:
        return f"{self.quantity} x {self.sku}"


class Reservation(models.Model):
    """Stock that an order holds until it is paid, for a while."""

    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="reservations")
    product = models.ForeignKey(Product, on_delete=models.PROTECT, related_name="reservations")
    quantity = models.PositiveIntegerField()
    state = models.CharField(max_length=16, choices=State.choices, default=State.HELD)
    expires_at = models.DateTimeField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = (
            models.CheckConstraint(condition=Q(quantity__gte=1), name="orders_reservation_quantity_positive"),
            models.CheckConstraint(condition=Q(state__in=State.values), name="orders_reservation_state_known"),
        )

    def __str__(self) -> str:
        return f"{self.quantity} of {self.product_id}, {self.state}"
