"""Two servers that share their work: what each was asked, and what they have heard."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from microservices import message_pattern
from tests.interop.ours import OurServer

GROUP = "shared"
ALIKE = "a group shares requests and events"
COUNT = 20  # of requests and of events: that one of two takes all of them happens once in half a million
WAIT = 10


class Group:
    """Two servers of one group, called "a" and "b": what ours were asked and have heard."""

    def __init__(self) -> None:
        self.ours: list[OurServer] = []
        self.asked: Counter[str] = Counter()

    def handlers(self, name: str) -> tuple[Callable[..., Any], ...]:
        """Return what a server of ours needs beside the others: it tells its name."""

        @message_pattern("who")
        async def who() -> str:
            self.asked[name] += 1
            return name

        @message_pattern("notes")
        async def notes() -> list[Any]:
            return []  # a NestJS of the group may know more

        return who, notes

    async def heard(self, ask_for_notes: Callable[[], Awaitable[Any]]) -> list[int]:
        """Return the numbers of the events that either has heard, as soon as there are enough."""
        by_ours: list[int] = []
        by_nests: dict[int, list[int]] = {}  # by the first: a server does not tell which it is
        async with asyncio.timeout(WAIT):
            while len(by_ours) + sum(map(len, by_nests.values())) < COUNT:
                for server in self.ours:
                    while not server.heard.empty():
                        by_ours.append(server.heard.get_nowait().data["n"])
                notes = [note["n"] for note in await ask_for_notes()]
                if notes:
                    by_nests[notes[0]] = notes
        return sorted(sum(by_nests.values(), by_ours))

    def once(self, answers: list[str], heard: list[int]) -> bool:
        """Return whether each request and each event went to one of them."""
        counted = Counter(answers)
        run_once = all(times == counted[name] for name, times in self.asked.items())
        return counted.total() == COUNT and run_once and heard == list(range(COUNT))

    def shared(self, answers: list[str], heard: list[int]) -> bool:
        """Return whether, beside that, both took part."""
        return self.once(answers, heard) and set(answers) == {"a", "b"}
