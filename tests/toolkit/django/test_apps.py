"""What is found when Django is ready, and what is read again when a test changes the settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from pytest_django import Settings

from microservices import ConfigurationError, clients, message_pattern
from microservices.conf import get_settings
from microservices.handlers import Handler, handlers_in, registry
from microservices.microservice import get_executor, get_microservice

Package = Callable[..., str]


def test_the_handlers_of_every_app_are_found_under_its_label() -> None:
    names = [handler.name for handler in registry.of("users")]

    assert "users.handlers.get_user" in names
    assert len(names) == len(set(names))
    assert registry.services() == ["registry", "users", "orders", "payments", "notifications"]
    assert "notifications.consumers.NotificationsConsumer.order_created" in [
        handler.name for handler in registry.of("notifications")
    ]


def test_no_handler_can_be_added_once_the_apps_are_ready() -> None:
    @message_pattern("late")
    async def late() -> None:
        """Never called."""

    with pytest.raises(ConfigurationError, match="while applications load"):
        registry.add("users", [Handler(late)])

    assert not any(door.route == "late" for handler in registry.of("users") for door in handler.doors)


def test_functions_that_a_module_borrows_from_other_packages_are_not_its_handlers() -> None:
    @message_pattern("own")
    async def own() -> None:
        """Declared in the module."""

    @message_pattern("split")
    async def split() -> None:
        """Declared in a neighbour of the same package."""

    @message_pattern("borrowed")
    async def borrowed() -> None:
        """Declared by somebody else."""

    async def helper() -> None:
        """No handler at all."""

    own.__module__, split.__module__, borrowed.__module__ = "shop.handlers", "shop.more.doors", "shopping.handlers"
    module = ModuleType("shop.handlers")
    vars(module).update(own=own, again=own, split=split, borrowed=borrowed, helper=helper, number=3)

    found = handlers_in(module)

    assert [handler.function for handler in found] == [own, split]


def test_an_app_that_a_test_installs_brings_its_handlers(package: Package, settings: Settings) -> None:
    name = package(
        handlers="""
        from microservices import message_pattern

        @message_pattern("hello")
        async def hello() -> None: ...
        """
    )

    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, name]

    assert [handler.name for handler in registry.of(name)] == [f"{name}.handlers.hello"]
    assert "users.handlers.get_user" in [handler.name for handler in registry.of("users")]
    assert len(registry.of("users")) == len({handler.name for handler in registry.of("users")})


def test_an_error_in_a_handlers_module_is_not_swallowed(package: Package, settings: Settings) -> None:
    name = package(handlers="import nothing_by_this_name")

    with pytest.raises(ModuleNotFoundError, match="nothing_by_this_name"):
        settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, name]


def test_settings_that_a_test_changes_are_read_again(settings: Settings) -> None:
    before = get_settings(), get_microservice("users"), get_executor(), clients["users"]

    settings.MICROSERVICES = {**settings.MICROSERVICES, "CALL_TIMEOUT": 1.5, "THREADS": 2}

    after = get_settings(), get_microservice("users"), get_executor(), clients["users"]
    assert all(new is not old for new, old in zip(after, before, strict=True))
    assert (get_settings().call_timeout, clients["users"].timeout) == (1.5, 1.5)


def test_other_settings_leave_everything_as_it_is(settings: Settings) -> None:
    before = get_microservice("users")

    settings.APPEND_SLASH = False

    assert get_microservice("users") is before


def test_a_service_that_lives_elsewhere_has_no_microservice_here(settings: Settings) -> None:
    settings.MICROSERVICES = {**settings.MICROSERVICES, "SERVERS": {}}

    with pytest.raises(ConfigurationError, match=r"'users' does not live in this process \(here: none\)"):
        get_microservice("users")


def test_the_source_root_comes_first_on_the_import_path() -> None:
    origins = {name: Path(str(sys.modules[name].__file__)).parent.parent for name in ("microservices", "users")}

    assert set(origins.values()) == {Path(__file__).resolve().parents[3] / "apps"}
