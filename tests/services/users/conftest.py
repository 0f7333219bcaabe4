"""Users to test with."""

from collections.abc import Callable

import pytest
from pytest_django import Settings

from users.models import User
from users.services import user_create

Register = Callable[[str], User]


@pytest.fixture(autouse=True)
def _quick_hashes(settings: Settings) -> None:
    # The real ones are slow on purpose.
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture
def register() -> Register:
    """Register a user by first name."""

    def register(name: str) -> User:
        return user_create(email=f"{name.lower()}@example.org", name=name, password="correct horse")

    return register
