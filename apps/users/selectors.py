"""What the users service can be asked; deleted users are as if they had never been."""

from collections.abc import Sequence
from typing import NamedTuple

from django.db.models import Q, QuerySet

from microservices.ids import cursor_after, id_before, is_id

from .contracts import MAX_ALL, MAX_PAGE
from .exceptions import InvalidCursor, UserNotFound
from .models import Status, User


class Page(NamedTuple):
    """Some users, and the cursor of those after them."""

    users: list[User]
    next: str | None


def user_get(*, user_id: str, for_update: bool = False) -> User:
    """Return one user, its row locked on request. Raises UserNotFound."""
    users = _present().select_for_update() if for_update else _present()
    user = users.filter(pk=user_id).first() if is_id(user_id) else None
    if user is None:
        raise UserNotFound()
    return user


def user_list(*, search: str = "", cursor: str | None = None, limit: int = 50) -> Page:
    """Return a page of users, oldest first. Raises InvalidCursor."""
    limit = min(limit, MAX_PAGE)
    users = _present()
    if search:
        users = users.filter(Q(name__icontains=search) | Q(email__icontains=search))
    if cursor is not None:
        users = users.filter(pk__gt=_read_cursor(cursor))
    # One more than asked for tells whether there is a next page without counting.
    rows = list(users.order_by("pk")[: limit + 1])
    page = rows[:limit]
    return Page(page, cursor_after(page[-1].pk) if len(rows) > limit else None)


def user_list_all() -> list[User]:
    """Return the oldest users, at most MAX_ALL."""
    return list(_present().order_by("pk")[:MAX_ALL])


def user_list_by_ids(*, user_ids: Sequence[str]) -> list[User]:
    """Return those of these users that there are, in the order asked for."""
    found = _present().in_bulk([user_id for user_id in user_ids if is_id(user_id)])
    return [found[user_id] for user_id in dict.fromkeys(user_ids) if user_id in found]


def _present() -> QuerySet[User]:
    return User.objects.exclude(status=Status.DELETED)


def _read_cursor(cursor: str) -> str:
    try:
        return id_before(cursor)
    except ValueError as error:
        raise InvalidCursor() from error
