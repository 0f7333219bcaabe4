"""What people are told of each kind of event."""

from collections.abc import Mapping

Facts = Mapping[str, str | int | None]
"""What an event says, by the names that the texts use."""

# Where a currency's smallest unit is not a hundredth.
_DECIMALS = {"JPY": 0, "KRW": 0, "VND": 0, "BHD": 3, "KWD": 3, "TND": 3}

_SOME_REASON = "something went wrong on our side"
_REASONS = {
    "payment-declined": "the payment was declined",
    "payment-timeout": "the payment could not be made in time",
    "payment-unavailable": "the payment could not be made",
    "insufficient_funds": "there is not enough money on the account",
    "unknown_token": "the means of payment is not known",
    "customer": "as you asked",
    "internal": _SOME_REASON,
}

_TEXTS = {
    "user_created": (
        "Welcome to the shop",
        "Hello {name}, your account is ready.",
    ),
    "order_created": (
        "Your order {number}",
        "Hello {name}, we have received your order {number} over {money}. Next is the payment.",
    ),
    "order_confirmed": (
        "Your order {number} is confirmed",
        "Hello {name}, your order {number} over {money} is confirmed. We are packing it.",
    ),
    "order_cancelled": (
        "Your order {number} is cancelled",
        "Hello {name}, your order {number} over {money} is cancelled: {why}. "
        "You will not be charged; what you have paid already goes back to you.",
    ),
    "payment_captured": (
        "Payment received",
        "We have received your payment of {money}. Thank you.",
    ),
    "payment_failed": (
        "Payment failed",
        "Your payment of {money} was declined: {why}.",
    ),
}


def text(kind: str, facts: Facts) -> tuple[str, str]:
    """Return the title and the body of a notification."""
    words = {
        **facts,
        "money": money(int(facts.get("amount") or 0), str(facts.get("currency"))),
        "why": _why(kind, str(facts.get("reason") or "")),
    }
    title, body = _TEXTS[kind]
    return title.format_map(words), body.format_map(words)


def money(amount: int, currency: str) -> str:
    """Return an amount of minor units as people write it."""
    decimals = _DECIMALS.get(currency, 2)
    whole, rest = divmod(amount, 10**decimals)
    return f"{whole}.{rest:0{decimals}} {currency}" if decimals else f"{whole} {currency}"


def _why(kind: str, reason: str) -> str:
    # An order may be called off for a reason in somebody's own words.
    own = reason if kind == "order_cancelled" else ""
    return _REASONS.get(reason) or own or _SOME_REASON
