"""What changes orders: `order_place` is the sequence, every other function is one transaction."""

import logging
from collections.abc import Sequence
from datetime import timedelta

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from microservices import RpcException
from microservices.db import emit_on_commit

from . import payments
from .contracts import Customer, Item
from .exceptions import MixedCurrencies, OutOfStock, PaymentUnknown, UnknownProducts, WrongState
from .models import Order, OrderLine, OrderSequence, Product, Reservation, State, Status
from .selectors import order_get, order_shown, product_list_by_ids, products_on_offer

logger = logging.getLogger(__name__)

HOLD = timedelta(minutes=15)

BY_CUSTOMER = "customer"
"""The reason of those who call an order off without one."""


def order_place(*, customer: Customer, lines: Sequence[Item], payment_token: str) -> Order:
    """Reserve, have the money held, confirm, have it taken; undo what was done where that fails.

    Raises UnknownProducts, MixedCurrencies, OutOfStock, PaymentDeclined, PaymentUnknown, and WrongState for
    an order that was called off meanwhile.
    """
    order = order_create(customer=customer, lines=lines)
    try:
        payment = payments.authorize(order, token=payment_token)
    except Exception as error:
        _undo(order, reason=error.code if isinstance(error, RpcException) else "internal")
        if isinstance(error, PaymentUnknown) and error.payment_id:
            payments.void(order, payment_id=error.payment_id)
        raise
    try:
        order = order_confirm(order_id=order.id, payment_id=payment.id)
    except Exception:
        # Cancelled first: only then is it certain that no confirmed order loses its payment.
        _undo(order, reason="internal")
        payments.void(order, payment_id=payment.id)
        raise
    try:
        payments.capture(order)
    except RpcException as error:
        # The customer has the order: the money is held, and a capture with the same key can be
        # repeated later. To cancel now would undo a good order for a slow answer.
        logger.error("order %s is confirmed, but payment %s was not captured: %s", order.id, payment.id, error)
    return order


def order_call_off(*, order_id: str, reason: str) -> Order:
    """Cancel an order that was not shipped, then give its money back. Raises OrderNotFound and WrongState.

    Where the money cannot be given back now, the order stays cancelled, and the log says that its payment is
    not refunded. The same is left, without the line in the log, by a process that dies in between: a
    cancelled order with nothing refunded beside a payment that is captured. Nobody repeats it yet; its key
    would make that safe.
    """
    # Cancelled first: only then is it certain that nothing is shipped for which the money has gone back.
    order = order_cancel(order_id=order_id, reason=reason, states=(Status.PENDING, Status.CONFIRMED))
    try:
        amount = payments.give_back(order)
    except RpcException as error:
        logger.error("order %s is cancelled, but its payment is not refunded: %s", order.id, error)
        return order
    return order_refund(order_id=order.id, amount=amount) if amount else order


def order_create(*, customer: Customer, lines: Sequence[Item]) -> Order:
    """Reserve the stock and store a pending order, or nothing. Raises UnknownProducts, MixedCurrencies, OutOfStock."""
    now = timezone.now()
    with transaction.atomic(using="orders", durable=True):
        products = _reserve(lines)
        bought = [_line(products[line.product_id], line.quantity) for line in lines]
        order = Order(
            user_id=customer.id,
            customer_name=customer.name,
            customer_email=customer.email,
            total=sum(line.line_total for line in bought),
            currency=products[lines[0].product_id].currency,
            placed_at=now,
            # Last of all locks: the row of the year is everybody's.
            number=_next_number(now.year),
        )
        order.save(force_insert=True)
        for line in bought:
            line.order = order
        OrderLine.objects.bulk_create(bought)
        Reservation.objects.bulk_create(
            Reservation(order=order, product_id=line.product_id, quantity=line.quantity, expires_at=now + HOLD)
            for line in bought
        )
        emit_on_commit("order_created", order_shown(order), using="orders")
    return order


def order_confirm(*, order_id: str, payment_id: str) -> Order:
    """Give a paid order its stock for good. Raises OrderNotFound, and WrongState unless it is pending."""
    with transaction.atomic(using="orders", durable=True):
        order = _in_state(order_id, Status.PENDING)
        for held in _move_reservations(order, State.HELD, State.COMMITTED):
            Product.objects.filter(pk=held.product_id).update(
                on_hand=F("on_hand") - held.quantity, reserved=F("reserved") - held.quantity
            )
        order.status = Status.CONFIRMED
        order.payment_id = payment_id
        order.confirmed_at = timezone.now()
        order.version += 1
        order.save(update_fields=["status", "payment_id", "confirmed_at", "version"])
        emit_on_commit("order_confirmed", order_shown(order), using="orders")
    return order


