"""What an app says it calls: circles are told, strangers refused while one develops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import make_dataclass
from typing import Any, TypedDict

import pytest
from django.apps import apps
from msgspec import defstruct
from pytest_django import Settings

from microservices import ConfigurationError, RpcException, clients, event_pattern, message_pattern
from microservices.checks import check_dependencies, check_retries
from microservices.dependencies import circles, require
from microservices.rest import Lookup, RpcView, Send
from tests.toolkit.django.test_checks import told

Install = Callable[..., None]
Declare = Callable[[Mapping[str, tuple[str, ...] | None]], None]


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Declare:
    """Let installed apps stand for services: `declare({"users": ("orders",)})`; all others call nobody."""

    def declare(graph: Mapping[str, tuple[str, ...] | None]) -> None:
        for name, config in apps.app_configs.items():
            monkeypatch.setattr(config, "calls", graph.get(name, ()), raising=False)

    return declare


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"orders": ("payments",)}, []),
        ({"orders": ("orders",)}, []),  # a service may ask itself
        ({"users": None, "orders": ("users",)}, []),
        ({"users": ("orders",), "orders": ("users",)}, [["orders", "users", "orders"]]),
        (
            {"users": ("orders",), "orders": ("payments",), "payments": ("users",), "gateway": ("users",)},
            [["orders", "payments", "users", "orders"]],
        ),
        (
            {"users": ("orders", "payments"), "orders": ("users",), "payments": ("users",)},
            [["orders", "users", "orders"], ["payments", "users", "payments"]],
        ),
    ],
)
def test_each_circle_is_found_once(declare: Declare, graph: dict[str, tuple[str, ...]], found: list[list[str]]) -> None:
    declare(graph)

    assert circles() == found


def test_services_that_wait_for_one_another_are_w004(declare: Declare) -> None:
    declare({"users": ("orders",), "orders": ("payments",), "payments": ("users",)})

    text = "orders calls payments calls users calls orders: each may wait for the others until none has time left."
    assert told(check_dependencies()) == [("W004", text)]


def test_a_service_that_is_not_on_the_map_cannot_be_declared_and_is_e011(declare: Declare) -> None:
    declare({"orders": ("payment",)})

    text = "orders declares that it calls 'payment', which MICROSERVICES['CLIENTS'] does not name."
    assert told(check_dependencies()) == [("E011", text)]


@message_pattern("ask")
async def ask(target: str) -> Any:
    """Ask another service."""
    return await clients[target].send("answer", None)


@message_pattern("ask_in_thread")
def ask_in_thread(target: str) -> Any:
    """The same from a thread."""
    return clients[target].sync.send("answer", None)


@message_pattern("answer")
async def answer() -> int:
    """Answer."""
    return 42


@event_pattern("asked")
async def asked() -> None:
    """Hear an event."""


@message_pattern("tell")
async def tell() -> None:
    """Emit an event."""
    await clients.events.emit("asked", None)


SERVICES = {"orders": [ask, ask_in_thread, tell, answer], "payments": [answer], "users": [answer, asked]}


@pytest.mark.parametrize("pattern", ["ask", "ask_in_thread"])
def test_a_call_that_is_not_declared_is_refused_in_development(
    install: Install, declare: Declare, settings: Settings, caplog: pytest.LogCaptureFixture, pattern: str
) -> None:
    settings.DEBUG = True
    install(**SERVICES)
    declare({"orders": ("payments",)})

    assert clients["users"].sync.send("answer", None) == 42  # by nobody's handler
    assert clients["orders"].sync.send(pattern, "payments") == 42
    assert clients["orders"].sync.send(pattern, "orders") == 42
    with pytest.raises(RpcException, match="Internal server error"):
        clients["orders"].sync.send(pattern, "users")

    text = "orders calls users, and does not declare it: add 'users' to `calls` of its AppConfig."
    assert text in caplog.text


def test_an_event_is_no_call(install: Install, declare: Declare, settings: Settings) -> None:
    settings.DEBUG = True
    install(**SERVICES)
    declare({"orders": ()})

    assert clients["orders"].sync.send("tell", None) is None


def test_an_app_that_says_nothing_of_calls_may_call_all(install: Install, declare: Declare, settings: Settings) -> None:
    settings.DEBUG = True
    install(**SERVICES)
    declare({"orders": None})

    assert clients["orders"].sync.send("ask", "users") == 42


def test_nobody_looks_where_it_is_not_development(install: Install, declare: Declare) -> None:
    install(**SERVICES)
    declare({"orders": ()})

    assert clients["orders"].sync.send("ask", "users") == 42
    assert clients["orders"]._middlewares == []


@pytest.mark.parametrize(
    "send",
    [
        Send("users", {"cmd": "get_user"}),
        Send("orders", {"cmd": "create_order"}, lookups={"customer": Lookup("users", "get_user", "user_id", ("id",))}),
    ],
)
def test_a_view_that_sends_where_its_app_does_not_call_is_refused_in_development(
    declare: Declare, settings: Settings, send: Send
) -> None:
    class View(RpcView):
        get = send

    View.__module__ = "gateway.views"
    declare({"gateway": ("orders",)})
    View.as_view()
    settings.DEBUG = True

    with pytest.raises(ConfigurationError, match="gateway calls users, and does not declare it: add 'users'"):
        View.as_view()


@pytest.mark.parametrize("app", ["gateway", "users", "orders", "payments", "notifications"])
def test_each_service_of_the_shop_says_whom_it_calls(app: str) -> None:
    assert apps.get_app_config(app).calls is not None  # type: ignore[attr-defined]
    require(app, [])


class TestRetries:
    """E005 and W006: nobody repeats more freely than a handler allows."""

    def place(self, settings: Settings, **told: Any) -> None:
        settings.MICROSERVICES = {
            **settings.MICROSERVICES,
            "CLIENTS": {"shop": {"url": "tcp://127.0.0.1:1", **told}},
            "SERVERS": {},
        }

    @pytest.mark.parametrize(
        ("handler_says", "told_of_it", "wrong"),
        [
            ("never", {}, False),
            ("never", {"patterns": {"make": {"retry": "never"}}}, False),
            ("never", {"policies": {"retries": 5}}, False),  # for those of its patterns that may be repeated
            ("never", {"patterns": {"make": {"retry": "keyed"}}}, True),
            ("never", {"patterns": {"make": {"retries": 2}}}, True),
            ("never", {"policies": {"retry": "safe"}}, True),
            ("keyed", {"patterns": {"make": {"retry": "keyed"}}}, False),
            ("keyed", {"patterns": {"make": {"retry": "never"}}}, False),
            ("keyed", {"patterns": {"make": {"retry": "safe"}}}, True),
            ("safe", {"patterns": {"make": {"retry": "safe"}}}, False),
        ],
    )
    def test_settings_that_repeat_what_its_handler_forbids_are_e005(
        self, install: Install, settings: Settings, handler_says: Any, told_of_it: dict[str, Any], wrong: bool
    ) -> None:
        @message_pattern({"cmd": "make"}, retry=handler_says)
        async def make(data: Any) -> None: ...

        install(shop=[make])
        self.place(settings, **told_of_it)

        found = [message for message in check_retries() if str(message.id).endswith("E005")]

        assert bool(found) is wrong
        assert all("shop make" in message.msg and f"{__name__}" in message.msg for message in found)

    @pytest.mark.parametrize(
        ("payload", "warned"),
        [
            (defstruct("Keyed", [("idempotency_key", str), ("sum", int)]), False),
            (TypedDict("KeyedDict", {"idempotency_key": str}), False),
            (make_dataclass("KeyedClass", [("idempotency_key", str)]), False),
            (defstruct("Plain", [("sum", int)]), True),
            (int, True),
            (Any, True),
        ],
    )
    def test_a_keyed_pattern_whose_payload_shows_no_key_is_w006(
        self, install: Install, settings: Settings, payload: Any, warned: bool
    ) -> None:
        def pay(data: Any) -> None: ...

        pay.__annotations__["data"] = payload
        install(shop=[message_pattern("pay", retry="keyed")(pay)])
        self.place(settings)

        found = check_retries()

        assert [message.id for message in found] == ["microservices.W006"] * warned
