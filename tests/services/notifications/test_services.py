"""Telling people, once, and what happens where that fails."""

from datetime import timedelta

import pytest
from django.core.mail import EmailMessage
from django.db import IntegrityError, transaction
from django.utils import timezone

from microservices import RpcException
from microservices.ids import uuid7
from notifications.models import Channel, Delivery, Notification, Status
from notifications.services import notification_read, notify

pytestmark = pytest.mark.django_db(databases=["notifications"])

FACTS: dict[str, str | int | None] = {"name": "Ada"}


def welcome(event_id: str = "1", user_id: str = "ada", email: str = "ada@example.org") -> Notification:
    return notify(event_id=event_id, kind="user_created", user_id=user_id, facts=FACTS, email=email)


def by_mail() -> Delivery:
    return Delivery.objects.get(channel=Channel.EMAIL)


def test_a_repeated_event_returns_the_first_notification(mailoutbox: list[EmailMessage]) -> None:
    first = welcome()

    again = welcome()

    assert again == first
    assert len(mailoutbox) == 1


def test_the_same_id_on_an_event_of_another_kind_is_another_event() -> None:
    welcome("1")

    facts = {"name": "Ada", "number": "1", "amount": 5, "currency": "EUR"}
    notify(event_id="1", kind="order_created", user_id="ada", facts=facts)

    assert Notification.objects.count() == 2


def test_an_e_mail_that_fails_is_noted_and_the_notification_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no route to host " + "x" * 500)

    monkeypatch.setattr("notifications.services.send_mail", refuse)

    welcome()

    delivery = by_mail()
    assert (delivery.status, delivery.attempt) == (Status.FAILED, 1)
    assert "no route to host" in delivery.error
    assert Notification.objects.count() == 1
    assert "was not sent by e-mail" in caplog.text


def test_an_e_mail_goes_out_only_when_the_notification_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("notifications.services.send_mail", lambda *_: seen.append(Notification.objects.count()))

    welcome()

    assert seen == [1]


@pytest.mark.django_db(databases=["notifications"], transaction=True)
def test_neither_e_mail_nor_push_happens_inside_a_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []

    def look(*_: object) -> None:
        inside.append(transaction.get_connection("notifications").in_atomic_block)

    monkeypatch.setattr("notifications.services.send_mail", look)
    monkeypatch.setattr("notifications.push.push", look)

    welcome()

    assert inside == [False, False]


def test_whoever_takes_over_an_event_sends_the_e_mail_that_its_first_handler_did_not(
    mailoutbox: list[EmailMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("notifications.services.send_mail", killed)
        with pytest.raises(KeyboardInterrupt):
            welcome()

    welcome()

    assert len(mailoutbox) == 1
    assert by_mail().status == Status.SENT


def test_an_e_mail_that_failed_is_not_sent_again_by_a_repeated_event(
    mailoutbox: list[EmailMessage],
) -> None:
    welcome()
    Delivery.objects.filter(channel=Channel.EMAIL).update(status=Status.FAILED)

    welcome()

    assert len(mailoutbox) == 1


def test_one_notification_is_marked_read_and_the_time_stays() -> None:
    first, _ = welcome("1"), welcome("2")

    unread = notification_read(user_id="ada", notification_id=first.id)
    first.refresh_from_db()
    read_at = first.read_at
    notification_read(user_id="ada", notification_id=first.id)

    first.refresh_from_db()
    assert unread == 1
    assert read_at
    assert timezone.now() - read_at < timedelta(minutes=1)
    assert first.read_at == read_at


def test_all_notifications_of_a_user_are_marked_read_and_of_nobody_else() -> None:
    for number in range(3):
        welcome(str(number))
    others = welcome("another", user_id="ben")

    unread = notification_read(user_id="ada")

    others.refresh_from_db()
    assert unread == 0
    assert others.read_at is None


@pytest.mark.parametrize("notification_id", [uuid7(), "nonsense", ""])
def test_nobody_reads_what_is_not_there(notification_id: str) -> None:
    with pytest.raises(RpcException) as refused:
        notification_read(user_id="ada", notification_id=notification_id)

    assert (refused.value.status_code, refused.value.code) == (404, "notification-not-found")


def test_nobody_reads_what_belongs_to_another() -> None:
    others = welcome(user_id="ben")

    with pytest.raises(RpcException) as refused:
        notification_read(user_id="ada", notification_id=others.id)

    others.refresh_from_db()
    assert refused.value.status_code == 404
    assert others.read_at is None


@pytest.mark.parametrize("wrong", [{"channel": "pigeon"}, {"status": "lost"}])
def test_the_database_itself_refuses_what_makes_no_sense(wrong: dict[str, str]) -> None:
    welcome(email="")

    with pytest.raises(IntegrityError), transaction.atomic(using="notifications"):
        Delivery.objects.update(**wrong)


@pytest.mark.django_db(databases=["notifications"], transaction=True)
def test_a_service_refuses_to_run_inside_another_transaction() -> None:
    with pytest.raises(RuntimeError, match="durable"), transaction.atomic(using="notifications"):
        welcome()
