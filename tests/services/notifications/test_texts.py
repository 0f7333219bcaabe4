"""What people are told."""

import pytest

from notifications.texts import money, text


@pytest.mark.parametrize(
    ("amount", "currency", "written"),
    [
        (1290, "EUR", "12.90 EUR"),
        (5, "EUR", "0.05 EUR"),
        (0, "EUR", "0.00 EUR"),
        (1290, "JPY", "1290 JPY"),
        (1290, "KWD", "1.290 KWD"),
    ],
)
def test_money_is_written_as_its_currency_is(amount: int, currency: str, written: str) -> None:
    assert money(amount, currency) == written


def test_braces_in_a_name_are_only_braces() -> None:
    _, body = text("user_created", {"name": "{name.__class__} %s"})

    assert "{name.__class__} %s" in body
