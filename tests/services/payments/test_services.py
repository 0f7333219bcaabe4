"""Changing payments."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import IntegrityError, connections, transaction

from microservices import RpcException
from microservices.ids import uuid7
from payments.models import Payment, Status
from payments.provider import Charge, FakeProvider, NoAnswer
from payments.services import payment_authorize, payment_capture, payment_reconcile, payment_void

pytestmark = pytest.mark.django_db(databases=["payments"])

Authorize = Callable[..., Payment]
Events = list[tuple[str, dict[str, Any]]]


class Interrupted(FakeProvider):
    """A provider that lets something else happen while it works."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.meanwhile = meanwhile

    def authorize(self, **facts: Any) -> Charge:
        self.meanwhile()
        return super().authorize(**facts)


def patterns(events: Events) -> list[str]:
    return [pattern for pattern, _ in events]


def test_a_good_token_is_authorised_and_announced(authorize: Authorize, told: Events) -> None:
    payment = authorize("tok_ok")

    payment.refresh_from_db()
    assert (payment.status, payment.amount, payment.order_id) == (Status.AUTHORIZED, 1250, "order")
    assert payment.provider_ref
    assert payment.authorized_at
    assert [(pattern, data["id"]) for pattern, data in told] == [("payment_authorized", payment.id)]


def test_a_declined_payment_is_kept_with_its_code_and_announced(authorize: Authorize, told: Events) -> None:
    with pytest.raises(RpcException) as refused:
        authorize("tok_declined")

    payment = Payment.objects.get()
    assert (refused.value.status_code, refused.value.code) == (402, "payment-declined")
    assert refused.value.error["decline_code"] == payment.decline_code == "insufficient_funds"
    assert payment.status == Status.DECLINED
    assert [(pattern, data["decline_code"]) for pattern, data in told] == [("payment_failed", "insufficient_funds")]


def test_a_repeat_with_the_same_key_returns_the_first_payment(authorize: Authorize, told: Events) -> None:
    first = authorize("tok_ok")

    again = authorize("tok_declined")

    assert (again.id, again.status) == (first.id, Status.AUTHORIZED)
    assert Payment.objects.count() == 1
    assert patterns(told) == ["payment_authorized"]


def test_a_repeat_of_a_declined_payment_is_declined_again(authorize: Authorize, told: Events) -> None:
    for _ in range(2):
        with pytest.raises(RpcException, match="declined"):
            authorize("tok_declined")

    assert patterns(told) == ["payment_failed"]


@pytest.mark.parametrize("other", [{"amount": 1}, {"order_id": "another"}, {"currency": "USD"}])
def test_a_key_of_another_payment_is_refused(authorize: Authorize, other: dict[str, Any]) -> None:
    authorize("tok_ok")

    with pytest.raises(RpcException) as refused:
        authorize("tok_ok", **other)

    assert (refused.value.status_code, refused.value.code) == (409, "key-reused")


