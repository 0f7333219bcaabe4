"""Changing users."""

from collections.abc import Callable

import pytest
from django.contrib.auth.hashers import check_password
from django.db import IntegrityError, connections, transaction

from microservices import RpcException
from microservices.ids import uuid7
from users.models import Role, Status, User
from users.services import user_create, user_delete, user_update

pytestmark = pytest.mark.django_db(databases=["users"])

Register = Callable[[str], User]


def test_whoever_registers_is_an_active_customer_at_version_one() -> None:
    user = user_create(email="ada@example.org", name="Ada", password="correct horse")

    user.refresh_from_db()
    assert (user.role, user.status, user.version) == (Role.CUSTOMER, Status.ACTIVE, 1)
    assert user.created_at


def test_a_password_is_kept_as_a_hash_only(register: Register) -> None:
    user = register("Ada")

    user.refresh_from_db()
    assert "correct horse" not in user.password
    assert check_password("correct horse", user.password)


@pytest.mark.parametrize("email", ["ada@example.org", "ADA@Example.Org"])
def test_an_address_registers_once_in_any_case(register: Register, email: str) -> None:
    register("Ada")

    with pytest.raises(RpcException) as refused:
        user_create(email=email, name="Another", password="correct horse")

    assert (refused.value.status_code, refused.value.code) == (409, "email-taken")
    assert User.objects.count() == 1


def test_an_update_changes_what_is_given_and_counts_the_version_up(register: Register) -> None:
    ada = register("Ada")

    user_update(user_id=ada.id, name="Ada M.")

    ada.refresh_from_db()
    assert (ada.name, ada.email, ada.version) == ("Ada M.", "ada@example.org", 2)


def test_an_update_of_nothing_leaves_the_version_alone(register: Register) -> None:
    ada = register("Ada")

    updated = user_update(user_id=ada.id, version=1)

    assert updated.version == 1


def test_an_update_on_an_old_version_is_refused_and_changes_nothing(register: Register) -> None:
    ada = register("Ada")
    user_update(user_id=ada.id, name="First", version=1)

    with pytest.raises(RpcException) as refused:
        user_update(user_id=ada.id, name="Second", version=1)

    ada.refresh_from_db()
    assert (refused.value.status_code, refused.value.code) == (412, "version-mismatch")
    assert (ada.name, ada.version) == ("First", 2)


def test_an_update_cannot_take_the_address_of_another(register: Register) -> None:
    ada = register("Ada")
    register("Ben")

    with pytest.raises(RpcException) as refused:
        user_update(user_id=ada.id, email="BEN@example.org")

    assert refused.value.code == "email-taken"


def test_a_user_may_write_the_own_address_in_another_case(register: Register) -> None:
    ada = register("Ada")

    updated = user_update(user_id=ada.id, email="Ada@Example.org")

    assert updated.email == "Ada@Example.org"


def test_a_deleted_user_leaves_a_row_without_a_person(register: Register) -> None:
    ada = register("Ada")

    user_delete(user_id=ada.id)

    ada.refresh_from_db()
    assert (ada.name, ada.email, ada.status, ada.version) == ("", "", Status.DELETED, 2)
    assert not check_password("correct horse", ada.password)


def test_the_address_of_a_deleted_user_is_free_again(register: Register) -> None:
    for _ in range(3):
        user_delete(user_id=register("Ada").id)

    again = register("Ada")

    assert again.email == "ada@example.org"


@pytest.mark.parametrize("change", [user_update, user_delete])
def test_nobody_unknown_or_deleted_can_be_changed(register: Register, change: Callable[..., object]) -> None:
    ada = register("Ada")
    user_delete(user_id=ada.id)

    for user_id in (ada.id, uuid7(), "nonsense"):
        with pytest.raises(RpcException) as refused:
            change(user_id=user_id)
        assert refused.value.status_code == 404


@pytest.mark.parametrize(
    "wrong", [{"role": "emperor"}, {"status": "asleep"}, {"version": 0}, {"email": ""}, {"status": "deleted"}]
)
def test_the_database_itself_refuses_what_makes_no_sense(register: Register, wrong: dict[str, object]) -> None:
    ada = register("Ada")

    with pytest.raises(IntegrityError), transaction.atomic(using="users"):
        User.objects.filter(pk=ada.pk).update(**wrong)


def test_users_live_on_the_alias_of_their_service(register: Register) -> None:
    ada = register("Ada")

    assert ada._state.db == User.objects.all().db == "users"


@pytest.mark.django_db(databases=["users"], transaction=True)
def test_a_service_refuses_to_run_inside_another_transaction() -> None:
    with pytest.raises(RuntimeError, match="durable"), transaction.atomic(using="users"):
        user_create(email="ada@example.org", name="Ada", password="correct horse")


@pytest.mark.django_db(databases=["users"], transaction=True)
def test_a_refused_address_leaves_the_connection_usable(register: Register) -> None:
    register("Ada")
    with pytest.raises(RpcException):
        register("Ada")

    ben = register("Ben")

    assert User.objects.filter(pk=ben.pk).exists()
    assert not connections["users"].in_atomic_block
