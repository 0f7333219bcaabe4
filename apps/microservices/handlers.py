"""The decorators that make a function a handler, and the registry of all handlers."""

from __future__ import annotations

import inspect
import typing
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from enum import Enum
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar

from msgspec import Raw

from .codec import decoder, kind_of
from .context import RpcContext
from .exceptions import ConfigurationError
from .mailbox import Mailbox
from .packets import pattern_name, route

Retry = Literal["safe", "keyed", "never"]
Delivery = Literal["one", "each"]
F = TypeVar("F", bound=Callable[..., Any])

_DOORS = "__microservice_doors__"
_NULL = Raw(b"null")


class Door(NamedTuple):
    """One way into a handler."""

    kind: Literal["request", "event", "grpc"]
    route: str
    retry: Retry
    deadline: float | None
    inline: bool
    delivery: Delivery = "one"

    @property
    def name(self) -> str:
        return pattern_name(self.route)


class Colour(Enum):
    """Where a handler runs; decided once, by how it is written."""

    POOL = "def: may touch the ORM, runs whole on a thread of the pool"
    TASK = "async def: a task on the event loop"
    STREAM = "async def with yield: a task that answers many times"
    INLINE = "def declared inline: pure and quick, called in place"
    CONSUMER = "method of a consumer: delivered to the consumer, which runs it"


def message_pattern(
    pattern: Any, *, retry: Retry = "never", deadline: float | None = None, inline: bool = False
) -> Callable[[F], F]:
    """Make a function answer requests with this pattern, as NestJS's `@MessagePattern`.

    `pattern` is a string, a number or a mapping; a list registers the handler under each entry.
    `retry` says what a repeated call would do: "safe" changes nothing more, "keyed" is told apart
    by its `idempotency_key`, "never" must not be repeated. `deadline` caps the seconds a call may
    take. `inline` promises that a plain `def` neither blocks nor touches the ORM.
    Raises ConfigurationError for a pattern that can never match.
    """
    if retry not in ("safe", "keyed", "never"):
        raise ConfigurationError(f"retry={retry!r}: use 'safe', 'keyed' or 'never'.")
    return _door("request", pattern, retry, deadline, inline)


def event_pattern(pattern: Any, *, delivery: Delivery = "one", inline: bool = False) -> Callable[[F], F]:
    """Make a function hear events with this pattern, as NestJS's `@EventPattern`.

    Several functions may hear the same event. `delivery` says who of a service's processes gets it:
    "one" of them, tried again where it fails, or "each" that runs at the time, once. (NestJS's own
    Redis pub/sub knows only "each".) `pattern` and `inline` are as in `message_pattern`.
    """
    if delivery not in ("one", "each"):
        raise ConfigurationError(f"delivery={delivery!r}: use 'one' or 'each'.")
    return _door("event", pattern, "never", None, inline, delivery)


def grpc_method(
    service: str, method: str = "", *, retry: Retry = "never", deadline: float | None = None
) -> Callable[[F], F]:
    """Make a function answer a gRPC method, as NestJS's `@GrpcMethod` and `@GrpcStreamMethod`.

    `service` is the name in the .proto file, its package needed only where several files have one of
    that name. `method` defaults to the function's own name: `find_one` is `FindOne`. A stream of
    requests comes to an `async def` whose data is annotated `AsyncIterator[...]`; a stream of answers
    is an `async def` with `yield`, or the list that a `def` returns. The other options are as in
    `message_pattern`, which may stand on the same function.
    """

    def decorate(function: F) -> F:
        name = method or "".join(part[:1].upper() + part[1:] for part in function.__name__.split("_"))
        doors = function.__dict__.setdefault(_DOORS, [])
        doors.append(Door("grpc", f"{service}/{name}", retry, deadline, inline=False))
        return function

    return decorate


def _door(
    kind: Literal["request", "event"],
    pattern: Any,
    retry: Retry,
    deadline: float | None,
    inline: bool,
    delivery: Delivery = "one",
) -> Callable[[F], F]:
    routes = [route(entry) for entry in (pattern if isinstance(pattern, list) else [pattern])]
    if not routes or None in routes:
        raise ConfigurationError(f"{pattern!r} can never match: use a string, a number, a mapping or a list of them.")

    def decorate(function: F) -> F:
        doors = function.__dict__.setdefault(_DOORS, [])
        doors.extend(Door(kind, text, retry, deadline, inline, delivery) for text in routes if text is not None)
        return function

    return decorate


def doors_of(function: Callable[..., Any]) -> tuple[Door, ...]:
    """Return the doors that the decorators have given a function."""
    return tuple(getattr(function, _DOORS, ()))


