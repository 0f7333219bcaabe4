"""Calling an order off: what becomes of its stock and of its money."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from microservices import RpcContext, RpcException
from microservices.context import current
from microservices.exceptions import ConnectionLost, DeadlineExceeded, NoHandler, Unavailable
from microservices.ids import uuid7
from orders import services
from orders.contracts import Customer, Item
from orders.models import Order, Product, State, Status
from orders.services import order_call_off, order_confirm, order_create, order_place
from payments.models import Payment, Refund
from payments.provider import Charge, FakeProvider, NoAnswer

pytestmark = pytest.mark.django_db(databases=["orders", "payments"])

Events = list[tuple[str, dict[str, Any]]]
Stock = Callable[..., Product]
Buy = Callable[..., Order]
AtOnce = Callable[..., list[Any]]

ADA = Customer(id="ada", name="Ada", email="ada@example.org")
CAPTURED = {"id": "payment", "status": "captured"}
AUTHORIZED = {"id": "payment", "status": "authorized"}
VOIDED = {"id": "payment", "status": "voided"}
NOT_FOUND = RpcException({"statusCode": 404, "code": "payment-not-found", "message": "There is no such payment."})
CONFLICT = RpcException({"statusCode": 409, "code": "wrong-state", "message": "Not now.", "state": "authorized"})
REFUNDED = {"payment": CAPTURED, "refund_id": "refund", "amount": 1000, "status": "done"}


class Interrupted(FakeProvider):
    """A provider that lets something else happen while it works."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.meanwhile = meanwhile

    def authorize(self, **facts: Any) -> Charge:
        self.meanwhile()
        return super().authorize(**facts)


def counts(product: Product) -> tuple[int, int]:
    product.refresh_from_db()
    return product.on_hand, product.reserved


def patterns(events: Events) -> list[str]:
    return [pattern for pattern, _ in events]


def called_off(order: Order) -> Order:
    return order_call_off(order_id=order.id, reason="customer")


@pytest.fixture
def confirmed(stock: Stock, order: Buy) -> Order:
    """An order over 1000 whose payment is called `payment`."""
    return order_confirm(order_id=order(stock("tea")).id, payment_id="payment")


def test_a_pending_order_gives_its_stock_back(
    stock: Stock, order: Buy, told: Events, caplog: pytest.LogCaptureFixture
) -> None:
    tea = stock("tea")
    placed = order(tea, quantity=4)

    order_call_off(order_id=placed.id, reason="changed my mind")

    placed.refresh_from_db()
    assert (placed.status, placed.cancel_reason, placed.version) == (Status.CANCELLED, "changed my mind", 2)
    assert counts(tea) == (10, 0)
    assert placed.reservations.get().state == State.RELEASED
    assert patterns(told) == ["order_created", "order_cancelled"]
    assert "not refunded" not in caplog.text


def test_a_paid_order_gives_its_stock_and_its_money_back(stock: Stock, buy: Buy, told: Events) -> None:
    tea, cup = stock("tea", price=500), stock("cup", price=1500)
    bought = buy(tea, cup, quantity=4)
    before = [counts(tea), counts(cup)]

    order = called_off(bought)

    bought.refresh_from_db()
    payment, refund = Payment.objects.get(), Refund.objects.get()
    assert order.version == bought.version == 4
    assert (bought.status, bought.refunded, bought.total) == (Status.CANCELLED, 8000, 8000)
    assert bought.cancelled_at
    assert (before, [counts(tea), counts(cup)]) == ([(6, 0), (6, 0)], [(10, 0), (10, 0)])
    assert set(bought.reservations.values_list("state", flat=True)) == {State.RELEASED}
    assert (payment.status, refund.amount, refund.reason) == ("refunded", 8000, "customer")
    assert patterns(told) == ["order_created", "order_confirmed", "order_cancelled", "order_refunded"]
    assert [data["refunded"] for _, data in told] == [0, 0, 0, 8000]


