"""Reading notifications."""

import pytest

from microservices import RpcException
from notifications.models import Notification
from notifications.selectors import notification_list, unread_count
from notifications.services import notification_read, notify

pytestmark = pytest.mark.django_db(databases=["notifications"])


def tell(event_id: str, user_id: str = "ada") -> Notification:
    return notify(event_id=event_id, kind="user_created", user_id=user_id, facts={"name": "Ada"})


def test_a_user_sees_the_own_notifications_the_latest_first() -> None:
    first, second = tell("1"), tell("2")
    tell("3", user_id="ben")

    page = notification_list(user_id="ada")

    assert page.notifications == [second, first]
    assert page.next is None


def test_pages_follow_one_another_until_all_were_seen_once() -> None:
    expected = [tell(str(number)).id for number in range(5)][::-1]

    pages = [notification_list(user_id="ada", limit=2)]
    while cursor := pages[-1].next:
        pages.append(notification_list(user_id="ada", cursor=cursor, limit=2))

    seen = [[notification.id for notification in page.notifications] for page in pages]
    assert seen == [expected[0:2], expected[2:4], expected[4:]]


def test_only_what_the_user_has_not_read_counts_as_unread() -> None:
    first, _ = tell("1"), tell("2")
    tell("3", user_id="ben")

    notification_read(user_id="ada", notification_id=first.id)

    assert unread_count(user_id="ada") == 1


@pytest.mark.parametrize("cursor", ["", "nonsense", "%%%", "ä"])
def test_a_malformed_cursor_is_refused_by_name(cursor: str) -> None:
    with pytest.raises(RpcException) as refused:
        notification_list(user_id="ada", cursor=cursor)

    assert [error["pointer"] for error in refused.value.errors] == ["/cursor"]
