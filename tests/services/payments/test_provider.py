"""The fake provider: it behaves as a real one would."""

import pytest

from payments.provider import Charge, FakeProvider, NoAnswer, Refused, get_provider


def authorize(provider: FakeProvider, token: str, key: str = "key") -> Charge:
    return provider.authorize(key=key, token=token, amount=100, currency="EUR")


@pytest.mark.parametrize("token", ["tok_ok", "tok_slow"])
def test_good_tokens_are_authorised(provider: FakeProvider, token: str) -> None:
    charge = authorize(provider, token)

    assert charge.state == "authorized"
    assert provider.find(key="key") == charge


@pytest.mark.parametrize(("token", "code"), [("tok_declined", "insufficient_funds"), ("4111", "unknown_token")])
def test_other_tokens_are_declined_and_the_code_says_why(provider: FakeProvider, token: str, code: str) -> None:
    charge = authorize(provider, token)

    assert (charge.state, charge.decline_code) == ("declined", code)


def test_a_lost_answer_leaves_the_charge_to_be_found(provider: FakeProvider) -> None:
    with pytest.raises(NoAnswer):
        authorize(provider, "tok_lost_reply")

    found = provider.find(key="key")
    assert found
    assert found.state == "authorized"


def test_a_repeated_key_gets_the_first_answer(provider: FakeProvider) -> None:
    first = authorize(provider, "tok_ok")

    again = authorize(provider, "tok_declined")

    assert again == first


def test_what_nobody_asked_for_is_not_found(provider: FakeProvider) -> None:
    assert provider.find(key="key") is None


def test_money_that_was_let_go_cannot_be_taken_nor_the_other_way_round(provider: FakeProvider) -> None:
    voided, captured = authorize(provider, "tok_ok", "one"), authorize(provider, "tok_ok", "two")
    provider.void(key="void", ref=voided.ref)
    provider.capture(key="capture", ref=captured.ref, amount=100)

    with pytest.raises(Refused):
        provider.capture(key="capture", ref=voided.ref, amount=100)
    with pytest.raises(Refused):
        provider.void(key="void", ref=captured.ref)

    assert provider.refund(key="refund", ref=captured.ref, amount=100)


def test_it_remembers_only_so_many_charges(provider: FakeProvider) -> None:
    provider.max_charges = 2

    for key in ("one", "two", "three"):
        authorize(provider, "tok_ok", key)

    assert [provider.find(key=key) is not None for key in ("one", "two", "three")] == [False, True, True]


def test_a_process_has_one_provider() -> None:
    assert get_provider() is get_provider()
