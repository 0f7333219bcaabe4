"""What travels to and from the users service."""

from datetime import datetime
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

MAX_PAGE = 100
MAX_ALL = 1000

# A "$" alone would also match before a last line feed, hence the look-ahead behind it.
Name = Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^(?!\s*$)[^\x00-\x1f\x7f]+$(?!\n)")]
_PART = r"[^@\s,;<>\x00-\x1f\x7f]"
Email = Annotated[str, Meta(max_length=254, pattern=rf"^{_PART}+@{_PART}+\.{_PART}+$(?!\n)")]
Password = Annotated[str, Meta(min_length=8, max_length=128)]
Search = Annotated[str, Meta(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)")]
Limit = Annotated[int, Meta(ge=1, le=MAX_PAGE)]
Version = Annotated[int, Meta(ge=1)]


class GetUser(Struct):
    """Ask for one user."""

    id: str


class GetUsers(Struct):
    """Ask for a page of users, those whose name or e-mail address contains `search`."""

    search: Search = ""
    cursor: str | None = None
    limit: Limit = 50


class Everything(Struct):
    """Ask for all users at once."""


class GetUsersByIds(Struct):
    """Ask for several users at once; ids that nobody has are left out of the answer."""

    ids: Annotated[list[str], Meta(max_length=MAX_PAGE)]


class CreateUser(Struct):
    """Register a customer."""

    name: Name
    email: Email
    password: Password


class UpdateUser(Struct):
    """Change what is given; with `version`, only if the user still is at that version."""

    id: str
    name: Name | UnsetType = UNSET
    email: Email | UnsetType = UNSET
    version: Version | UnsetType = UNSET


class DeleteUser(Struct):
    """Close an account and forget whose it was."""

    id: str


class User(Struct):
    """A user as others may see it."""

    id: str
    email: str
    name: str
    role: str
    status: str
    version: int
    created_at: datetime


class UserEvent(Struct):
    """What the `user_*` events tell."""

    id: str
    name: str
    email: str
    role: str
    status: str
    version: int


class Users(Struct):
    """A page of users; `next` is the cursor of the page after it, if there is one."""

    users: list[User]
    next: str | None = None
