"""The request doors of the users service."""

from typing import TypeVar

from msgspec import UnsetType

from microservices import RpcContext, grpc_method, message_pattern

from . import models, selectors, services
from .contracts import CreateUser, DeleteUser, Everything, GetUser, GetUsers, GetUsersByIds, UpdateUser, User, Users

T = TypeVar("T")


@message_pattern({"cmd": "get_user"}, retry="safe")
@grpc_method("UsersService", "FindOne", retry="safe")
def get_user(data: GetUser, ctx: RpcContext) -> User:
    """Return one user."""
    return _shown(selectors.user_get(user_id=data.id))


@message_pattern({"cmd": "get_users"}, retry="safe")
def get_users(data: GetUsers, ctx: RpcContext) -> Users:
    """Return a page of users."""
    page = selectors.user_list(search=data.search, cursor=data.cursor, limit=data.limit)
    return Users(users=[_shown(user) for user in page.users], next=page.next)


@grpc_method("UsersService", retry="safe")
def find_all(data: Everything, ctx: RpcContext) -> Users:
    """Return all users, as many as one message may hold."""
    return Users(users=[_shown(user) for user in selectors.user_list_all()])


@message_pattern({"cmd": "get_users_by_ids"}, retry="safe")
def get_users_by_ids(data: GetUsersByIds, ctx: RpcContext) -> Users:
    """Return several users by their ids."""
    return Users(users=[_shown(user) for user in selectors.user_list_by_ids(user_ids=data.ids)])


@message_pattern({"cmd": "create_user"})
@grpc_method("UsersService", "CreateUser")
def create_user(data: CreateUser, ctx: RpcContext) -> User:
    """Register a customer."""
    return _shown(services.user_create(email=data.email, name=data.name, password=data.password))


@message_pattern({"cmd": "update_user"})
def update_user(data: UpdateUser, ctx: RpcContext) -> User:
    """Change a user's name or e-mail address."""
    user = services.user_update(
        user_id=data.id, name=_given(data.name), email=_given(data.email), version=_given(data.version)
    )
    return _shown(user)


@message_pattern({"cmd": "delete_user"})
def delete_user(data: DeleteUser, ctx: RpcContext) -> None:
    """Close an account."""
    services.user_delete(user_id=data.id)


def _shown(user: models.User) -> User:
    return User(
        id=user.id,
        email=user.email,
        name=user.name,
        role=user.role,
        status=user.status,
        version=user.version,
        created_at=user.created_at,
    )


def _given(value: T | UnsetType) -> T | None:
    return None if isinstance(value, UnsetType) else value
