"""Giving money back."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import IntegrityError, connections, transaction

from microservices import RpcException
from microservices.ids import uuid7
from payments.models import Payment, Refund, RefundStatus, Status
from payments.provider import FakeProvider, NoAnswer, Refused
from payments.services import payment_capture, payment_refund, payment_void

pytestmark = pytest.mark.django_db(databases=["payments"])

Authorize = Callable[..., Payment]
AtOnce = Callable[..., list[Any]]
Events = list[tuple[str, dict[str, Any]]]


class Interrupted(FakeProvider):
    """A provider that lets something else happen while it gives money back."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.meanwhile = meanwhile

    def refund(self, **facts: Any) -> str:
        self.meanwhile()
        return super().refund(**facts)


class Forgetful(FakeProvider):
    """A provider that fails to give money back in some way, once; it counts how often it was asked."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.errors = [error]
        self.asked = 0

    def refund(self, **facts: Any) -> str:
        self.asked += 1
        if self.errors:
            raise self.errors.pop()
        return super().refund(**facts)


def install(monkeypatch: pytest.MonkeyPatch, provider: FakeProvider) -> None:
    monkeypatch.setattr("payments.services.get_provider", lambda: provider)


def refund(payment: Payment, amount: int = 1250, key: str = "order:refund") -> Refund:
    return payment_refund(payment_id=payment.id, amount=amount, reason="broken", key=key)


def stored(payment: Payment) -> str:
    return Payment.objects.get(pk=payment.pk).status


def announced(events: Events) -> list[str]:
    """Return the status of the payment in each announced refund."""
    return [data["status"] for pattern, data in events if pattern == "payment_refunded"]


@pytest.fixture
def captured(authorize: Authorize) -> Payment:
    """A payment of 1250 that was taken."""
    return payment_capture(payment_id=authorize().id, key="order:capture")


def test_all_that_was_taken_is_given_back_and_announced(captured: Payment, told: Events) -> None:
    given = refund(captured)

    given.refresh_from_db()
    assert (given.payment_id, given.amount, given.reason) == (captured.id, 1250, "broken")
    assert (given.status, given.provider_ref != "") == (RefundStatus.DONE, True)
    assert stored(captured) == Status.REFUNDED
    assert announced(told) == ["refunded"]


def test_it_is_given_back_part_by_part(captured: Payment, told: Events) -> None:
    parts = [refund(captured, amount, key) for amount, key in ((1000, "one"), (249, "two"), (1, "three"))]

    assert [part.payment.status for part in parts] == ["part_refunded", "part_refunded", "refunded"]
    assert announced(told) == ["part_refunded", "part_refunded", "refunded"]


@pytest.mark.parametrize("amount", [1250, 250])
def test_a_repeat_with_the_same_key_returns_the_first_refund(captured: Payment, told: Events, amount: int) -> None:
    first = refund(captured, amount)

    again = refund(captured, amount)

    assert again == first
    assert again.payment.status == stored(captured)
    assert Refund.objects.count() == 1
    assert len(announced(told)) == 1


def test_a_key_of_another_refund_is_refused(captured: Payment, authorize: Authorize) -> None:
    another = payment_capture(payment_id=authorize(key="another").id, key="another:capture")
    refund(captured, 100)

    for payment, amount in ((captured, 101), (another, 100)):
        with pytest.raises(RpcException) as refused:
            refund(payment, amount)
        assert (refused.value.status_code, refused.value.code) == (409, "key-reused")

    assert Refund.objects.count() == 1


@pytest.mark.parametrize(("before", "amount", "left"), [(0, 1251, 1250), (1000, 251, 250)])
def test_no_more_is_given_back_than_was_taken(captured: Payment, before: int, amount: int, left: int) -> None:
    if before:
        refund(captured, before, "before")

    with pytest.raises(RpcException) as refused:
        refund(captured, amount)

    assert (refused.value.status_code, refused.value.code) == (409, "refund-too-large")
    assert refused.value.error["left"] == left
    assert [error["pointer"] for error in refused.value.errors] == ["/amount"]
    assert Refund.objects.filter(idempotency_key="order:refund").count() == 0


@pytest.mark.parametrize("status", sorted(set(Status.values) - {"captured", "part_refunded"}))
def test_what_was_not_taken_is_not_given_back(authorize: Authorize, told: Events, status: str) -> None:
    payment = authorize()
    Payment.objects.filter(pk=payment.pk).update(status=status)

    with pytest.raises(RpcException) as refused:
        refund(payment)

    assert (refused.value.status_code, refused.value.code) == (409, "wrong-state")
    assert refused.value.error["state"] == status
    assert Refund.objects.count() == 0
    assert announced(told) == []


@pytest.mark.parametrize("payment_id", [uuid7(), "nonsense", "\x00"])
def test_a_payment_that_is_not_there_is_not_found(payment_id: str) -> None:
    with pytest.raises(RpcException) as refused:
        payment_refund(payment_id=payment_id, amount=1, reason="", key="key")

    assert (refused.value.status_code, refused.value.code) == (404, "payment-not-found")


def test_the_pending_refund_is_stored_before_the_provider_is_asked(
    captured: Payment, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    install(monkeypatch, Interrupted(lambda: seen.extend(Refund.objects.values_list("status", flat=True))))

    refund(captured)

    assert seen == [RefundStatus.PENDING]


@pytest.mark.django_db(databases=["payments"], transaction=True)
def test_the_provider_is_never_asked_inside_a_transaction(captured: Payment, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []
    install(monkeypatch, Interrupted(lambda: inside.append(connections["payments"].in_atomic_block)))

    refund(captured)

    assert inside == [False]


def test_a_lost_answer_leaves_the_refund_pending_and_a_repeat_finishes_it(
    captured: Payment, told: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Forgetful(NoAnswer()))
    with pytest.raises(RpcException) as unknown:
        refund(captured)
    before = Refund.objects.get().status, stored(captured), announced(told)

    again = refund(captured)

    assert (unknown.value.status_code, unknown.value.code) == (504, "provider-timeout")
    assert before == (RefundStatus.PENDING, Status.CAPTURED, [])
    assert (again.status, stored(captured)) == (RefundStatus.DONE, Status.REFUNDED)
    assert Refund.objects.count() == 1
    assert announced(told) == ["refunded"]


def test_a_refund_whose_fate_is_unknown_counts_as_given_back(
    captured: Payment, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Forgetful(NoAnswer()))
    with pytest.raises(RpcException):
        refund(captured, 1000)

    with pytest.raises(RpcException) as refused:
        refund(captured, 251, "another")

    assert refused.value.error["left"] == 250


def test_what_the_provider_refuses_has_failed_and_can_be_asked_for_anew(
    captured: Payment, told: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Forgetful(Refused())
    install(monkeypatch, provider)

    for _ in range(2):
        with pytest.raises(RpcException) as refused:
            refund(captured)
        assert (refused.value.status_code, refused.value.code) == (409, "wrong-state")
    asked, state = provider.asked, stored(captured)
    anew = refund(captured, key="another")

    assert (asked, state) == (1, Status.CAPTURED)
    assert list(Refund.objects.order_by("pk").values_list("status", flat=True)) == ["failed", "done"]
    assert anew.payment.status == Status.REFUNDED
    assert announced(told) == ["refunded"]


def test_a_repeat_that_is_faster_than_the_first_is_announced_once(
    captured: Payment, told: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeat() -> None:
        provider.meanwhile = lambda: None
        refund(captured)

    provider = Interrupted(repeat)
    install(monkeypatch, provider)

    first = refund(captured)

    assert (first.status, first.payment.status) == (RefundStatus.DONE, Status.REFUNDED)
    assert announced(told) == ["refunded"]


def test_another_refund_meanwhile_is_not_forgotten(
    captured: Payment, told: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another() -> None:
        provider.meanwhile = lambda: None
        refund(captured, 250, "another")

    provider = Interrupted(another)
    install(monkeypatch, provider)

    first = refund(captured, 1000)

    assert first.payment.status == stored(captured) == Status.REFUNDED
    assert announced(told) == ["part_refunded", "refunded"]


@pytest.mark.parametrize("amount", [1250, 250])
def test_money_that_has_gone_back_was_taken_all_the_same(captured: Payment, amount: int) -> None:
    refund(captured, amount)

    again = payment_capture(payment_id=captured.id, key="order:capture")
    with pytest.raises(RpcException) as refused:
        payment_void(payment_id=captured.id, key="order:void")

    assert again.captured_at == captured.captured_at
    assert refused.value.error["state"] == again.status == stored(captured)


@pytest.mark.parametrize("wrong", [{"amount": 0}, {"amount": -1}, {"status": "lost"}])
def test_the_database_itself_refuses_refunds_that_make_no_sense(captured: Payment, wrong: dict[str, Any]) -> None:
    given = refund(captured)

    with pytest.raises(IntegrityError), transaction.atomic(using="payments"):
        Refund.objects.filter(pk=given.pk).update(**wrong)


@pytest.mark.django_db(databases=["payments"], transaction=True)
def test_a_refund_refuses_to_run_inside_another_transaction(captured: Payment) -> None:
    with pytest.raises(RuntimeError, match="durable"), transaction.atomic(using="payments"):
        refund(captured)


@pytest.mark.django_db(databases=["orders", "payments"], transaction=True)
def test_twenty_refunds_at_once_give_back_no_more_than_was_taken(
    at_once: AtOnce, authorize: Authorize, told: Events
) -> None:
    [payment] = at_once(lambda: payment_capture(payment_id=authorize().id, key="order:capture"))
    refunds = [lambda key=key: refund(payment, 300, key).status for key in map(str, range(20))]

    outcomes = at_once(*refunds)

    [status] = at_once(lambda: stored(payment))
    assert sorted(outcomes) == ["done"] * 4 + ["refund-too-large"] * 16
    assert status == Status.PART_REFUNDED
    assert announced(told) == ["part_refunded"] * 4


@pytest.mark.django_db(databases=["orders", "payments"], transaction=True)
def test_one_refund_asked_for_ten_times_at_once_is_given_once(
    at_once: AtOnce, authorize: Authorize, told: Events
) -> None:
    [payment] = at_once(lambda: payment_capture(payment_id=authorize().id, key="order:capture"))

    given = at_once(*[lambda: refund(payment, 300).id] * 10)

    assert len(set(given)) == 1
    assert announced(told) == ["part_refunded"]


@pytest.mark.django_db(databases=["orders", "payments"], transaction=True)
def test_of_two_payments_at_once_one_gets_the_key(at_once: AtOnce, authorize: Authorize) -> None:
    def taken(key: str) -> Payment:
        return payment_capture(payment_id=authorize(key=key).id, key=f"{key}:capture")

    one, other = at_once(lambda: taken("one"), lambda: taken("other"))

    outcomes = at_once(lambda: refund(one).status, lambda: refund(other).status)

    assert sorted(outcomes) == ["done", "key-reused"]
