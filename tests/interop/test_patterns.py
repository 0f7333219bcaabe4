"""Whatever a pattern is made of, we make the same route of it as NestJS 11 and 12."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from microservices.packets import route, route_on_wire
from tests.interop.nest import HERE, VERSIONS

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
]

COUNT = 3000
SEED = int(os.environ.get("PATTERNS_SEED", "0")) or random.SystemRandom().getrandbits(32)
DEPTH = 7  # NestJS looks no deeper than 5
KEYS = 22  # nor at objects of more than 20 keys
LIMIT = 30
PRINTABLE = [chr(code) for code in range(32, 127)]
ODD = ['"', "\\", '\\"', "\n", "\r", "\t", "\0", "\x01", "\x1f", "\x7f", "\u2028", "é", "e\u0301", "😀", "/"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_random_pattern_has_the_route_that_nest_makes_of_it(version: str, node_modules: None) -> None:
    patterns = Patterns(random.Random(SEED))
    lines = [json.dumps(patterns.pattern(), ensure_ascii=False) for _ in range(COUNT)]

    theirs = [json.loads(line) for line in routes_of(version, lines)]

    assert len(theirs) == COUNT
    for line, nests in zip(lines, theirs, strict=True):
        pattern = json.loads(line)
        expected = nests if isinstance(nests, str) else None  # no handler can be found by true, false or null
        found = {"route": route(pattern)}
        if not isinstance(pattern, str):  # a text may be JSON itself
            found["on wire"] = route_on_wire(line.encode())
        assert found == dict.fromkeys(found, expected), f"{version}, PATTERNS_SEED={SEED}: {line}"


def routes_of(version: str, lines: list[str]) -> list[str]:
    """Ask NestJS."""
    done = subprocess.run(
        ["node", "--import", "./versions.js", "routes.js"],
        cwd=HERE,
        env={**os.environ, "NEST": version, "LC_ALL": "C"},  # some languages order even ASCII in their own way
        input="\n".join(lines),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n").split("\n")


class Patterns:
    """Makes patterns at random."""

    def __init__(self, source: random.Random) -> None:
        self._random = source

    def pattern(self) -> Any:
        """Return a pattern: mostly an object."""
        return self._one_of([self._object] * 6 + [self._list, self._text, self._number, self._constant])(DEPTH)

    def _one_of(self, makers: list[Callable[[int], Any]]) -> Callable[[int], Any]:
        return self._random.choice(makers)

    def _value(self, depth: int) -> Any:
        nested = [self._object] * 3 + [self._list] if depth else []
        return self._one_of([self._text] * 3 + [self._number] * 3 + [self._constant] + nested)(depth)

    def _size(self) -> int:
        return self._random.choice([*range(5), self._random.randint(0, KEYS), self._random.randint(KEYS - 3, KEYS)])

    def _object(self, depth: int) -> dict[str, Any]:
        keys: list[str] = []
        for _ in range(self._size() or 1):
            keys.append(self._key(keys))
        # Deep ones stay narrow, or they would not fit into memory.
        return {key: self._value(depth - 1) if depth and place < 3 else self._text(0) for place, key in enumerate(keys)}

    def _list(self, depth: int) -> list[Any]:
        return [self._value(depth - 1) if depth and place < 3 else place for place in range(self._size())]

    def _key(self, others: list[str]) -> str:
        key = "".join(self._random.choices(PRINTABLE, k=self._random.choice([0, 1, 1, 2, 3, 8])))
        if not others or self._random.random() < 0.3:
            return key
        near = self._random.choice(others)
        place = self._random.randint(0, len(near))
        return self._random.choice(
            [near.swapcase(), near.upper(), near[:place], near + key, near[:place] + near[place:].swapcase()]
        )

    def _text(self, _: int) -> str:
        parts = self._random.choices(PRINTABLE + ODD * 4, k=self._random.choice([0, 1, 2, 5, 20]))
        return self._random.choice(["".join(parts), "".join(parts), json.dumps("".join(parts)), "5.0", "null"])

    def _number(self, _: int) -> float:
        source = self._random
        [bits] = struct.unpack("d", source.randbytes(8))
        return source.choice(
            [
                source.randint(-20, 20),
                source.randint(-(2**64), 2**64),
                source.choice([1, -1]) * 10 ** source.choice([source.randint(0, 30), 400]) + source.randint(-1, 1),
                source.uniform(-1000, 1000),
                round(source.uniform(-1000, 1000), source.randint(0, 4)),
                source.choice([1.0, -1.0]) * 10.0 ** source.randint(-320, 308),
                bits if abs(bits) < float("inf") else -0.0,  # neither infinite nor no number
            ]
        )

    def _constant(self, _: int) -> bool | None:
        return self._random.choice([True, False, None])
