"""What the gateway takes from its clients, and what it shows them of a service's reply."""

from typing import Any

from rest_framework import serializers


class PageQuery(serializers.Serializer[Any]):
    """Which part of a list."""

    cursor = serializers.CharField(required=False, help_text="`next` of the page before.")
    limit = serializers.IntegerField(required=False, min_value=1, max_value=100)


class UserQuery(PageQuery):
    """Which users."""

    search = serializers.CharField(
        required=False, allow_blank=True, max_length=100, help_text="A part of name or e-mail address."
    )


class User(serializers.Serializer[Any]):
    """A user as others may see it."""

    id = serializers.CharField()
    name = serializers.CharField()
    email = serializers.EmailField()
    role = serializers.CharField()
    status = serializers.CharField()
    version = serializers.IntegerField()
    created_at = serializers.DateTimeField()


class UserCreate(serializers.Serializer[Any]):
    """A registration."""

    name = serializers.CharField(max_length=100)
    email = serializers.EmailField(max_length=254)
    password = serializers.CharField(min_length=8, max_length=128, trim_whitespace=False, write_only=True)


class UserUpdate(serializers.Serializer[Any]):
    """What of a user may change; `version` refuses the change if somebody else was faster."""

    name = serializers.CharField(max_length=100, required=False)
    email = serializers.EmailField(max_length=254, required=False)
    version = serializers.IntegerField(min_value=1, required=False)


class ProductQuery(PageQuery):
    """Which products."""

    ids = serializers.ListField(child=serializers.CharField(), required=False, max_length=100)


class Product(serializers.Serializer[Any]):
    """A product; money is in minor units, `available` is what can be ordered now."""

    id = serializers.CharField()
    sku = serializers.CharField()
    name = serializers.CharField()
    description = serializers.CharField(allow_blank=True)
    price = serializers.IntegerField()
    currency = serializers.CharField()
    available = serializers.IntegerField()
    version = serializers.IntegerField()


class Item(serializers.Serializer[Any]):
    """How many of which product."""

    product_id = serializers.CharField(max_length=36)
    quantity = serializers.IntegerField(min_value=1, max_value=1000)


class OrderCreate(serializers.Serializer[Any]):
    """An order; until there is authentication, its caller names the user."""

    user_id = serializers.CharField(max_length=36)
    lines = serializers.ListField(child=Item(), min_length=1, max_length=50)
    payment_token = serializers.CharField(max_length=200)


class OrderCancel(serializers.Serializer[Any]):
    """Why an order is called off, for people to read."""

    reason = serializers.CharField(required=False, max_length=50)


class OrderQuery(PageQuery):
    """Which orders."""

    user_id = serializers.CharField(required=False, max_length=36)
    status = serializers.ChoiceField(
        ["pending", "confirmed", "shipped", "delivered", "cancelled", "refunded"], required=False
    )


class OrderLine(serializers.Serializer[Any]):
    """A line of an order, with name and price as they were then."""

    product_id = serializers.CharField()
    sku = serializers.CharField()
    name = serializers.CharField()
    unit_price = serializers.IntegerField()
    quantity = serializers.IntegerField()
    line_total = serializers.IntegerField()


class Customer(serializers.Serializer[Any]):
    """Who ordered."""

    id = serializers.CharField()
    name = serializers.CharField()
    email = serializers.EmailField()


class Order(serializers.Serializer[Any]):
    """An order."""

    id = serializers.CharField()
    number = serializers.CharField()
    user_id = serializers.CharField()
    customer = Customer()
    status = serializers.CharField()
    lines = OrderLine(many=True)
    total = serializers.IntegerField()
    currency = serializers.CharField()
    payment_id = serializers.CharField(allow_null=True)
    refunded = serializers.IntegerField()
    placed_at = serializers.DateTimeField()
    confirmed_at = serializers.DateTimeField(allow_null=True)
    cancelled_at = serializers.DateTimeField(allow_null=True)
    cancel_reason = serializers.CharField(allow_null=True)
    version = serializers.IntegerField()


class PaymentQuery(PageQuery):
    """Which payments."""

    order_id = serializers.CharField(required=False, max_length=36)
    user_id = serializers.CharField(required=False, max_length=36)


class Payment(serializers.Serializer[Any]):
    """A payment."""

    id = serializers.CharField()
    order_id = serializers.CharField()
    user_id = serializers.CharField()
    amount = serializers.IntegerField()
    currency = serializers.CharField()
    status = serializers.CharField()
    decline_code = serializers.CharField(allow_null=True)
    authorized_at = serializers.DateTimeField(allow_null=True)
    captured_at = serializers.DateTimeField(allow_null=True)


class NotificationQuery(PageQuery):
    """Whose notifications."""

    user_id = serializers.CharField(max_length=36)


class Notification(serializers.Serializer[Any]):
    """What a user was told."""

    id = serializers.CharField()
    user_id = serializers.CharField()
    kind = serializers.CharField()
    title = serializers.CharField()
    body = serializers.CharField()
    data = serializers.DictField()  # type: ignore[assignment]
    read_at = serializers.DateTimeField(allow_null=True)
    created_at = serializers.DateTimeField()