def test_money_that_is_only_held_is_let_go(
    stock: Stock, buy: Buy, told: Events, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    tea = stock("tea")
    with monkeypatch.context() as broken:
        broken.setattr(provider, "capture", raises(NoAnswer()))
        bought = buy(tea)

    order = called_off(bought)

    charge = provider.find(key=f"{bought.id}:authorize")
    assert (order.status, order.refunded, Payment.objects.get().status) == (Status.CANCELLED, 0, "voided")
    assert charge
    assert charge.state == "voided"
    assert Refund.objects.count() == 0
    assert patterns(told)[2:] == ["order_cancelled"]


def test_money_that_was_taken_without_an_answer_is_found_and_given_back(
    stock: Stock, buy: Buy, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = provider.capture

    def unheard(**facts: Any) -> None:
        capture(**facts)
        raise NoAnswer

    with monkeypatch.context() as broken:
        broken.setattr(provider, "capture", unheard)
        bought = buy(stock("tea"))
    before = Payment.objects.get().status

    order = called_off(bought)

    assert (before, Payment.objects.get().status) == ("authorized", "refunded")
    assert order.refunded == order.total


def test_each_step_has_its_own_key(confirmed: Order, payments_answer: Callable[..., Any]) -> None:
    payments = payments_answer(
        get_payment=AUTHORIZED, void_payment=CONFLICT, capture_payment=CAPTURED, refund_payment=REFUNDED
    )

    called_off(confirmed)

    assert payments.asked == [
        ("get_payment", {"id": "payment"}),
        ("void_payment", {"id": "payment", "idempotency_key": f"{confirmed.id}:void"}),
        ("capture_payment", {"id": "payment", "idempotency_key": f"{confirmed.id}:capture"}),
        (
            "refund_payment",
            {"id": "payment", "amount": 1000, "reason": "customer", "idempotency_key": f"{confirmed.id}:refund"},
        ),
    ]


@pytest.mark.parametrize(
    "error", [Unavailable("away"), ConnectionLost(), DeadlineExceeded(), NoHandler(), RpcException()]
)
@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"get_payment": CAPTURED},
        {"get_payment": AUTHORIZED},
        {"get_payment": AUTHORIZED, "void_payment": CONFLICT},
        {"get_payment": AUTHORIZED, "void_payment": CONFLICT, "capture_payment": CAPTURED},
    ],
    ids=["look", "refund", "void", "capture", "refund after capture"],
)
def test_an_order_whose_money_stays_where_it_is_is_cancelled_and_the_log_says_so(
    confirmed: Order,
    payments_answer: Callable[..., Any],
    told: Events,
    caplog: pytest.LogCaptureFixture,
    answers: dict[str, Any],
    error: RpcException,
) -> None:
    fails = dict.fromkeys(("get_payment", "void_payment", "capture_payment", "refund_payment"), error)
    payments_answer(**(fails | answers))

    order = called_off(confirmed)

    assert (order.status, order.refunded) == (Status.CANCELLED, 0)
    assert f"order {order.id} is cancelled, but its payment is not refunded" in caplog.text
    assert patterns(told)[-1] == "order_cancelled"


@pytest.mark.parametrize(
    ("payment", "asked"),
    [
        (NOT_FOUND, []),
        (VOIDED, ["void_payment"]),
        ({"id": "payment", "status": "pending"}, ["void_payment"]),
        (AUTHORIZED, ["void_payment"]),
    ],
)
def test_the_money_of_a_pending_order_is_looked_for_by_its_key(
    stock: Stock, order: Buy, payments_answer: Callable[..., Any], payment: Any, asked: list[str]
) -> None:
    payments = payments_answer(get_payment_by_key=payment, void_payment=VOIDED)
    placed = order(stock("tea"))

    called_off(placed)

    assert payments.asked[0] == ("get_payment_by_key", {"idempotency_key": f"{placed.id}:authorize"})
    assert payments.patterns[1:] == asked


@pytest.mark.parametrize("state", ["shipped", "delivered", "cancelled", "refunded"])
def test_an_order_that_is_past_that_is_not_called_off(
    confirmed: Order, payments_answer: Callable[..., Any], told: Events, state: str
) -> None:
    payments = payments_answer()
    Order.objects.filter(pk=confirmed.pk).update(status=state)
    told.clear()

    with pytest.raises(RpcException) as refused:
        called_off(confirmed)

    assert (refused.value.status_code, refused.value.code) == (409, "wrong-state")
    assert refused.value.error["state"] == state
    assert Product.objects.get().on_hand == 9
    assert (payments.asked, told) == ([], [])


def test_a_repeat_is_refused_and_gives_nothing_back_twice(stock: Stock, buy: Buy) -> None:
    tea = stock("tea")
    order = called_off(buy(tea))

    with pytest.raises(RpcException) as refused:
        called_off(order)

    assert refused.value.error["state"] == "cancelled"
    assert counts(tea) == (10, 0)
    assert Refund.objects.count() == 1


@pytest.mark.parametrize("order_id", [uuid7(), "nonsense"])
def test_an_order_that_is_not_there_is_not_found(order_id: str) -> None:
    with pytest.raises(RpcException) as refused:
        order_call_off(order_id=order_id, reason="customer")

    assert refused.value.status_code == 404


def test_money_goes_back_though_the_caller_has_given_up(stock: Stock, buy: Buy) -> None:
    bought = buy(stock("tea"))
    caller = RpcContext(service="orders", pattern="cancel_order", transport="test", side="server")
    caller.cap_deadline(0)
    token = current.set(caller)

    order = called_off(bought)

    current.reset(token)
    assert caller.deadline
    assert caller.deadline < time.monotonic()
    assert order.refunded == order.total


