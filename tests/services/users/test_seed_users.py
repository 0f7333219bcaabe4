"""The seed_users command."""

from collections.abc import Callable
from io import StringIO

import pytest
from django.contrib.auth.hashers import check_password
from django.core.management import call_command

from users.models import Role, User

pytestmark = pytest.mark.django_db(databases=["users"])


def seed(**options: str) -> str:
    out = StringIO()
    call_command("seed_users", stdout=out, **options)
    return out.getvalue()


def test_an_empty_table_gets_thirty_users_with_some_staff() -> None:
    said = seed()

    assert "30 users written" in said
    assert User.objects.count() == 30
    assert User.objects.exclude(role=Role.CUSTOMER).count() == 3
    assert User.objects.exclude(email__endswith="@example.org").count() == 0


def test_a_second_call_writes_nothing_and_says_so() -> None:
    seed()

    said = seed()

    assert "nothing written" in said
    assert User.objects.count() == 30


def test_a_table_that_is_in_use_is_left_alone(register: Callable[[str], User]) -> None:
    register("Ada")

    seed()

    assert User.objects.count() == 1


def test_the_same_people_are_seeded_every_time() -> None:
    seed()
    first = list(User.objects.order_by("pk").values_list("name", "email", "role"))
    User.objects.all().delete()

    seed()

    assert list(User.objects.order_by("pk").values_list("name", "email", "role")) == first


def test_seeded_users_can_sign_in_only_with_a_password_that_was_given() -> None:
    seed()
    locked = User.objects.first()
    User.objects.all().delete()

    seed(password="for the demo")
    opened = User.objects.first()

    assert locked
    assert opened
    assert not check_password("for the demo", locked.password)
    assert check_password("for the demo", opened.password)
