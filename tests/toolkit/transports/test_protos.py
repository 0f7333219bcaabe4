"""Messages as plain objects: every kind of field, and what is told of files and values that are wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microservices.exceptions import ConfigurationError, InvalidPayload
from microservices.transports import protos
from microservices.transports.protos import Method, Protos

KINDS = """
syntax = "proto3";
package kinds;
import "google/protobuf/any.proto";
import "google/protobuf/struct.proto";
import "google/protobuf/timestamp.proto";
import "google/protobuf/wrappers.proto";
service Kinds { rpc Echo (All) returns (All) {} }
enum Colour { RED = 0; DARK_GREEN = 1; }
message Part { int64 number = 1; repeated Part parts = 2; }
message All {
  string text = 1;
  int64 long = 2;
  uint64 unsigned = 3;
  double real = 4;
  bool flag = 5;
  bytes raw = 6;
  Colour colour = 7;
  Part part = 8;
  repeated string texts = 9;
  repeated Part parts = 10;
  repeated Colour colours = 11;
  map<string, Part> named = 12;
  map<int32, string> numbered = 13;
  map<bool, int64> flagged = 14;
  optional string maybe = 15;
  oneof choice { string one = 16; int32 other = 17; }
  google.protobuf.Timestamp at = 18;
  google.protobuf.Value any = 19;
  google.protobuf.Struct object = 20;
  google.protobuf.Int64Value wrapped = 21;
  google.protobuf.ListValue list = 22;
  string snake_case = 23;
  google.protobuf.Any packed = 24;
}
"""
DEFAULTS = {
    "text": "",
    "long": 0,
    "unsigned": 0,
    "real": 0.0,
    "flag": False,
    "raw": b"",
    "colour": "RED",
    "texts": [],
    "parts": [],
    "colours": [],
    "named": {},
    "numbered": {},
    "flagged": {},
    "snake_case": "",
}
ABSENT = ("part", "maybe", "one", "other", "at", "any", "object", "wrapped", "list", "packed")


def write(folder: Path, name: str, text: str) -> Protos:
    """Write a .proto file and load it."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    protos.load.cache_clear()
    return protos.load((str(folder),))


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Method:
    return write(tmp_path_factory.mktemp("protos"), "kinds.proto", KINDS).method("Kinds/Echo")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", "é😀\0"),
        ("long", -(2**63)),
        ("unsigned", 2**64 - 1),
        ("real", 1.5),
        ("flag", True),
        ("raw", b"\xff\x00"),
        ("colour", "DARK_GREEN"),
        ("colour", 7),
        ("part", {"number": 1, "parts": [{"number": 2, "parts": []}]}),
        ("texts", ["a", ""]),
        ("parts", [{"number": 1, "parts": []}, {"number": 0, "parts": []}]),
        ("colours", ["RED", "DARK_GREEN"]),
        ("named", {"x": {"number": 1, "parts": []}}),
        ("numbered", {"-1": "minus"}),
        ("flagged", {"true": 1, "false": 2}),
        ("maybe", ""),
        ("one", "x"),
        ("other", 0),
        ("at", "2026-01-02T03:04:05.600Z"),
        ("any", {"a": [1, 2.5, None, True, "x"]}),
        ("any", 2**53),
        ("object", {"a": {"b": []}}),
        ("wrapped", 2**60),
        ("list", [1, "two"]),
    ],
)
def test_a_value_of_each_kind_comes_back_as_it_went(echo: Method, field: str, value: Any) -> None:
    back = echo.request.decode(echo.request.encode({field: value}, strict=True))

    assert back == {**DEFAULTS, field: value}
    assert type(back[field]) is type(value)


def test_what_was_not_sent_has_its_default_or_is_missing_or_none(echo: Method) -> None:
    assert echo.request.decode(b"") == DEFAULTS
    assert echo.request.decode(b"", nulls=True) == {**DEFAULTS, **dict.fromkeys(ABSENT)}


def test_none_is_as_if_it_were_not_there(echo: Method) -> None:
    assert echo.request.encode({"text": None, "maybe": None, "part": None}) == b""
    assert echo.request.encode(None) == b""


def test_a_field_may_be_spelt_as_in_javascript(echo: Method) -> None:
    assert echo.request.decode(echo.request.encode({"snakeCase": "x"}, strict=True))["snake_case"] == "x"