def test_an_order_that_is_called_off_while_it_is_paid_keeps_no_money(
    stock: Stock, buy: Buy, told: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    tea = stock("tea")
    provider = Interrupted(lambda: called_off(Order.objects.get()))
    monkeypatch.setattr("payments.services.get_provider", lambda: provider)

    with pytest.raises(RpcException) as refused:
        buy(tea)

    order = Order.objects.get()
    charge = provider.find(key=f"{order.id}:authorize")
    assert (refused.value.status_code, refused.value.code) == (503, "payment-unavailable")
    assert (order.status, order.cancel_reason, order.version) == (Status.CANCELLED, "customer", 2)
    assert counts(tea) == (10, 0)
    assert Payment.objects.get().status == "voided"
    assert charge
    assert charge.state == "voided"
    assert patterns(told) == ["order_created", "order_cancelled"]


def test_an_order_that_is_called_off_before_it_is_confirmed_keeps_no_money(
    stock: Stock, buy: Buy, payments_answer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tea = stock("tea")
    confirm = services.order_confirm

    def too_late(**facts: Any) -> Order:
        # Its payment is not found yet: whoever has it made must let it go.
        payments.answers["get_payment_by_key"] = NOT_FOUND
        called_off(Order.objects.get())
        return confirm(**facts)

    payments = payments_answer(authorize_payment=AUTHORIZED, void_payment=VOIDED)
    monkeypatch.setattr("orders.services.order_confirm", too_late)

    with pytest.raises(RpcException) as refused:
        buy(tea)

    assert (refused.value.status_code, refused.value.error["state"]) == (409, "cancelled")
    assert Order.objects.get().cancel_reason == "customer"
    assert counts(tea) == (10, 0)
    assert payments.patterns == ["authorize_payment", "get_payment_by_key", "void_payment"]


def test_a_confirmed_order_keeps_its_payment_whatever_its_confirmation_raised(
    stock: Stock, buy: Buy, payments_answer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    confirm = services.order_confirm

    def unheard(**facts: Any) -> None:
        confirm(**facts)
        raise ConnectionResetError

    payments = payments_answer(authorize_payment=AUTHORIZED)
    monkeypatch.setattr("orders.services.order_confirm", unheard)

    with pytest.raises(RpcException, match="confirmed"):
        buy(stock("tea"))

    assert Order.objects.get().status == Status.CONFIRMED
    assert payments.patterns == ["authorize_payment"]


@pytest.mark.django_db(databases=["orders", "payments"], transaction=True)
def test_ten_who_call_one_order_off_at_once_give_it_back_once(
    at_once: AtOnce, told: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orders.payments.AUTHORIZE_TIMEOUT", 30)
    monkeypatch.setattr("orders.payments.ASK_TIMEOUT", 30)
    [tea] = at_once(lambda: Product.objects.create(sku="tea", name="tea", price=500, currency="EUR", on_hand=30))
    wanted = [Item(product_id=tea.id, quantity=10)]
    [bought] = at_once(lambda: order_place(customer=ADA, lines=wanted, payment_token="tok_ok"))

    outcomes = at_once(*[lambda: called_off(bought).status] * 10)

    [[rest, refunds, order]] = at_once(
        lambda: [counts(tea), list(Refund.objects.values_list("amount", flat=True)), Order.objects.get()]
    )
    assert sorted(outcomes) == ["cancelled"] + ["wrong-state"] * 9
    assert (rest, refunds, order.refunded) == ((30, 0), [5000], 5000)
    assert patterns(told)[2:] == ["order_cancelled", "order_refunded"]


@pytest.mark.django_db(databases=["orders", "payments"], transaction=True)
def test_an_order_is_either_confirmed_or_called_off_first_and_its_stock_comes_back_once(at_once: AtOnce) -> None:
    [tea] = at_once(lambda: Product.objects.create(sku="tea", name="tea", price=500, currency="EUR", on_hand=30))
    wanted = [Item(product_id=tea.id, quantity=1)]
    placed = at_once(*[lambda: order_create(customer=ADA, lines=wanted)] * 10)
    [confirms, cancels] = [
        [lambda order=order: order_confirm(order_id=order.id, payment_id="payment").status for order in placed],
        [lambda order=order: called_off(order).status for order in placed],
    ]

    outcomes = at_once(*confirms, *cancels)

    [rest] = at_once(lambda: counts(tea))
    assert set(outcomes[:10]) <= {"confirmed", "wrong-state"}
    assert outcomes[10:] == ["cancelled"] * 10
    assert rest == (30, 0)


def raises(error: Exception) -> Callable[..., None]:
    """Return a function that raises an error."""

    def raises(**_: object) -> None:
        raise error

    return raises
