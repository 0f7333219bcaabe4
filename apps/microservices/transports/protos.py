""".proto files, loaded at start without generated code, and plain objects in place of their messages."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message

from ..exceptions import ConfigurationError, InvalidPayload

logger = logging.getLogger("microservices.grpc")

_COMPILE_TIMEOUT = 30.0
# What protobuf raises for bytes and values that are none of a type's.
_ODD = (DecodeError, EncodeError, TypeError, ValueError, OverflowError, AttributeError, RecursionError)
Read = Callable[[Any, bool], Any]
Write = Callable[[Any, bool], Any]


class Method(NamedTuple):
    """One RPC of a service: `path` is what travels, `/users.UsersService/FindOne`."""

    path: str
    service: str
    name: str
    request: Shape
    response: Shape
    client_streaming: bool
    server_streaming: bool


class Protos:
    """The services of some .proto files."""

    def __init__(self, files: bytes) -> None:
        described = descriptor_pb2.FileDescriptorSet.FromString(files)
        if not described.file:
            raise ConfigurationError("There is nothing in the .proto files.")
        self.files = [file.SerializeToString() for file in described.file]
        self.pool = descriptor_pool.DescriptorPool()
        for content in self.files:
            self.pool.AddSerializedFile(content)
        self._shapes: dict[str, Shape] = {}
        self.services: dict[str, dict[str, Method]] = {}
        for file in described.file:
            package = f"{file.package}." if file.package else ""
            for service in file.service:
                name = f"{package}{service.name}"
                self.services[name] = {method.name: self._method(name, method) for method in service.method}

    def service(self, name: str) -> str:
        """Return a service's full name; `name` may leave out the package, or a part of it, where that is clear.

        Raises ConfigurationError for one that no file declares, or several do.
        """
        if name in self.services:
            return name
        found = [full for full in self.services if full.endswith(f".{name}")]
        if len(found) == 1:
            return found[0]
        told = "several have it" if found else "none has it"
        raise ConfigurationError(
            f"The service {name!r} of the .proto files is not clear: {told} among {self._known()}."
        )

    def method(self, path: str) -> Method:
        """Return the RPC that `Service/Method` names. Raises ConfigurationError where there is none."""
        given, _, name = path.strip("/").rpartition("/")
        service = self.service(given)
        methods = self.services[service]
        if name not in methods:
            raise ConfigurationError(f"{service} has no RPC {name!r}; it has {', '.join(methods) or 'none'}.")
        return methods[name]

    def shape(self, descriptor: Descriptor) -> Shape:
        """Return the shape of a message type, compiled once."""
        shape = self._shapes.get(descriptor.full_name)
        if shape is None:
            shape = self._shapes[descriptor.full_name] = Shape(descriptor, self.shape)
            shape.compile()
        return shape

    def _method(self, service: str, method: descriptor_pb2.MethodDescriptorProto) -> Method:
        request, response = (
            self.shape(self.pool.FindMessageTypeByName(name.lstrip(".")))
            for name in (method.input_type, method.output_type)
        )
        path = f"/{service}/{method.name}"
        return Method(path, service, method.name, request, response, method.client_streaming, method.server_streaming)

    def _known(self) -> str:
        return ", ".join(self.services) or "no service at all"


class Shape:
    """A message type: its bytes become a plain dict, and back.

    Fields keep the names of the .proto file, 64-bit integers stay integers, enums are their names,
    bytes stay bytes, and google.protobuf's own types take their JSON form. What was not sent has its
    default; an `optional` field or a message that was not sent is missing, or None where `decode` is
    told so.
    """

    def __init__(self, descriptor: Descriptor, shape: Callable[[Descriptor], Shape]) -> None:
        self.name = descriptor.full_name
        self._descriptor = descriptor
        self._shape = shape
        self._class: type[Message] = message_factory.GetMessageClass(descriptor)
        self._always: list[tuple[str, Read]] = []
        self._present: list[tuple[str, Read]] = []
        self._writes: dict[str, tuple[str, Write, bool]] = {}
        self._special = _special(self.name, descriptor.file.pool)

    def compile(self) -> None:
        """Plan each field. Apart from the constructor, since a message may contain its own type."""
        for field in self._descriptor.fields:
            read, write = self._plan(field)
            (self._present if field.has_presence else self._always).append((field.name, read))
            for name in {field.json_name, field.camelcase_name, field.name}:
                self._writes[name] = field.name, write, _takes_null(field)

    def decode(self, body: bytes, *, nulls: bool = False) -> Any:
        """Return the message in `body`. Raises InvalidPayload for bytes that are none.

        With `nulls`, fields that were not sent and have no default are None instead of missing.
        """
        try:
            return self.read(self._class.FromString(body), nulls)
        except _ODD as error:  # also a time after the year 9999, or an Any of a type that nobody knows
            raise InvalidPayload(f"These bytes are no {self.name}.") from error

    def encode(self, value: Any, *, strict: bool = False) -> bytes:
        """Return the bytes of a plain value; with `strict`, a field that the message does not have is an error.

        Raises InvalidPayload for a value that does not fit, with a pointer to the field.
        """
        try:
            message: bytes = self.write(value, strict).SerializeToString()
        except _ODD as error:
            raise InvalidPayload(f"This is no {self.name}.") from error
        return message

    def read(self, message: Any, nulls: bool) -> Any:
        """Return a message as a plain value."""
        if self._special is not None:
            return self._special.read(message)
        fields = {name: read(getattr(message, name), nulls) for name, read in self._always}
        for name, read in self._present:
            if message.HasField(name):
                fields[name] = read(getattr(message, name), nulls)
            elif nulls:
                fields[name] = None
        return fields

    def write(self, value: Any, strict: bool) -> Any:
        """Return a plain value as a message."""
        if self._special is not None:
            try:
                return self._special.write(value, self._class())
            except (json_format.ParseError, AttributeError) as error:
                raise InvalidPayload(f"This is no {self.name}: {error}") from error
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise InvalidPayload(f"{self.name} is an object, not {type(value).__name__}.")
        fields: dict[str, Any] = {}
        for key, part in value.items():
            known = self._writes.get(key)
            if known is None:
                if strict:
                    raise InvalidPayload(f"{self.name} has no field {key!r}.", f"/{key}")
                continue
            name, write, takes_null = known
            if part is None and not takes_null:
                continue
            try:
                fields[name] = write(part, strict)
            except InvalidPayload as error:
                raise _inside(key, error) from error
            except (TypeError, ValueError, OverflowError) as error:
                raise InvalidPayload(f"This does not fit: {error}", f"/{key}") from error
        try:
            return self._class(**fields)
        except (TypeError, ValueError, OverflowError) as error:
            raise _blamed(self._class, fields, error) from error

    def _plan(self, field: FieldDescriptor) -> tuple[Any, Any]:
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            return self._plan_map(kind)
        read, write = self._plan_one(field)
        if not field.is_repeated:
            return read, write
        return (
            lambda values, nulls: [read(value, nulls) for value in values],
            lambda values, strict: _items(values, write, strict),
        )

    def _plan_one(self, field: FieldDescriptor) -> tuple[Any, Any]:
        if field.message_type is not None:
            shape = self._shape(field.message_type)
            return shape.read, shape.write
        if field.enum_type is not None:
            return _enum(field.enum_type)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return _as_is, _bytes
        return _as_is, _as_is

    def _plan_map(self, entry: Descriptor) -> tuple[Any, Any]:
        read, write = self._plan_one(entry.fields_by_name["value"])
        kind = entry.fields_by_name["key"].cpp_type

        def write_all(values: Any, strict: bool) -> dict[Any, Any]:
            if not isinstance(values, Mapping):
                raise TypeError("an object is expected")
            return {_key(key, kind): _within(str(key), write, value, strict) for key, value in values.items()}

        def read_all(values: Any, nulls: bool) -> dict[str, Any]:
            return {_key_text(key): read(value, nulls) for key, value in values.items()}

        return read_all, write_all


def _as_is(value: Any, _: bool) -> Any:
    return value


def _bytes(value: Any, _: bool) -> Any:
    # JSON has no bytes, so those who come from there write them in base64.
    return b64decode(value, validate=True) if isinstance(value, str) else value


def _items(values: Any, write: Any, strict: bool) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise TypeError("a list is expected")
    return [_within(str(index), write, value, strict) for index, value in enumerate(values)]


def _within(key: str, write: Any, value: Any, strict: bool) -> Any:
    try:
        return write(value, strict)
    except InvalidPayload as error:
        raise _inside(key, error) from error


def _key(key: Any, kind: int) -> Any:
    # JSON's keys are texts, whatever the map's are.
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return key
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if str(key).lower() not in ("true", "false"):
            raise ValueError(f"the key {key!r} is neither true nor false")
        return str(key).lower() == "true"
    return int(key)


def _key_text(key: Any) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


def _takes_null(field: FieldDescriptor) -> bool:
    # There null is a value; everywhere else it says that there is none.
    return field.message_type is not None and field.message_type.full_name == "google.protobuf.Value"


def _enum(enum: EnumDescriptor) -> tuple[Any, Any]:
    names: dict[int, str] = {}
    for value in enum.values:
        names.setdefault(value.number, value.name)  # of several names for a number the first is told
    numbers = {value.name: value.number for value in enum.values}

    def write(value: Any, _: bool) -> int:
        if isinstance(value, str):
            if value not in numbers:
                raise InvalidPayload(f"{value!r} is none of {', '.join(numbers)}.")
            return numbers[value]
        if type(value) is not int:
            raise InvalidPayload(f"{value!r} is none of {', '.join(numbers)}.")
        return value

    return (lambda number, _: names.get(number, number)), write


def _inside(key: str, error: InvalidPayload) -> InvalidPayload:
    return InvalidPayload(error.message, f"/{key}{error.errors[0]['pointer']}")


def _blamed(kind: type[Message], fields: dict[str, Any], error: Exception) -> InvalidPayload:
    # protobuf's complaint does not always name the field.
    for name, value in fields.items():
        try:
            kind(**{name: value})
        except TypeError:
            return InvalidPayload(f"A value of type {type(value).__name__} does not fit.", f"/{name}")
        except (ValueError, OverflowError) as alone:
            return InvalidPayload(f"This does not fit: {alone}", f"/{name}")
    return InvalidPayload(f"This does not fit: {error}")


# google.protobuf's own types, in their JSON form (protobuf's "ProtoJSON format").


class _Special(NamedTuple):
    read: Callable[[Any], Any]
    write: Callable[[Any, Any], Any]


def _value_read(message: Any) -> Any:
    match message.WhichOneof("kind"):
        case "struct_value":
            return {key: _value_read(value) for key, value in message.struct_value.fields.items()}
        case "list_value":
            return [_value_read(value) for value in message.list_value.values]
        case "number_value":
            # One kind of number, as in JavaScript: a whole one is whole again.
            number = message.number_value
            return int(number) if number.is_integer() else number
        case None | "null_value":
            return None
        case kind:
            return getattr(message, kind)


_PLAIN = {
    "Value": _Special(_value_read, json_format.ParseDict),
    "ListValue": _Special(lambda message: [_value_read(value) for value in message.values], json_format.ParseDict),
    "Struct": _Special(
        lambda message: {key: _value_read(value) for key, value in message.fields.items()}, json_format.ParseDict
    ),
    # Their JSON form is a text; ours is a number, as everywhere.
    "Int64Value": _Special(lambda message: message.value, json_format.ParseDict),
    "UInt64Value": _Special(lambda message: message.value, json_format.ParseDict),
}
_AS_JSON = (
    *("Any", "Duration", "FieldMask", "Timestamp"),
    *("BoolValue", "BytesValue", "DoubleValue", "FloatValue", "StringValue", "Int32Value", "UInt32Value"),
)


def _special(name: str, pool: Any) -> _Special | None:
    package, _, kind = name.rpartition(".")
    if package != "google.protobuf":
        return None
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind not in _AS_JSON:
        return None
    return _Special(
        partial(json_format.MessageToDict, descriptor_pool=pool), partial(json_format.ParseDict, descriptor_pool=pool)
    )


# Loading


@cache
def load(paths: tuple[str, ...], cache: str = "") -> Protos:
    """Load .proto files, given as files or as folders of them.

    What the compiler makes of them is kept in the folder `cache`, by their content. Raises
    ConfigurationError for a path that is not there, or what the compiler says of a file.
    """
    files = _files(paths)
    if not files:
        raise ConfigurationError(f"There is no .proto file in {', '.join(paths) or 'PROTO_PATH'}.")
    digest = hashlib.sha256()
    for file, root in files.items():
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    kept = Path(cache, f"{digest.hexdigest()[:32]}.binpb") if cache else None
    if kept is not None and kept.exists():
        try:
            return Protos(kept.read_bytes())
        except Exception:  # noqa: BLE001 - broken, or not for us to read: it is made anew
            logger.warning("what was kept of the .proto files cannot be used; they are compiled again")
    compiled = _compile(files)
    if kept is not None:
        try:
            _keep(kept, compiled)
        except OSError as error:  # a read-only folder costs time at each start, and nothing else
            logger.info("what was made of the .proto files is not kept: %s", error)
    return Protos(compiled)


def _files(paths: Iterable[str]) -> dict[Path, Path]:
    """Return each file, and the folder from which imports name it."""
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files |= dict.fromkeys(sorted(path.resolve().rglob("*.proto")), path.resolve())
        elif path.is_file():
            files.setdefault(path.resolve(), path.resolve().parent)
        else:
            raise ConfigurationError(f"There is no .proto file or folder {str(path)!r}.")
    return files


def _compile(files: dict[Path, Path]) -> bytes:
    try:
        import grpc_tools
    except ImportError as error:
        raise ConfigurationError("To read .proto files, install grpcio-tools: the extra `grpc`.") from error
    own = Path(str(grpc_tools.__file__)).parent / "_proto"  # google/protobuf/*.proto
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.binpb")
        # A process of its own: the compiler writes what is wrong to its standard error.
        command = [sys.executable, "-m", "grpc_tools.protoc", *(f"-I{root}" for root in dict.fromkeys(files.values()))]
        command += [f"-I{own}", "--include_imports", f"--descriptor_set_out={out}", *map(str, files)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT)  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise ConfigurationError("The .proto files could not be compiled in time.") from error
        if done.returncode:
            raise ConfigurationError(f"The .proto files cannot be read: {done.stderr.strip()}")
        return out.read_bytes()


def _keep(path: Path, content: bytes) -> None:
    # Written aside first: several processes of a fleet may start at once.
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    os.chmod(name, 0o644)  # others may run the same project
    os.replace(name, path)
