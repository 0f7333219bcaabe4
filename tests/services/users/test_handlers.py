"""The doors of the users service: what they take and what they hand out."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from microservices import RpcContext
from users import handlers
from users.contracts import CreateUser, DeleteUser, Everything, GetUser, GetUsers, GetUsersByIds, UpdateUser
from users.models import Role, User
from users.services import user_delete

Register = Callable[[str], User]

ADA = {"name": "Ada", "email": "ada@example.org", "password": "correct horse"}


def ask(handler: Callable[..., Any], shape: type, data: dict[str, Any]) -> Any:
    """Call a handler as the toolkit would: JSON in, JSON out."""
    context = RpcContext(service="users", pattern=handler.__name__, transport="test", side="server")
    payload: Any = msgspec.json.decode(msgspec.json.encode(data), type=shape)
    return msgspec.json.decode(msgspec.json.encode(handler(payload, context)))


@pytest.mark.django_db(databases=["users"])
def test_a_registered_user_is_shown_without_the_password() -> None:
    shown = ask(handlers.create_user, CreateUser, ADA)

    assert set(shown) == {"id", "name", "email", "role", "status", "version", "created_at"}
    assert shown == ask(handlers.get_user, GetUser, {"id": shown["id"]})


@pytest.mark.django_db(databases=["users"])
def test_nobody_registers_as_more_than_a_customer() -> None:
    shown = ask(handlers.create_user, CreateUser, ADA | {"role": "manager", "status": "suspended"})

    assert (shown["role"], shown["status"]) == ("customer", "active")
    assert User.objects.get().role == Role.CUSTOMER


@pytest.mark.django_db(databases=["users"])
def test_an_update_leaves_alone_what_it_does_not_name(register: Register) -> None:
    ada = register("Ada")

    shown = ask(handlers.update_user, UpdateUser, {"id": ada.id, "email": "new@example.org", "version": 1})

    assert (shown["name"], shown["email"], shown["version"]) == ("Ada", "new@example.org", 2)


@pytest.mark.django_db(databases=["users"])
def test_lists_name_their_items_and_the_next_page(register: Register) -> None:
    ada, ben = register("Ada"), register("Ben")

    page = ask(handlers.get_users, GetUsers, {"limit": 1})
    batch = ask(handlers.get_users_by_ids, GetUsersByIds, {"ids": [ben.id, ada.id]})

    assert [user["id"] for user in page["users"]] == [ada.id]
    assert page["next"]
    assert [user["id"] for user in batch["users"]] == [ben.id, ada.id]
    assert batch["next"] is None


@pytest.mark.django_db(databases=["users"])
def test_all_users_are_given_at_once_without_the_deleted(register: Register) -> None:
    ada, ben, clara = register("Ada"), register("Ben"), register("Clara")
    user_delete(user_id=ben.id)

    everybody = ask(handlers.find_all, Everything, {})

    assert [user["id"] for user in everybody["users"]] == [ada.id, clara.id]
    assert everybody["next"] is None
    assert everybody["users"][0] == ask(handlers.get_user, GetUser, {"id": ada.id})


@pytest.mark.django_db(databases=["users"])
def test_a_deletion_answers_with_nothing(register: Register) -> None:
    ada = register("Ada")

    assert ask(handlers.delete_user, DeleteUser, {"id": ada.id}) is None


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        (GetUser, {}),
        (GetUser, {"id": 1}),
        (GetUsers, {"limit": 0}),
        (GetUsers, {"limit": 101}),
        (GetUsers, {"search": "x" * 101}),
        (GetUsers, {"search": "\x00"}),
        (GetUsersByIds, {"ids": ["x"] * 101}),
        (CreateUser, ADA | {"name": ""}),
        (CreateUser, ADA | {"name": "   "}),
        (CreateUser, ADA | {"name": "Ada\n"}),
        (CreateUser, ADA | {"email": "ada"}),
        (CreateUser, ADA | {"email": "ada@example"}),
        (CreateUser, ADA | {"email": "ada@example.org\n"}),
        (CreateUser, ADA | {"email": "ada@example.org,ben@example.org"}),
        (CreateUser, ADA | {"email": "a" * 250 + "@example.org"}),
        (CreateUser, ADA | {"password": "short"}),
        (UpdateUser, {"id": "x", "name": None}),
        (UpdateUser, {"id": "x", "version": "1"}),
    ],
)
def test_a_payload_that_does_not_fit_is_refused(shape: type, data: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(data, shape)


@pytest.mark.parametrize("shape", [CreateUser, UpdateUser, GetUser, GetUsers, GetUsersByIds, DeleteUser, Everything])
def test_fields_that_a_caller_of_another_day_sends_are_ignored(shape: type) -> None:
    data = ADA | {"id": "x", "ids": [], "from_tomorrow": True}

    assert msgspec.convert(data, shape)