def test_bytes_may_come_as_base64(echo: Method) -> None:
    assert echo.request.decode(echo.request.encode({"raw": "/wA="}))["raw"] == b"\xff\x00"


@pytest.mark.parametrize(
    ("value", "pointer", "complaint"),
    [
        ({"text": 5}, "/text", "int does not fit"),
        ({"long": "5"}, "/long", "str does not fit"),
        ({"long": 2**63}, "/long", "range"),
        ({"part": {"number": "x"}}, "/part/number", "str does not fit"),
        ({"part": 5}, "/part", "is an object, not int"),
        ({"parts": [{}, {"number": "x"}]}, "/parts/1/number", "str does not fit"),
        ({"parts": {"number": 1}}, "/parts", "a list is expected"),
        ({"colour": "BLUE"}, "/colour", "none of RED, DARK_GREEN"),
        ({"at": "yesterday"}, "/at", "parse timestamp"),
        ({"raw": "not base64!"}, "/raw", "base64"),
        ({"numbered": {"x": "y"}}, "/numbered", "invalid literal"),
        ({"nothing": 1}, "/nothing", "has no field 'nothing'"),
        ({"part": {"nothing": 1}}, "/part/nothing", "has no field 'nothing'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(echo: Method, value: Any, pointer: str, complaint: str) -> None:
    with pytest.raises(InvalidPayload, match=complaint) as caught:
        echo.request.encode(value, strict=True)

    assert caught.value.errors[0]["pointer"] == pointer


def test_an_answer_may_hold_more_than_its_message(echo: Method) -> None:
    assert echo.response.encode({"text": "x", "role": "admin"}) == echo.response.encode({"text": "x"})


def test_bytes_that_are_no_message_are_refused(echo: Method) -> None:
    with pytest.raises(InvalidPayload, match=r"no kinds\.All"):
        echo.request.decode(b"\x0a\xff")


def test_packages_may_be_nested_and_files_import_one_another(tmp_path: Path) -> None:
    part = 'syntax = "proto3";\npackage shop.parts.v1;\nmessage Part { int32 n = 1; }\n'
    write(tmp_path, "parts/part.proto", part)
    files = write(
        tmp_path,
        "shop.proto",
        'syntax = "proto3";\npackage shop.orders.v1;\nimport "parts/part.proto";\n'
        "service Orders { rpc Get (shop.parts.v1.Part) returns (stream shop.parts.v1.Part) {} }\n",
    )

    for name in ("Orders/Get", "v1.Orders/Get", "/shop.orders.v1.Orders/Get"):
        method = files.method(name)
        assert (method.path, method.server_streaming) == ("/shop.orders.v1.Orders/Get", True)


def test_a_service_name_that_two_packages_have_needs_its_package(tmp_path: Path) -> None:
    text = 'syntax = "proto3";\npackage {0};\nmessage M {{}}\nservice Users {{ rpc Get (M) returns (M) {{}} }}\n'
    write(tmp_path, "v1.proto", text.format("v1"))
    files = write(tmp_path, "v2.proto", text.format("v2"))

    with pytest.raises(ConfigurationError, match=r"several have it among v1\.Users, v2\.Users"):
        files.method("Users/Get")
    assert files.method("v2.Users/Get").path == "/v2.Users/Get"


def test_a_file_that_the_compiler_refuses_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"broken\.proto:2:"):
        write(tmp_path, "broken.proto", 'syntax = "proto3";\nmessage {}\n')


@pytest.mark.parametrize(
    ("path", "complaint"), [("nowhere", "There is no .proto file or folder"), ("", "no .proto file")]
)
def test_a_path_without_files_is_refused(tmp_path: Path, path: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        protos.load((str(tmp_path / path),))


def test_what_was_compiled_is_kept_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tmp_path / "protos", tmp_path / "cache"
    folder.mkdir()
    (folder / "a.proto").write_text('syntax = "proto3";\nmessage M {}\n', encoding="utf-8")
    protos.load((str(folder),), str(cache))
    kept = list(cache.iterdir())
    protos.load.cache_clear()
    monkeypatch.setattr(protos, "_compile", None)  # it is not asked again

    protos.load((str(folder),), str(cache))

    assert [path.suffix for path in kept] == [".binpb"]
    assert list(cache.iterdir()) == kept


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("at", b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),  # a time after the year 9999
        ("packed", b"\x0a\x0atype/no.No"),  # of a type that nobody knows
    ],
)
def test_what_the_wire_allows_and_json_does_not_is_refused(echo: Method, field: str, body: bytes) -> None:
    number = {"at": 18, "packed": 24}[field]
    tag = bytes([(number << 3 | 2) & 0x7F | 0x80, (number << 3 | 2) >> 7])

    with pytest.raises(InvalidPayload, match=r"no kinds\.All"):
        echo.request.decode(tag + bytes([len(body)]) + body)


DEEP = """
syntax = "proto3";
package deep;
import "google/protobuf/any.proto";
import "google/protobuf/struct.proto";
service Deep { rpc Echo (Tree) returns (Tree) {} }
message Tree { Tree tree = 1; google.protobuf.Any any = 2; google.protobuf.Value value = 3; }
"""


def part(number: int, body: bytes) -> bytes:
    """Return a field that holds a message."""
    size, length = len(body), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + body


WRAPPERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "a message in itself": (lambda inner: part(1, inner), lambda whole: whole),
    "an Any in an Any": (
        lambda inner: part(1, b"x/google.protobuf.Any") + part(2, inner),
        lambda whole: part(2, whole),
    ),
    "a list in a list": (lambda inner: part(6, part(1, inner)), lambda whole: part(3, whole)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_messages_nested_without_end_are_refused(tmp_path: Path, wrapper: str) -> None:
    (tmp_path / "deep.proto").write_text(DEEP, encoding="utf-8")
    method = protos.load((str(tmp_path),)).method("Deep/Echo")
    wrap, whole = WRAPPERS[wrapper]

    def nested(depth: int) -> bytes:
        body = b""
        for _ in range(depth):
            body = wrap(body)
        return whole(body)

    assert method.request.decode(nested(20))
    for depth in (500, 3000):
        with pytest.raises(InvalidPayload, match=r"no deep\.Tree"):
            method.request.decode(nested(depth))


def test_an_any_may_hold_a_type_of_these_files(echo: Method) -> None:
    value = {"@type": "type.googleapis.com/kinds.Part", "number": "7"}

    assert echo.request.decode(echo.request.encode({"packed": value}))["packed"] == value


@pytest.mark.parametrize(
    ("value", "pointer"),
    [
        ({"named": {"k": {"number": "x"}}}, "/named/k/number"),
        ({"named": []}, "/named"),
        ({"flagged": {"yes": 1}}, "/flagged"),
        ({"colour": 1.9}, "/colour"),
        ({"real": 10**400}, "/real"),
        ({"packed": {"@type": 5}}, "/packed"),
    ],
)
def test_the_place_of_a_mistake_is_told(echo: Method, value: Any, pointer: str) -> None:
    with pytest.raises(InvalidPayload) as caught:
        echo.request.encode(value)

    assert caught.value.errors[0]["pointer"] == pointer


def test_null_is_a_value_where_any_value_is(echo: Method) -> None:
    assert "any" in echo.request.decode(echo.request.encode({"any": None}))


def test_of_two_names_for_a_number_the_first_is_told(tmp_path: Path) -> None:
    text = (
        'syntax = "proto3";\nenum E { option allow_alias = true; A = 0; NEW = 1; OLD = 1; }\n'
        "message M { E e = 1; }\nservice S { rpc Get (M) returns (M) {} }\n"
    )
    shape = write(tmp_path, "alias.proto", text).method("S/Get").request

    assert shape.decode(shape.encode({"e": "OLD"})) == {"e": "NEW"}


@pytest.mark.parametrize("content", [b"", b"\xff\xff"], ids=["empty", "broken"])
def test_what_was_kept_and_is_broken_is_made_anew(tmp_path: Path, content: bytes) -> None:
    folder, cache = tmp_path / "protos", tmp_path / "cache"
    folder.mkdir()
    (folder / "a.proto").write_text('syntax = "proto3";\nmessage M {}\nservice S {}\n', encoding="utf-8")
    protos.load((str(folder),), str(cache))
    [kept] = cache.iterdir()
    kept.write_bytes(content)
    protos.load.cache_clear()

    assert list(protos.load((str(folder),), str(cache)).services) == ["S"]
    assert kept.read_bytes() not in (b"", b"\xff\xff")


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "a.proto").write_text('syntax = "proto3";\nservice S {}\n', encoding="utf-8")
    (tmp_path / "file").touch()

    assert list(protos.load((str(tmp_path),), str(tmp_path / "file" / "cache")).services) == ["S"]
