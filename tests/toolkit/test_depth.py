"""How deep JSON is nested, told without reading it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from microservices import codec
from microservices.depth import MOST, SHALLOW, is_beyond, is_unbounded
from microservices.exceptions import InvalidPayload


class Leaf(msgspec.Struct):
    """Nothing in it nests."""

    name: str
    sizes: list[int]


class Branch(msgspec.Struct):
    """Leaves, to a depth that the type says."""

    leaves: list[Leaf]
    first: Leaf | None = None
    named: dict[str, Leaf] = {}


class Tree(msgspec.Struct):
    """A branch that holds branches like itself."""

    trees: list[Tree] = []


class Bag(msgspec.Struct):
    """A branch that holds anything."""

    content: dict[str, Any]


class Fixed(TypedDict):
    """A dict whose values are known."""

    leaf: Leaf


@dataclass
class Loose:
    """A dataclass with a place for anything."""

    leaf: Leaf
    more: object = None


@pytest.mark.parametrize(
    ("annotation", "unbounded"),
    [
        (int, False),
        (str | None, False),
        (list[list[int]], False),
        (dict[str, list[float]], False),
        (Leaf, False),
        (Branch, False),
        (Fixed, False),
        (tuple[Leaf, Branch], False),
        (Any, True),
        (object, True),
        (dict, True),
        (list, True),
        (list[Any], True),
        (Raw, True),
        (Tree, True),
        (Bag, True),
        (Loose, True),
        (list[Bag] | None, True),
    ],
)
def test_a_type_says_whether_its_depth_is_bounded(annotation: Any, unbounded: bool) -> None:
    assert is_unbounded(annotation) is unbounded


def measured(value: Any) -> int:
    """Return the depth of a value by walking it."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(measured, value), default=0) if isinstance(value, list) else 0


def nested(depth: int, kernel: Any = 0) -> Any:
    """Return a value in so many lists and objects, one in the other."""
    for level in range(depth):
        kernel = [kernel] if level % 2 else {"a": kernel}
    return kernel


AWKWARD = ["[" * 200, "{" * 200, "]" * 200, '"[', "\\[", '\\"[', "\\\\", '\\\\"', "\n]"]


@pytest.mark.parametrize("text", ["", *AWKWARD])
@pytest.mark.parametrize(("depth", "beyond"), [(MOST, False), (MOST + 1, True), (5 * MOST, True)])
def test_the_border_is_exact_whatever_texts_stand_in_it(depth: int, beyond: bool, text: str) -> None:
    value = nested(depth, kernel=text)

    assert is_beyond(json.dumps(value).encode()) is beyond
    assert is_beyond(json.dumps({text: value[0] if isinstance(value, list) else value["a"]}).encode()) is beyond


@given(st.data())
def test_it_tells_what_a_walk_would_find(data: st.DataObject) -> None:
    texts = st.sampled_from(AWKWARD) | st.text(max_size=5)
    flat = st.none() | st.integers() | texts
    wide = st.recursive(flat, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
    around = data.draw(st.integers(MOST - 8, MOST + 8))
    value = [data.draw(wide), nested(around, data.draw(wide)), data.draw(wide)]

    assert is_beyond(json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode()) is (measured(value) > MOST)


@given(st.binary(max_size=400) | st.lists(st.sampled_from([b"[", b"]", b'"', b"\\", b"{"]), min_size=130).map(b"".join))
def test_any_bytes_are_borne(raw: bytes) -> None:
    assert is_beyond(raw) in (True, False)


def test_what_is_short_is_shallow() -> None:
    assert not is_beyond(b"[" * MOST + b"]" * MOST)
    assert len(b"[" * (MOST + 1) + b"]" * (MOST + 1)) > SHALLOW


@pytest.mark.parametrize(
    "piece",
    [b"[", b"[[],", b"[[[]],", b'["[', b"[]" * 8 + b",", b"[" * 60 + b"]" * 60 + b",", b'"\\\\', b"\\"],
    ids=lambda piece: piece[:12].decode(),
)
def test_it_takes_time_linear_in_the_length_of_anything(piece: bytes) -> None:
    def took(size: int) -> float:
        raw = piece * (size // len(piece))
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            is_beyond(raw)
            best = min(best, time.perf_counter() - began)
        return best

    assert took(400_000) < 40 * took(40_000) + 0.01  # quadratic, it would be a hundred times


# What is done with it


@pytest.mark.parametrize("annotation", [Any, list[Any], list, Tree | list[Any]])
def test_a_payload_that_may_hold_anything_holds_it_to_a_bounded_depth(annotation: Any) -> None:
    decode = codec.decoder(annotation)

    assert decode(Raw(b"[" * MOST + b"]" * MOST)) is not None
    with pytest.raises(InvalidPayload, match="nested deeper than 64 levels") as caught:
        decode(Raw(b"[" * (MOST + 1) + b"]" * (MOST + 1)))
    assert caught.value.status_code == 400


def test_a_payload_of_a_bounded_type_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microservices.depth.is_beyond", lambda raw: True)
    leaf = msgspec.json.encode(Leaf("x" * 500, []))

    assert codec.decoder(Leaf)(Raw(leaf)) == Leaf("x" * 500, [])
    with pytest.raises(InvalidPayload, match="deeper"):
        codec.decoder(Any)(Raw(leaf))
