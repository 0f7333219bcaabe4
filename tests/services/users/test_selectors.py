"""Reading users."""

from collections.abc import Callable

import pytest

from microservices import RpcException
from microservices.ids import uuid7
from users.models import User
from users.selectors import user_get, user_list, user_list_all, user_list_by_ids
from users.services import user_delete

pytestmark = pytest.mark.django_db(databases=["users"])

Register = Callable[[str], User]


def names(users: list[User]) -> list[str]:
    return [user.name for user in users]


def test_a_user_is_found_by_id(register: Register) -> None:
    ada = register("Ada")

    found = user_get(user_id=ada.id)

    assert found == ada


@pytest.mark.parametrize("user_id", [uuid7(), uuid7().upper(), "1", "", "\x00", "ada@example.org", "ä" * 36])
def test_an_id_that_nobody_has_is_not_found_well_formed_or_not(user_id: str) -> None:
    with pytest.raises(RpcException) as refused:
        user_get(user_id=user_id)

    assert (refused.value.status_code, refused.value.code) == (404, "user-not-found")


def test_a_deleted_user_is_nowhere_to_be_found(register: Register) -> None:
    ada = register("Ada")
    user_delete(user_id=ada.id)

    with pytest.raises(RpcException, match="no such user"):
        user_get(user_id=ada.id)

    assert user_list().users == []
    assert user_list_all() == []
    assert user_list_by_ids(user_ids=[ada.id]) == []


def test_pages_follow_one_another_until_all_users_were_seen_once(register: Register) -> None:
    expected = [register(name).name for name in ("Ada", "Ben", "Clara", "Daniel", "Elena")]

    pages = [user_list(limit=2)]
    while cursor := pages[-1].next:
        pages.append(user_list(cursor=cursor, limit=2))

    assert [names(page.users) for page in pages] == [expected[0:2], expected[2:4], expected[4:]]


def test_a_full_last_page_has_no_next(register: Register) -> None:
    for name in ("Ada", "Ben"):
        register(name)

    page = user_list(limit=2)

    assert len(page.users) == 2
    assert page.next is None


def test_a_page_is_not_shifted_by_users_that_leave_or_come(register: Register) -> None:
    ada = register("Ada")
    for name in ("Ben", "Clara"):
        register(name)
    first = user_list(limit=2)
    user_delete(user_id=ada.id)
    register("Daniel")

    second = user_list(cursor=first.next)

    assert names(second.users) == ["Clara", "Daniel"]


def test_a_cursor_tells_nothing_of_the_id_at_sight(register: Register) -> None:
    ada = register("Ada")
    register("Ben")

    cursor = user_list(limit=1).next

    assert cursor
    assert cursor.replace("-", "").replace("_", "").isalnum()
    assert ada.id not in cursor


@pytest.mark.parametrize("cursor", ["", "nonsense", "AAAA", "%%%", "ä", "A" * 1000])
def test_a_malformed_cursor_is_refused_by_name(cursor: str) -> None:
    with pytest.raises(RpcException) as refused:
        user_list(cursor=cursor)

    assert refused.value.status_code == 400
    assert [error["pointer"] for error in refused.value.errors] == ["/cursor"]


@pytest.mark.parametrize("search", ["ada", "ADA", "da", "ada@"])
def test_search_looks_into_names_and_addresses_in_any_case(register: Register, search: str) -> None:
    for name in ("Ada", "Ben"):
        register(name)

    page = user_list(search=search)

    assert names(page.users) == ["Ada"]


def test_a_percent_sign_in_a_search_is_only_a_percent_sign(register: Register) -> None:
    register("Ada")

    page = user_list(search="%")

    assert page.users == []


def test_a_list_gives_fifty_users_unless_asked_and_never_more_than_a_hundred() -> None:
    User.objects.bulk_create([User(name="N", email=f"{n}@example.org", password="!") for n in range(101)])

    by_default, at_most = user_list(), user_list(limit=1000)

    assert len(by_default.users) == 50
    assert len(at_most.users) == 100
    assert at_most.next


def test_all_users_at_once_are_the_thousand_oldest() -> None:
    User.objects.bulk_create([User(name=f"{n:04}", email=f"{n}@example.org", password="!") for n in range(1001)])
    oldest = list(User.objects.order_by("pk").values_list("name", flat=True))[:1000]

    found = user_list_all()

    assert names(found) == oldest


def test_users_are_found_by_ids_in_the_order_asked_without_the_unknown(register: Register) -> None:
    ada, ben = register("Ada"), register("Ben")

    found = user_list_by_ids(user_ids=[ben.id, uuid7(), "nonsense", ada.id, ben.id])

    assert names(found) == ["Ben", "Ada"]
