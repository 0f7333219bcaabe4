"""What the gateway takes from its clients, and what it shows them of a service's reply."""

from typing import Any

from rest_framework import serializers


class PageQuery(serializers.Serializer[Any]):
    """Which part of a list."""

    cursor = serializers.CharField(required=False, help_text="`next` of the page before.")
    limit = serializers.IntegerField(required=False, min_value=1, max_value=100)


class UserQuery(PageQuery):
    """Which users."""

    search = serializers.CharField(
        required=False, allow_blank=True, max_length=100, help_text="A part of name or e-mail address."
    )


class User(serializers.Serializer[Any]):
    """A user as others may see it."""

    id = serializers.CharField()
    name = serializers.CharField()
    email = serializers.EmailField()
    role = serializers.CharField()
    status = serializers.CharField()
    version = serializers.IntegerField()
    created_at = serializers.DateTimeField()


class UserCreate(serializers.Serializer[Any]):
    """A registration."""

    name = serializers.CharField(max_length=100)
    email = serializers.EmailField(max_length=254)
    password = serializers.CharField(min_length=8, max_length=128, trim_whitespace=False, write_only=True)


class UserUpdate(serializers.Serializer[Any]):
    """What of a user may change; `version` refuses the change if somebody else was faster."""

    name = serializers.CharField(max_length=100, required=False)
    email = serializers.EmailField(max_length=254, required=False)
    version = serializers.IntegerField(min_value=1, required=False)
