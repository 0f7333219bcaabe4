"""Which route a concrete topic belongs to, where a broker's subscriptions may be patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..dispatcher import Route

_MOST_KNOWN = 4096


class Wildcards:
    """Finds the route of a topic: the one of its very name, else the first pattern that it matches.

    A topic is made of words with `separator` between them. In a pattern `one` stands for any one word, and
    `rest`, as the last word, for any number of them: none as well, so that `order` matches `order.#`
    (nest-wire.md sections 10 and 11).
    """

    def __init__(self, routes: Mapping[str, Route], *, separator: str, one: str, rest: str) -> None:
        self._routes = routes
        self._separator, self._one, self._rest = separator, one, rest
        wild = [text for text in routes if self.wild(text)]
        self._patterns = [(re.compile(self._regex(text), re.DOTALL), routes[text]) for text in wild]
        # Bounded: the peer chooses the topic.
        self._known: dict[str, Route | None] = {}

    def wild(self, text: str) -> bool:
        """Return whether a route is a pattern."""
        words = text.split(self._separator)
        return self._one in words or words[-1] == self._rest

    def find(self, topic: str) -> Route | None:
        """Return the route that a message on `topic` leads to, if any."""
        route = self._routes.get(topic)
        if route is not None or not self._patterns:
            return route
        if topic in self._known:
            return self._known[topic]
        route = next((route for pattern, route in self._patterns if pattern.fullmatch(topic)), None)
        if len(self._known) < _MOST_KNOWN:
            self._known[topic] = route
        return route

    def _regex(self, text: str) -> str:
        separator = re.escape(self._separator)
        words = text.split(self._separator)
        last = len(words) - 1
        regex = ""
        for place, word in enumerate(words):
            if word == self._rest and place == last:
                return f"{regex}.*" if not place else f"{regex}(?:{separator}.*)?"
            regex += separator if place else ""
            regex += f"[^{separator}]+" if word == self._one else re.escape(word)
        return regex
