"""Counters."""

from microservices.instruments import Counter


def test_a_counter_counts_each_combination_of_labels_for_itself() -> None:
    counter = Counter("lost_total", "What was lost.", ("service", "reason"))

    counter.add("users", "full")
    counter.add("users", "full", amount=4)
    counter.add("users", "late")

    assert counter.value("users", "full") == 5
    assert counter.value("users", "late") == 1
    assert counter.samples() == {("users", "full"): 5, ("users", "late"): 1}


def test_asking_for_a_count_does_not_make_one() -> None:
    counter = Counter("lost_total", "What was lost.", ("service",))

    assert counter.value("unknown") == 0
    assert counter.samples() == {}


def test_samples_are_a_copy() -> None:
    counter = Counter("lost_total", "What was lost.", ("service",))
    counter.add("users")

    counter.samples()[("users",)] = 100

    assert counter.value("users") == 1
