"""Writes docs/nestjs-compatibility.md from what a whole run of these tests has shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.interop.nest import HERE, VERSIONS

PAGE = Path(__file__).parents[2] / "docs" / "nestjs-compatibility.md"
NAMES = {
    "tcp": "TCP",
    "redis": "Redis",
    "nats": "NATS",
    "mqtt": "MQTT",
    "amqp": "RabbitMQ",
    "kafka": "Kafka",
    "grpc": "gRPC",
}
DIRECTIONS = {"TestNestCallsUs": "calls us", "TestWeCallNest": "called by us"}


class Place(NamedTuple):
    """A cell of the table."""

    scheme: str
    case: str
    version: str
    direction: str


class Table:
    """What is known of each cell: whether its tests passed, or why it does not apply."""

    def __init__(self) -> None:
        self._passed: dict[Place, list[bool]] = {}
        self._skipped: dict[Place, str] = {}
        self._files: set[Path] = set()

    def note(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Take the outcome of a test that is marked with its case."""
        places = list(_places(item))
        if places:
            self._files.add(item.path)
        if report.when == "call" and report.outcome != "skipped":
            for place in places:
                self._passed.setdefault(place, []).append(report.passed)
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            for place in places:
                self._skipped[place] = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.failed:
            for place in places:
                self._passed.setdefault(place, []).append(False)

    def write(self) -> None:
        """Write the page, if all transports and versions were in the run, and all files that know of them."""
        places = [*self._passed, *self._skipped]
        if {place.scheme for place in places} != set(NAMES) or {place.version for place in places} != set(VERSIONS):
            return
        if self._files != {path for path in HERE.glob("test_*.py") if "mark.case(" in path.read_text(encoding="utf-8")}:
            return
        text = self._text()
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            PAGE.write_text(text, encoding="utf-8")

    def _text(self) -> str:
        versions = [(HERE / version / "package.json").read_text() for version in VERSIONS]
        numbers = [re.search(r'"@nestjs/microservices": "([^"]+)"', text)[1] for text in versions]
        lines = [
            "# Compatibility with NestJS",
            "",
            "Written by the tests in `tests/interop`, which run real NestJS services in Node against real brokers:",
            f"`@nestjs/microservices` {' and '.join(numbers)}. *Calls us* is NestJS's client with our server,",
            "*called by us* our client with NestJS's server. A number is a note below the table.",
        ]
        for scheme, name in NAMES.items():
            lines += ["", f"## {name}", "", *self._table(scheme)]
        return "\n".join(lines) + "\n"

    def _table(self, scheme: str) -> Iterable[str]:
        columns = [(version, direction) for version in VERSIONS for direction in DIRECTIONS.values()]
        yield f"| | {' | '.join(f'{_title(version)} {direction}' for version, direction in columns)} |"
        yield f"|---|{'---|' * len(columns)}"
        notes: list[str] = []
        cases = dict.fromkeys(place.case for place in [*self._passed, *self._skipped] if place.scheme == scheme)
        for case in cases:
            cells = [self._cell(Place(scheme, case, *column), notes) for column in columns]
            yield f"| {case} | {' | '.join(cells)} |"
        if notes:
            yield ""
            yield from (f"{number}. {note[0].upper()}{note[1:]}." for number, note in enumerate(notes, 1))

    def _cell(self, place: Place, notes: list[str]) -> str:
        passed = self._passed.get(place)
        why = self._skipped.get(place)
        if passed is None and why is None:
            return ""
        mark = "" if passed is None else "yes" if all(passed) else "**no**"
        if why is None:
            return mark
        if why not in notes:
            notes.append(why)
        return f"{mark} {notes.index(why) + 1}".strip() if mark else f"- {notes.index(why) + 1}"


def _places(item: pytest.Item) -> Iterable[Place]:
    marker = item.get_closest_marker("case")
    link = item.callspec.params.get("link") if hasattr(item, "callspec") else None
    direction = DIRECTIONS.get(item.cls.__name__ if item.cls is not None else "")
    if marker is None or link is None:
        return
    for of_case in [direction] if direction else DIRECTIONS.values():
        yield Place(link.scheme, marker.args[0], link.version, of_case)


def _title(version: str) -> str:
    return version.replace("nest", "NestJS ")
