"""The seed_products command."""

from collections.abc import Callable
from io import StringIO

import pytest
from django.core.management import call_command

from orders.models import Product

pytestmark = pytest.mark.django_db(databases=["orders"])


def seed() -> str:
    out = StringIO()
    call_command("seed_products", stdout=out)
    return out.getvalue()


def test_an_empty_table_gets_twenty_products_with_stock() -> None:
    said = seed()

    assert "20 products written" in said
    assert Product.objects.filter(on_hand__gt=0, reserved=0, active=True, currency="EUR").count() == 20


def test_a_second_call_writes_nothing_and_says_so() -> None:
    seed()

    said = seed()

    assert "nothing written" in said
    assert Product.objects.count() == 20


def test_a_table_that_is_in_use_is_left_alone(stock: Callable[[str], Product]) -> None:
    stock("tea")

    seed()

    assert Product.objects.count() == 1


def test_the_same_products_are_seeded_every_time() -> None:
    seed()
    first = list(Product.objects.order_by("pk").values_list("sku", "name", "price", "on_hand"))
    Product.objects.all().delete()

    seed()

    assert list(Product.objects.order_by("pk").values_list("sku", "name", "price", "on_hand")) == first
