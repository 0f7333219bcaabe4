"""Topics and filters of MQTT: what a service subscribes for its routes, and which route a message belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import zip_longest

from ..dispatcher import Route
from ..exceptions import ConfigurationError, RpcException
from .wildcards import Wildcards

REPLY = "/reply"
"""What the topic of a request is followed by in that of its answers."""

_SHARED = re.compile(r"\$share/[^/]*/")
_ODD_FILTER = re.compile(r"[^/][+#]|[+#][^/]|#/|\0|^$")


class Topics:
    """The routes of a service by topic, `$share/<group>/` being for the broker alone.

    Raises ConfigurationError for what no broker lets anybody subscribe.
    """

    def __init__(self, routes: Mapping[str, Route]) -> None:
        plain = {text: route for text, route in routes.items() if not is_shared(text)}
        shared = {_SHARED.sub("", text, count=1): route for text, route in routes.items() if is_shared(text)}
        self._routes = shared | plain
        for topic in self._routes:
            if _ODD_FILTER.search(topic):
                text = f"{topic!r} cannot be heard over MQTT: + must be a whole level of a topic, and # the last one."
                raise ConfigurationError(text)
        self._wildcards = Wildcards(self._routes, separator="/", one="+", rest="#")

    def __contains__(self, topic: str) -> bool:
        return topic in self._routes

    def find(self, topic: str) -> Route | None:
        """Return the route that a message leads to, if any."""
        return self._wildcards.find(topic)


def is_shared(filter: str) -> bool:
    """Return whether one of a group gets each message."""
    return _SHARED.match(filter) is not None


def filters(routes: Iterable[str], group: str) -> list[str]:
    """Return what brings the messages of all routes, each message once; to one of a group, where there is one."""
    shared: list[str] = []
    plain: list[str] = []
    for route in routes:
        (shared if is_shared(route) else plain).append(route)
    # Most brokers send a message once for each filter that it matches, and each would run its handler.
    wide = [route for route in plain if "+" in route or route.endswith("#")]
    needed = [route for route in plain if not any(route != each and _covers(each, route) for each in wide)]
    return [f"$share/{group}/{route}" if group else route for route in needed] + shared


def _covers(wide: str, narrow: str) -> bool:
    if narrow.startswith("$") and wide[0] in "+#":
        return False
    for theirs, ours in zip_longest(wide.split("/"), narrow.split("/")):
        if theirs == "#":
            return True
        if ours in (None, "#") or theirs not in ("+", ours):
            return False
    return True


@lru_cache(maxsize=4096)
def encode_topic(topic: str) -> bytes:
    """Return the bytes of a topic. Raises RpcException where it is none: the broker would end the connection."""
    try:
        body = topic.encode()
    except UnicodeEncodeError:
        body = b""
    if not body or len(body) + len(REPLY) > 65535 or any(each in topic for each in "\0+#"):
        text = f"{topic[:100]!r} cannot be a topic of MQTT: it must have a name, without + and #."
        raise RpcException({"statusCode": 400, "code": "bad-topic", "message": text})
    return body