class Handler:
    """A function with its doors, compiled: how its payload converts, how it is called, where it runs.

    A consumer's method comes with the `mailbox` of its class.
    """

    def __init__(self, function: Callable[..., Any], mailbox: Mailbox | None = None) -> None:
        self.function = function
        self.mailbox = mailbox
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.doors = doors_of(function)
        self.colour = self._colour() if mailbox is None else Colour.CONSUMER
        parameters = list(inspect.signature(function).parameters.values())[0 if mailbox is None else 1 :]
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if len(required) > 2 or any(p.kind is p.KEYWORD_ONLY for p in required):
            raise ConfigurationError(f"{self.name}: a handler takes (data, context), (data) or nothing.")
        self._arguments = min(2, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters))
        self.takes_context = self._arguments == 2
        self.invoke = self._call_with(self._arguments)
        hints = self._hints()
        self.payload = hints.get(parameters[0].name, Any) if self._arguments else Any
        self.takes_stream = typing.get_origin(self.payload) in (AsyncIterator, AsyncIterable)
        if self.takes_stream:
            self.payload = typing.get_args(self.payload)[0]
            self._check_stream()
        self.result = hints.get("return", Any)
        kind = kind_of(self.payload)
        self.converts_in_thread = kind is not None and kind.blocking
        """Whether its payload is to be converted where it may wait."""
        if self.converts_in_thread and self.colour is not Colour.POOL:
            raise ConfigurationError(f"{self.name}: {self.payload!r} may ask the database: only for a `def` handler.")
        try:
            self._decode = decoder(self.payload)
        except TypeError as error:
            raise ConfigurationError(f"{self.name}: JSON cannot become {self.payload!r}: {error}") from error
        self.call = self._composed()
        """`call(data, context)` converts the payload and invokes the function."""

    def __repr__(self) -> str:
        return f"<Handler {self.name}>"

    def convert(self, data: Any) -> Any:
        """Return the payload as the annotation asks for it, from JSON or a stream of it. Raises InvalidPayload."""
        if self.takes_stream:
            return self._convert_each(data)
        return self._decode(data if isinstance(data, Raw) else _NULL) if self._arguments else None

    async def deliver(self, payload: Any, context: RpcContext) -> None:
        """Have the consumer of this method handle an event."""
        if self.mailbox is None:
            raise ConfigurationError(f"{self.name} is no consumer's method.")
        await self.mailbox.deliver(self.function.__name__, (payload, context)[: self._arguments], context)

    async def _convert_each(self, values: AsyncIterator[Raw]) -> AsyncIterator[Any]:
        async for value in values:
            yield self._decode(value)

    def _composed(self) -> Callable[[Any, RpcContext], Any]:
        decode, function = self._decode, self.function
        if self.takes_stream or not self._arguments:
            return lambda data, context: self.invoke(self.convert(data), context)
        if self._arguments == 2:
            return lambda data, context: function(decode(data if type(data) is Raw else _NULL), context)
        return lambda data, _: function(decode(data if type(data) is Raw else _NULL))

    def _check_stream(self) -> None:
        if self.colour not in (Colour.TASK, Colour.STREAM):
            raise ConfigurationError(f"{self.name}: only an `async def` can take a stream.")
        if any(door.kind != "grpc" for door in self.doors):
            raise ConfigurationError(f"{self.name}: only a gRPC method can take a stream.")

    def _call_with(self, arguments: int) -> Callable[[Any, RpcContext], Any]:
        function = self.function
        if arguments == 2:
            return function
        return (lambda payload, _: function(payload)) if arguments else (lambda *_: function())

    def _colour(self) -> Colour:
        inline = any(door.inline for door in self.doors)
        if inspect.isgeneratorfunction(self.function):
            raise ConfigurationError(f"{self.name}: a stream is `async def` with `yield`.")
        if inspect.isasyncgenfunction(self.function) or inspect.iscoroutinefunction(self.function):
            if inline:
                raise ConfigurationError(f"{self.name}: only a plain `def` can be inline.")
            return Colour.STREAM if inspect.isasyncgenfunction(self.function) else Colour.TASK
        return Colour.INLINE if inline else Colour.POOL

    def _hints(self) -> dict[str, Any]:
        try:
            return typing.get_type_hints(self.function, include_extras=True)
        except NameError as error:
            raise ConfigurationError(
                f"{self.name}: its annotations must be importable at run time, not only for the type checker: {error}."
            ) from error


def handlers_in(module: ModuleType) -> list[Handler]:
    """Return the handlers among a module's functions, those it imports from its own package included."""
    package = module.__name__.rpartition(".")[0]
    functions = {
        id(value): value
        for value in vars(module).values()
        if inspect.isfunction(value) and hasattr(value, _DOORS) and f"{value.__module__}.".startswith(f"{package}.")
    }
    return [Handler(function) for function in functions.values()]


class Registry:
    """Which handlers each service has. Frozen when the applications are ready."""

    def __init__(self) -> None:
        self._handlers: dict[str, tuple[Handler, ...]] = {}
        self._frozen = False

    def add(self, service: str, handlers: Iterable[Handler]) -> None:
        """Give a service more handlers. Raises ConfigurationError once the registry is frozen."""
        if self._frozen:
            raise ConfigurationError("Handlers are declared while applications load, not later.")
        self._handlers[service] = (*self._handlers.get(service, ()), *handlers)

    def freeze(self) -> None:
        """Refuse further handlers."""
        self._frozen = True

    def reset(self) -> None:
        """Forget all handlers: other applications are about to load."""
        self._handlers.clear()
        self._frozen = False

    def of(self, service: str) -> tuple[Handler, ...]:
        """Return the handlers of a service, in the order they were declared."""
        return self._handlers.get(service, ())

    def services(self) -> list[str]:
        """Return the names of all services that have handlers here."""
        return list(self._handlers)


registry = Registry()
