"""What changes users: each function is one transaction."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from django.contrib.auth.hashers import make_password
from django.db import IntegrityError, transaction

from microservices.db import emit_on_commit

from .contracts import UserEvent
from .exceptions import EmailTaken, VersionMismatch
from .models import EMAIL_UNIQUE, Status, User
from .selectors import user_get


def user_create(*, email: str, name: str, password: str) -> User:
    """Register a customer. Raises EmailTaken."""
    # Hashing takes a good part of a second: not while others wait for the write lock.
    user = User(email=email, name=name, password=make_password(password))
    with _email_is_unique(), transaction.atomic(using="users", durable=True):
        user.save(force_insert=True)
        _announce("user_created", user)
    return user


def user_update(*, user_id: str, name: str | None = None, email: str | None = None, version: int | None = None) -> User:
    """Change what is given. Raises UserNotFound, EmailTaken, and VersionMismatch if `version` is an old one."""
    with _email_is_unique(), transaction.atomic(using="users", durable=True):
        user = user_get(user_id=user_id, for_update=True)
        if version is not None and version != user.version:
            raise VersionMismatch(user.version)
        if name is None and email is None:
            return user
        user.name = user.name if name is None else name
        user.email = user.email if email is None else email
        user.version += 1
        user.save(update_fields=["name", "email", "version"])
        _announce("user_updated", user)
    return user


def user_delete(*, user_id: str) -> None:
    """Close an account and blank the person; the row stays for those who refer to it. Raises UserNotFound."""
    with transaction.atomic(using="users", durable=True):
        user = user_get(user_id=user_id, for_update=True)
        user.name = user.email = ""
        user.password = make_password(None)
        user.status = Status.DELETED
        user.version += 1
        user.save(update_fields=["name", "email", "password", "status", "version"])
        _announce("user_deleted", user)


def user_seed(*, users: Sequence[User]) -> int:
    """Write these users if there are none yet; return how many were written."""
    with transaction.atomic(using="users", durable=True):
        return 0 if User.objects.exists() else len(User.objects.bulk_create(users))


def _announce(event: str, user: User) -> None:
    told = UserEvent(
        id=user.id, name=user.name, email=user.email, role=user.role, status=user.status, version=user.version
    )
    emit_on_commit(event, told, using="users")


@contextmanager
def _email_is_unique() -> Iterator[None]:
    # The constraint decides, not a look before the write: two may register at the same moment.
    try:
        yield
    except IntegrityError as error:
        if EMAIL_UNIQUE in str(error):
            raise EmailTaken() from error
        raise