def test_the_pending_payment_is_stored_before_the_provider_is_asked(
    authorize: Authorize, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    provider = Interrupted(lambda: seen.extend(Payment.objects.values_list("status", flat=True)))
    monkeypatch.setattr("payments.services.get_provider", lambda: provider)

    authorize("tok_ok")

    assert seen == [Status.PENDING]


@pytest.mark.django_db(databases=["payments"], transaction=True)
def test_the_provider_is_never_asked_inside_a_transaction(
    authorize: Authorize, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []
    provider = Interrupted(lambda: inside.append(connections["payments"].in_atomic_block))
    monkeypatch.setattr("payments.services.get_provider", lambda: provider)

    authorize("tok_ok")

    assert inside == [False]


def test_a_lost_answer_leaves_the_payment_pending_until_somebody_asks(authorize: Authorize, told: Events) -> None:
    with pytest.raises(RpcException) as unknown:
        authorize("tok_lost_reply")
    before = Payment.objects.get().status

    asked = payment_reconcile(key="order:authorize")

    assert (unknown.value.status_code, unknown.value.code) == (504, "provider-timeout")
    assert (before, asked.status) == (Status.PENDING, Status.AUTHORIZED)
    assert patterns(told) == ["payment_authorized"]


def test_a_repeat_after_a_lost_answer_charges_nothing_more(authorize: Authorize, told: Events) -> None:
    with pytest.raises(RpcException):
        authorize("tok_lost_reply")

    again = authorize("tok_lost_reply")

    assert again.status == Status.AUTHORIZED
    assert patterns(told) == ["payment_authorized"]


def test_a_payment_that_the_provider_never_heard_of_stays_pending(
    authorize: Authorize, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(**facts: Any) -> Charge:
        raise NoAnswer

    monkeypatch.setattr(provider, "authorize", silent)
    with pytest.raises(RpcException):
        authorize()

    asked = payment_reconcile(key="order:authorize")

    assert asked.status == Status.PENDING


def test_nobody_knows_of_a_key_that_was_never_used() -> None:
    with pytest.raises(RpcException) as unknown:
        payment_reconcile(key="never")

    assert (unknown.value.status_code, unknown.value.code) == (404, "payment-not-found")


def test_a_capture_takes_the_money_once(authorize: Authorize, provider: FakeProvider, told: Events) -> None:
    payment = authorize()

    captured = [payment_capture(payment_id=payment.id, key="order:capture") for _ in range(2)]

    found = provider.find(key="order:authorize")
    assert [payment.status for payment in captured] == [Status.CAPTURED, Status.CAPTURED]
    assert captured[0].captured_at == captured[1].captured_at
    assert found
    assert found.state == "captured"
    assert patterns(told) == ["payment_authorized", "payment_captured"]


def test_a_void_lets_the_money_go_once(authorize: Authorize, provider: FakeProvider, told: Events) -> None:
    payment = authorize()

    voided = [payment_void(payment_id=payment.id, key="order:void") for _ in range(2)]

    found = provider.find(key="order:authorize")
    assert [payment.status for payment in voided] == [Status.VOIDED, Status.VOIDED]
    assert found
    assert found.state == "voided"
    assert patterns(told) == ["payment_authorized", "payment_voided"]


def test_a_void_finds_the_money_of_a_lost_answer(authorize: Authorize, provider: FakeProvider) -> None:
    with pytest.raises(RpcException):
        authorize("tok_lost_reply")

    voided = payment_void(payment_id=Payment.objects.get().id, key="order:void")

    found = provider.find(key="order:authorize")
    assert voided.status == Status.VOIDED
    assert found
    assert found.state == "voided"


@pytest.mark.slow
def test_a_payment_that_is_voided_while_the_provider_works_holds_no_money(
    authorize: Authorize, told: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Interrupted(lambda: payment_void(payment_id=Payment.objects.get().id, key="order:void"))
    monkeypatch.setattr("payments.services.get_provider", lambda: provider)

    late = authorize("tok_slow")

    found = provider.find(key="order:authorize")
    assert late.status == Status.VOIDED
    assert found
    assert found.state == "voided"
    assert patterns(told) == ["payment_voided"]


def test_what_was_declined_has_nothing_to_let_go(authorize: Authorize, told: Events) -> None:
    with pytest.raises(RpcException):
        authorize("tok_declined")

    payment = payment_void(payment_id=Payment.objects.get().id, key="order:void")

    assert payment.status == Status.DECLINED
    assert patterns(told) == ["payment_failed"]


def test_money_that_was_taken_is_not_let_go(authorize: Authorize) -> None:
    payment = payment_capture(payment_id=authorize().id, key="order:capture")

    with pytest.raises(RpcException) as refused:
        payment_void(payment_id=payment.id, key="order:void")

    assert (refused.value.status_code, refused.value.error["state"]) == (409, "captured")


def test_money_that_was_let_go_is_not_taken(authorize: Authorize) -> None:
    payment = payment_void(payment_id=authorize().id, key="order:void")

    with pytest.raises(RpcException) as refused:
        payment_capture(payment_id=payment.id, key="order:capture")

    assert (refused.value.status_code, refused.value.error["state"]) == (409, "voided")


def test_a_refusal_of_the_provider_changes_nothing(authorize: Authorize, provider: FakeProvider) -> None:
    payment = authorize()
    provider.void(key="by hand", ref=payment.provider_ref)

    with pytest.raises(RpcException) as refused:
        payment_capture(payment_id=payment.id, key="order:capture")

    payment.refresh_from_db()
    assert refused.value.status_code == 409
    assert payment.status == Status.AUTHORIZED


@pytest.mark.parametrize("change", [payment_capture, payment_void])
@pytest.mark.parametrize("payment_id", [uuid7(), "nonsense"])
def test_nobody_changes_a_payment_that_is_not_there(change: Callable[..., object], payment_id: str) -> None:
    with pytest.raises(RpcException) as refused:
        change(payment_id=payment_id, key="key")

    assert refused.value.status_code == 404


@pytest.mark.parametrize("wrong", [{"amount": 0}, {"amount": -1}, {"status": "stolen"}])
def test_the_database_itself_refuses_what_makes_no_sense(authorize: Authorize, wrong: dict[str, object]) -> None:
    payment = authorize()

    with pytest.raises(IntegrityError), transaction.atomic(using="payments"):
        Payment.objects.filter(pk=payment.pk).update(**wrong)


@pytest.mark.django_db(databases=["payments"], transaction=True)
def test_a_service_refuses_to_run_inside_another_transaction() -> None:
    with pytest.raises(RuntimeError, match="durable"), transaction.atomic(using="payments"):
        payment_authorize(order_id="order", user_id="ada", amount=1, currency="EUR", token="tok_ok", key="key")
