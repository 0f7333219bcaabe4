"""Counters."""

from microservices.instruments import Counter, Histogram, histograms


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


def test_a_histogram_counts_by_buckets_and_labels() -> None:
    histogram = Histogram("seconds", "How long.", ("service",), buckets=(0.1, 1))
    for value in (0.05, 0.1, 0.5, 7):
        histogram.observe(value, "users")
    histogram.observe(0.5, "orders")

    assert histogram.samples() == {("users",): ([2, 1, 1], 7.65), ("orders",): ([0, 1, 0], 0.5)}
    histograms.remove(histogram)
