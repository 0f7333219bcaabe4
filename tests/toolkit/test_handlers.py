"""What makes a function a handler, and who has which handlers."""

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from msgspec import UNSET, Raw

from microservices.exceptions import ConfigurationError, InvalidPayload
from microservices.handlers import Colour, Handler, Registry, event_pattern, handlers_in, message_pattern
from tests.toolkit.conftest import context

if TYPE_CHECKING:
    from decimal import Decimal


class Order(msgspec.Struct):
    """A payload."""

    id: int


def plain(data: Order) -> None:
    """A function of the first colour."""


async def coroutine(data: Order) -> None:
    """A function of the second colour."""


async def stream(data: Order) -> AsyncIterator[int]:
    """A function of the third colour."""
    yield 1


# Doors


def test_a_decorated_function_is_still_the_function() -> None:
    def ask() -> int:
        return 5

    decorated = message_pattern("ask")(ask)

    assert decorated is ask
    assert decorated() == 5


def test_a_list_registers_a_handler_under_every_entry() -> None:
    @message_pattern(["one", {"cmd": "two"}, 3, ["a"]])
    def ask() -> None: ...

    assert [door.route for door in Handler(ask).doors] == ["one", '{"cmd":"two"}', "3", '{"0":"a"}']


def test_a_handler_may_have_doors_of_both_kinds() -> None:
    @message_pattern({"cmd": "ask"}, retry="safe", deadline=2.5)
    @event_pattern("asked")
    def ask() -> None: ...

    event, request = Handler(ask).doors

    assert (event.kind, event.name, event.retry, event.deadline) == ("event", "asked", "never", None)
    assert (request.kind, request.name, request.retry, request.deadline) == ("request", "ask", "safe", 2.5)


@pytest.mark.parametrize("pattern", [None, True, [], [None], ["ok", False]])
@pytest.mark.parametrize("decorator", [message_pattern, event_pattern])
def test_a_pattern_that_can_never_match_is_refused(decorator: Callable[..., Any], pattern: Any) -> None:
    with pytest.raises(ConfigurationError, match="can never match"):
        decorator(pattern)


def test_an_unknown_word_for_retry_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'safe', 'keyed' or 'never'"):
        message_pattern("ask", retry="always")


# Colours


@pytest.mark.parametrize(
    ("function", "inline", "colour"),
    [
        (plain, False, Colour.POOL),
        (plain, True, Colour.INLINE),
        (coroutine, False, Colour.TASK),
        (stream, False, Colour.STREAM),
    ],
)
def test_how_a_handler_is_written_decides_where_it_runs(
    function: Callable[..., Any], inline: bool, colour: Colour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(function, "__microservice_doors__", raising=False)

    handler = Handler(message_pattern("ask", inline=inline)(function))

    assert handler.colour is colour
    monkeypatch.delattr(function, "__microservice_doors__")


@pytest.mark.parametrize("inline", [True, False])
def test_a_plain_generator_is_refused(inline: bool) -> None:
    @message_pattern("ask", inline=inline)
    def ask() -> Iterator[int]:
        yield 1

    with pytest.raises(ConfigurationError, match="`async def` with `yield`"):
        Handler(ask)


def test_only_a_plain_function_can_be_inline() -> None:
    @message_pattern("ask", inline=True)
    async def ask() -> None: ...

    @message_pattern("count", inline=True)
    async def count() -> AsyncIterator[int]:
        yield 1

    for function in (ask, count):
        with pytest.raises(ConfigurationError, match="only a plain `def`"):
            Handler(function)


# Arguments and payloads


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: "nothing", "nothing"),
        (lambda data: data, {"a": 1}),
        (lambda data, ctx: (data, ctx.pattern), ({"a": 1}, "ask")),
        (lambda data, ctx, more="more": (data, ctx.pattern, more), ({"a": 1}, "ask", "more")),
        (lambda *everything: everything, ()),
        (lambda data=5, **more: (data, more), ({"a": 1}, {})),
    ],
)
def test_a_handler_is_given_what_it_takes(function: Callable[..., Any], expected: Any) -> None:
    handler = Handler(function)

    payload = handler.convert(Raw(b'{"a":1}'))

    assert handler.invoke(payload, context()) == expected


@pytest.mark.parametrize("function", [lambda a, b, c: None, lambda data, *, key: None])
def test_a_handler_that_wants_more_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"takes \(data, context\), \(data\) or nothing"):
        Handler(function)


def test_the_annotation_is_the_schema() -> None:
    handler = Handler(plain)

    assert handler.convert(Raw(b'{"id":5}')) == Order(5)
    with pytest.raises(InvalidPayload):
        handler.convert(Raw(b'{"id":"five"}'))


def test_a_missing_payload_is_null() -> None:
    assert Handler(lambda data: data).convert(UNSET) is None
    with pytest.raises(InvalidPayload):
        Handler(plain).convert(UNSET)


def test_a_handler_that_takes_nothing_does_not_look_at_the_payload() -> None:
    assert Handler(lambda: None).convert(Raw(b"not even JSON")) is None


def test_the_annotations_are_known() -> None:
    def ask(data: "Order") -> "list[Order]":
        return [data]

    handler = Handler(ask)

    assert (handler.payload, handler.result) == (Order, list[Order])


def test_an_annotation_for_the_type_checker_alone_is_refused() -> None:
    def ask(data: "Decimal") -> None: ...

    with pytest.raises(ConfigurationError, match="importable at run time"):
        Handler(ask)


def test_an_annotation_that_json_cannot_fill_is_refused() -> None:
    def ask(data: Order | dict[int, complex] | list[Callable[[], None]] | set[Order]) -> None: ...

    with pytest.raises(ConfigurationError, match=r"ask: JSON cannot become"):
        Handler(ask)


# Registries


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """A module of handlers inside a package, as a service has."""
    module = ModuleType("shop.handlers")
    sys.modules["shop.handlers"] = module
    yield module
    del sys.modules["shop.handlers"]


def function_of(module: str, pattern: Any) -> Callable[..., Any]:
    """Make a handler that was written in this module."""

    def handler() -> None: ...

    handler.__module__ = module
    return message_pattern(pattern)(handler)


def test_the_handlers_of_a_module_are_those_of_its_package(module: ModuleType) -> None:
    module.own = function_of("shop.handlers", "own")
    module.again = module.own
    module.imported = function_of("shop.more.handlers", "imported")
    module.foreign = function_of("shopping.handlers", "foreign")
    module.plain = plain

    routes = [door.route for handler in handlers_in(module) for door in handler.doors]

    assert routes == ["own", "imported"]


def test_a_registry_keeps_handlers_by_service_in_their_order() -> None:
    registry = Registry()
    first, second, other = (Handler(plain) for _ in range(3))

    registry.add("shop", [first])
    registry.add("other", [other])
    registry.add("shop", [second])

    assert registry.of("shop") == (first, second)
    assert registry.of("unknown") == ()
    assert registry.services() == ["shop", "other"]


def test_a_frozen_registry_takes_no_more() -> None:
    registry = Registry()
    registry.freeze()

    with pytest.raises(ConfigurationError, match="while applications load"):
        registry.add("shop", [Handler(plain)])


def test_a_way_of_delivery_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="use 'one' or 'each'"):
        event_pattern("made", delivery="all")  # type: ignore[arg-type]
