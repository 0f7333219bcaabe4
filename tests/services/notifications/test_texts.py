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


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("customer", "as you asked"),
        ("payment-declined", "the payment was declined"),
        ("internal", "something went wrong on our side"),
        (None, "something went wrong on our side"),
        ("Found it {name} cheaper", "Found it {name} cheaper"),
    ],
)
def test_why_an_order_was_cancelled_is_told_in_words(reason: str | None, why: str) -> None:
    _, body = text("order_cancelled", {"name": "Ada", "number": "1", "currency": "EUR", "reason": reason})

    assert f"is cancelled: {why}. You will not be charged" in body


def test_a_code_of_the_provider_that_nobody_knows_is_not_shown() -> None:
    _, body = text("payment_failed", {"amount": 1, "currency": "EUR", "reason": "do_not_honor"})

    assert "was declined: something went wrong on our side." in body


def test_braces_in_a_name_are_only_braces() -> None:
    _, body = text("user_created", {"name": "{name.__class__} %s"})

    assert "{name.__class__} %s" in body