def order_cancel(*, order_id: str, reason: str, states: Sequence[Status] = (Status.PENDING,)) -> Order:
    """Give the stock of an order back. Raises OrderNotFound, and WrongState unless it is in one of these states."""
    with transaction.atomic(using="orders", durable=True):
        order = _in_state(order_id, *states)
        for held in _move_reservations(order, State.HELD, State.RELEASED):
            Product.objects.filter(pk=held.product_id).update(reserved=F("reserved") - held.quantity)
        for sold in _move_reservations(order, State.COMMITTED, State.RELEASED):
            Product.objects.filter(pk=sold.product_id).update(on_hand=F("on_hand") + sold.quantity)
        order.status = Status.CANCELLED
        order.cancelled_at = timezone.now()
        order.cancel_reason = reason
        order.version += 1
        order.save(update_fields=["status", "cancelled_at", "cancel_reason", "version"])
        emit_on_commit("order_cancelled", order_shown(order), using="orders")
    return order


def order_refund(*, order_id: str, amount: int) -> Order:
    """Note that so much of what an order cost was given back. Raises OrderNotFound."""
    with transaction.atomic(using="orders", durable=True):
        order = order_get(order_id=order_id, for_update=True)
        order.refunded += amount
        order.version += 1
        order.save(update_fields=["refunded", "version"])
        emit_on_commit("order_refunded", order_shown(order), using="orders")
    return order


def product_seed(*, products: Sequence[Product]) -> int:
    """Write these products if there are none yet; return how many were written."""
    with transaction.atomic(using="orders", durable=True):
        return 0 if Product.objects.exists() else len(Product.objects.bulk_create(products))


def _reserve(lines: Sequence[Item]) -> dict[str, Product]:
    refused = []
    # Always in the order of ids: two orders that take the same products the other way round would
    # each wait for the other's row.
    for index, line in sorted(enumerate(lines), key=lambda numbered: numbered[1].product_id):
        # The condition decides, not a look before the write: many may want the last one.
        wanted = products_on_offer().filter(pk=line.product_id, on_hand__gte=F("reserved") + line.quantity)
        if not wanted.update(reserved=F("reserved") + line.quantity):
            refused.append(index)
    products = {product.id: product for product in product_list_by_ids(product_ids=[line.product_id for line in lines])}
    if unknown := [index for index, line in enumerate(lines) if line.product_id not in products]:
        raise UnknownProducts(unknown)
    if refused:
        short = {index: products[lines[index].product_id] for index in refused}
        raise OutOfStock({index: product.on_hand - product.reserved for index, product in short.items()})
    if len({product.currency for product in products.values()}) > 1:
        raise MixedCurrencies()
    return products


def _line(product: Product, quantity: int) -> OrderLine:
    return OrderLine(
        product_id=product.id,
        sku=product.sku,
        name=product.name,
        unit_price=product.price,
        quantity=quantity,
        line_total=product.price * quantity,
    )


def _next_number(year: int) -> str:
    OrderSequence.objects.bulk_create([OrderSequence(year=year)], ignore_conflicts=True)
    # Adding one locks the row until the commit, so that nobody else reads the same number.
    OrderSequence.objects.filter(pk=year).update(last=F("last") + 1)
    return f"{year}-{OrderSequence.objects.get(pk=year).last:06}"


def _undo(order: Order, *, reason: str) -> None:
    try:
        order_cancel(order_id=order.id, reason=reason)
    except WrongState as error:
        # Whoever called it off meanwhile has done this already. An order that is anything else keeps its payment.
        if error.state != Status.CANCELLED:
            raise


def _in_state(order_id: str, *states: Status) -> Order:
    order = order_get(order_id=order_id, for_update=True)
    if order.status not in states:
        raise WrongState(order.status)
    return order


def _move_reservations(order: Order, before: State, after: State) -> list[Reservation]:
    moved = list(order.reservations.filter(state=before).order_by("product_id"))
    order.reservations.filter(pk__in=[reservation.pk for reservation in moved]).update(state=after)
    return moved
