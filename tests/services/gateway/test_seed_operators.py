"""The seed_operators command."""

from __future__ import annotations

from io import StringIO

import pytest
from django.contrib.auth import get_user_model
from django.core.management import call_command
from pytest_django import Settings

pytestmark = pytest.mark.django_db(databases=["default"])

LINE = "Admin: http://127.0.0.1:3000/admin/ - login admin, password admin (development only)\n"


@pytest.fixture(autouse=True)
def _development(settings: Settings) -> None:
    settings.DEBUG = True
    settings.MICROSERVICES = {**settings.MICROSERVICES, "HTTP_PORT": 3000}
    # The real ones are slow on purpose.
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


def seed() -> str:
    out = StringIO()
    call_command("seed_operators", stdout=out)
    return out.getvalue()


def test_the_first_operator_is_created_and_told_each_time() -> None:
    said = [seed(), seed()]

    [user] = get_user_model().objects.all()
    assert said == [LINE, LINE]
    assert (user.get_username(), user.is_superuser, user.check_password("admin")) == ("admin", True, True)


def test_nobody_is_created_beside_a_user_of_ones_own() -> None:
    get_user_model().objects.create_user("ada")

    said = seed()

    assert said == ""
    assert get_user_model().objects.count() == 1


def test_without_debug_nobody_is_created_and_nothing_is_said(settings: Settings) -> None:
    settings.DEBUG = False

    said = seed()

    assert said == ""
    assert get_user_model().objects.count() == 0
