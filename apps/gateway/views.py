"""The REST API of the shop: each method declares the message that it sends."""

from microservices.rest import RpcView, Send

from . import serializers


class UserList(RpcView):
    """All users, and registration."""

    get = Send(
        "users",
        {"cmd": "get_users"},
        query=serializers.UserQuery,
        returns=serializers.User,
        page="users",
        summary="List users",
    )
    post = Send(
        "users",
        {"cmd": "create_user"},
        body=serializers.UserCreate,
        returns=serializers.User,
        status=201,
        summary="Register a user",
    )


class UserDetail(RpcView):
    """One user."""

    get = Send("users", {"cmd": "get_user"}, returns=serializers.User, summary="Show a user")
    patch = Send(
        "users", {"cmd": "update_user"}, body=serializers.UserUpdate, returns=serializers.User, summary="Change a user"
    )
    delete = Send("users", {"cmd": "delete_user"}, status=204, summary="Delete a user")
