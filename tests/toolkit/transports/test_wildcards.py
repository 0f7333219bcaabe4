"""Which route a topic leads to: exactly its own, else the first pattern that matches."""

import pytest

from microservices.dispatcher import Route
from microservices.transports.wildcards import Wildcards


def found(topic: str, *patterns: str, separator: str = "/", one: str = "+", rest: str = "#") -> str | None:
    """Return the pattern that a topic leads to."""
    routes = {pattern: Route(pattern, None, ()) for pattern in patterns}
    route = Wildcards(routes, separator=separator, one=one, rest=rest).find(topic)
    return None if route is None else route.name


@pytest.mark.parametrize(
    ("topic", "pattern", "matches"),
    [
        ("users/created", "users/+", True),
        ("users/created/now", "users/+", False),
        ("users", "users/+", False),
        ("users/", "users/+", False),
        ("users/1/created", "users/+/created", True),
        ("users/1/2/created", "users/+/created", False),
        ("users/a/b/c", "users/#", True),
        ("users", "users/#", True),
        ("usersandmore", "users/#", False),
        ("anything/at/all", "#", True),
        ("a#/b", "a#/b", True),
        ("ax/b", "a#/b", False),
        ("a+/b", "a+/b", True),
        ("x/y", "#/y", False),
        ("line\nbreak/x", "+/x", True),
        ("(a/b", "(a/+", True),
    ],
)
def test_a_topic_of_mqtt_matches_as_in_nestjs(topic: str, pattern: str, matches: bool) -> None:
    assert (found(topic, pattern) == pattern) is matches


@pytest.mark.parametrize(
    ("topic", "pattern", "matches"),
    [
        ("order.created", "order.*", True),
        ("order.created.now", "order.*", False),
        ("order", "order.#", True),
        ("order.a.b", "order.#", True),
        ("orderly", "order.#", False),
        ("order.x.created", "order.*.created", True),
        ("orderXcreated", "order.created", False),
    ],
)
def test_a_routing_key_of_amqp_matches_as_in_nestjs(topic: str, pattern: str, matches: bool) -> None:
    assert (found(topic, pattern, separator=".", one="*") == pattern) is matches


def test_the_very_name_comes_first_and_then_the_order_of_declaration() -> None:
    assert found("a/b", "#", "a/+", "a/b") == "a/b"
    assert found("a/c", "#", "a/+", "a/b") == "#"
    assert found("a/c", "a/+", "#") == "a/+"


def test_what_is_remembered_of_topics_is_bounded() -> None:
    wildcards = Wildcards({"#": Route("#", None, ())}, separator="/", one="+", rest="#")

    for number in range(5000):
        assert wildcards.find(f"topic/{number}") is not None

    assert len(wildcards._known) == 4096
