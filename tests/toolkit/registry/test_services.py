"""What reports, silence and probes make of the list of the fleet."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from pytest_django import DjangoAssertNumQueries

from microservices.discovery.registry import PatternReport, Report
from microservices.registry import services
from microservices.registry.models import Instance, JournalEntry, Pattern, Service, State
from microservices.registry.services import instance_probed, instance_reported, instances_swept, journal_trimmed
from tests.toolkit.registry.conftest import Clock, known, reported

pytestmark = pytest.mark.django_db(databases=["default"])

LONG_AGO = datetime.datetime(2029, 1, 1, tzinfo=datetime.UTC)
GET_USER = PatternReport("get_user", "request", "safe", 5.0)
USER_CREATED = PatternReport("user_created", "event")


def journal() -> list[tuple[str, str, str]]:
    """Return what the journal tells, the oldest first."""
    return list(JournalEntry.objects.order_by("pk").values_list("kind", "service", "text"))


def sweep(clock: Clock, since: datetime.datetime = LONG_AGO) -> list[Instance]:
    return instances_swept(now=clock.now, listening_since=since)


# Reports


def test_the_first_report_makes_service_instance_patterns_and_a_line_in_the_journal(clock: Clock) -> None:
    addresses = {"tcp": "tcp://box:3001", "health": "http://box:9001"}

    instance = known(zone="a", addresses=addresses, patterns=(GET_USER, USER_CREATED), started_at=1_900_000_000.5)

    assert (instance.service.name, instance.service.first_seen) == ("users", clock.now)
    assert (instance.name, instance.state, instance.since, instance.last_heartbeat) == ("a", "up", clock.now, clock.now)
    assert (instance.version, instance.host, instance.pid, instance.zone) == ("1.0.0", "box", 42, "a")
    assert instance.addresses == addresses
    assert instance.started_at.timestamp() == 1_900_000_000.5
    assert list(Pattern.objects.values_list("name", "kind", "retry", "deadline")) == [
        ("get_user", "request", "safe", 5.0),
        ("user_created", "event", "never", None),
    ]
    assert journal() == [("up", "users", "first report")]


def test_a_beat_without_news_is_one_update_stamped_by_this_sides_clock(
    clock: Clock, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    known(patterns=(GET_USER,))
    clock.ticks(5)
    beat = Report("users", "a", start="start-1", sequence=2, pid=42, host="box", version="1.0.0", patterns=(GET_USER,))

    with django_assert_num_queries(1) as queries:
        instance_reported(report=beat)

    instance = Instance.objects.get()
    assert queries.captured_queries[0]["sql"].startswith("UPDATE")
    assert (instance.sequence, instance.last_heartbeat) == (2, clock.now)
    assert instance.since == clock.now - datetime.timedelta(seconds=5)
    assert len(journal()) == 1


@pytest.mark.parametrize("sequence", [2, 1])
def test_a_report_that_comes_late_changes_nothing(clock: Clock, sequence: int) -> None:
    before = known(sequence=2)
    clock.ticks(5)

    after = known(sequence=sequence, state="degraded", version="0.9.0")

    assert (after.state, after.version, after.last_heartbeat) == ("up", "1.0.0", before.last_heartbeat)
    assert len(journal()) == 1


def test_a_late_report_that_says_the_same_is_no_beat(clock: Clock) -> None:
    before = known(sequence=2)
    clock.ticks(5)

    after = known(sequence=1)

    assert (after.sequence, after.last_heartbeat) == (2, before.last_heartbeat)


def test_a_report_of_another_start_counts_from_the_beginning(clock: Clock) -> None:
    known(sequence=100)
    clock.ticks(5)

    instance = known(start="start-2", sequence=1, version="1.1.0", pid=43)

    assert (instance.start, instance.sequence, instance.version, instance.pid) == ("start-2", 1, "1.1.0", 43)
    assert instance.since == clock.now
    assert journal()[1:] == [("up", "users", "started again")]


def test_the_farewell_of_a_process_does_not_end_the_one_that_has_its_name_now(clock: Clock) -> None:
    known(sequence=100)
    known(start="start-2", sequence=1)

    instance = known(start="start-1", sequence=101, state="down")

    assert (instance.state, instance.start) == ("up", "start-2")


def test_news_are_kept_and_only_a_change_of_state_is_told(clock: Clock) -> None:
    first = known()
    clock.ticks(5)

    moved = known(sequence=2, zone="b")
    degraded = known(sequence=3, zone="b", state="degraded", reason="redis is away")

    assert (moved.zone, moved.since) == ("b", first.since)
    assert (degraded.state, degraded.reason, degraded.since) == ("degraded", "redis is away", clock.now)
    assert journal()[1:] == [("degraded", "users", "redis is away")]


def test_who_says_that_it_ends_is_draining_and_then_down_at_once(clock: Clock) -> None:
    known()

    draining = known(sequence=2, state="draining")
    down = known(sequence=3, state="down")

    assert draining.state == "draining"
    assert (down.state, down.reason) == ("down", "stopped")
    assert [kind for kind, *_ in journal()] == ["up", "draining", "down"]


def test_the_farewell_of_somebody_unknown_is_no_news(clock: Clock) -> None:
    assert reported(state="down") is None

    assert (Service.objects.count(), journal()) == (0, [])


def test_a_beat_brings_back_who_was_given_up(clock: Clock) -> None:
    known()
    Instance.objects.update(state=State.DOWN, reason="no beat")

    instance = known(sequence=2)

    assert (instance.state, instance.reason) == ("up", "")
    assert journal()[-1][0] == "up"


def test_patterns_are_replaced_by_a_report_with_others(clock: Clock) -> None:
    known(patterns=(GET_USER, USER_CREATED))

    known(sequence=2, patterns=(PatternReport("get_user", "request", "never"), PatternReport("x", "event")))

    assert list(Pattern.objects.values_list("name", "retry")) == [("get_user", "never"), ("x", "never")]


def test_a_pattern_that_is_named_twice_is_kept_once(clock: Clock) -> None:
    known(patterns=(GET_USER, GET_USER))

    assert Pattern.objects.count() == 1


def test_the_last_words_of_a_service_take_no_patterns_away(clock: Clock) -> None:
    known(patterns=(GET_USER,))

    known(sequence=2, state="down")

    assert Pattern.objects.count() == 1


# Silence


@pytest.mark.parametrize(("seconds", "state"), [(7.9, "up"), (8, "suspect")])
def test_who_is_silent_for_eight_seconds_is_suspected(clock: Clock, seconds: float, state: str) -> None:
    known()
    clock.ticks(seconds)

    suspects = sweep(clock)

    assert Instance.objects.get().state == state
    assert [instance.name for instance in suspects] == (["a"] if state == "suspect" else [])


def suspected(clock: Clock, *, after: float, passed: bool | None) -> None:
    """Let an instance be silent, suspected and asked."""
    known()
    clock.ticks(8)
    [instance] = sweep(clock)
    if passed is not None:
        instance_probed(instance=instance, passed=passed, text="503 in 1 ms")
    clock.ticks(after - 8)


@pytest.mark.parametrize(
    ("after", "passed", "state"),
    [
        (14.9, False, "suspect"),
        (15, False, "down"),
        (15, True, "suspect"),
        (600, True, "suspect"),
        (60, None, "suspect"),
    ],
)
def test_who_is_silent_for_fifteen_and_does_not_answer_a_probe_is_down(
    clock: Clock, after: float, passed: bool | None, state: str
) -> None:
    suspected(clock, after=after, passed=passed)

    sweep(clock)

    assert Instance.objects.get().state == state
    if state == "down":
        assert journal()[-1] == ("down", "users", "no beat for 15 s, probe: 503 in 1 ms")


def test_a_probe_from_before_the_suspicion_ends_nobody(clock: Clock) -> None:
    instance_probed(instance=known(), passed=False, text="503")
    clock.ticks(8)
    sweep(clock)
    clock.ticks(10)

    again = sweep(clock)

    assert Instance.objects.get().state == "suspect"
    assert len(again) == 1


def test_a_suspect_is_asked_again_after_a_pause(clock: Clock) -> None:
    suspected(clock, after=9, passed=True)

    soon = sweep(clock)
    clock.ticks(1)
    later = sweep(clock)

    assert (len(soon), len(later)) == (0, 1)


def test_who_has_just_begun_to_listen_knows_of_no_silence(clock: Clock) -> None:
    known()
    since = clock.ticks(3600)

    clock.ticks(7.9)
    early = sweep(clock, since)
    state = Instance.objects.get().state
    clock.ticks(0.1)
    sweep(clock, since)

    assert (early, state) == ([], "up")
    assert Instance.objects.get().state == "suspect"


def test_who_has_listened_for_less_than_fifteen_seconds_ends_nobody(clock: Clock) -> None:
    known()
    since = clock.ticks(3600)
    clock.ticks(8)
    [suspect] = sweep(clock, since)
    instance_probed(instance=suspect, passed=False, text="503")

    clock.ticks(6.9)
    sweep(clock, since)
    early = Instance.objects.get().state
    clock.ticks(0.1)
    sweep(clock, since)

    assert (early, Instance.objects.get().state) == ("suspect", "down")


def test_who_is_down_for_a_minute_is_kept_in_the_journal_only(clock: Clock) -> None:
    known(state="up")
    known(sequence=2, state="down")
    clock.ticks(59.9)
    sweep(clock)
    kept = Instance.objects.count()
    clock.ticks(0.1)

    sweep(clock)

    assert (kept, Instance.objects.count(), Service.objects.count()) == (1, 0, 1)
    assert journal()[-1] == ("evicted", "users", "was down: stopped")


def test_a_fleet_that_is_well_costs_a_sweep_one_query(
    clock: Clock, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    for number in range(5):
        known(instance=str(number))

    with django_assert_num_queries(1):
        sweep(clock)


@pytest.mark.parametrize("kind", ["suspect", "down", "evicted"])
def test_of_two_that_sweep_at_once_only_one_writes_the_journal(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "evicted":
        known()
        known(sequence=2, state="down")
        clock.ticks(60)
    elif kind == "down":
        suspected(clock, after=15, passed=False)
    else:
        known()
        clock.ticks(8)
    seen_by_the_other: Any = list(Instance.objects.select_related("service"))

    sweep(clock)
    monkeypatch.setattr(Instance.objects, "filter", _once(Instance.objects.filter, seen_by_the_other))
    sweep(clock)

    assert [entry[0] for entry in journal()].count(kind) == 1


def _once(real: Any, stale: list[Instance]) -> Any:
    # What the other process has read before the first one wrote.
    class Stale:
        def select_related(self, *_: str) -> list[Instance]:
            return stale

    answers = iter([Stale()])
    return lambda *args, **options: next(answers, None) or real(*args, **options)


def test_of_two_that_hear_the_same_change_only_one_writes_the_journal(clock: Clock) -> None:
    for _ in range(2):
        known(sequence=1)
        known(sequence=2, state="degraded", reason="redis is away")

    assert [kind for kind, *_ in journal()] == ["up", "degraded"]


def test_a_beat_that_comes_while_an_instance_is_given_up_wins(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    suspected(clock, after=15, passed=False)
    stale = list(Instance.objects.select_related("service"))
    known(sequence=2)

    monkeypatch.setattr(Instance.objects, "filter", _once(Instance.objects.filter, stale))
    sweep(clock)

    assert Instance.objects.get().state == "up"
    assert "down" not in [kind for kind, *_ in journal()]


# Probes and the journal


def test_a_probe_is_noted_and_told_only_where_somebody_asked_for_it(clock: Clock) -> None:
    instance = known()

    instance_probed(instance=instance, passed=True, text="/readyz 200 in 1 ms")
    told = len(journal())
    instance_probed(instance=instance, passed=False, text="/readyz 503 in 1 ms", by="ada")

    instance.refresh_from_db()
    assert (instance.last_probe, instance.probe_passed) == (clock.now, False)
    assert instance.probe_result == "/readyz 503 in 1 ms"
    assert instance.state == "up"
    assert told == 1
    assert journal()[-1] == ("probe", "users", "ada: /readyz 503 in 1 ms")


def test_what_an_earlier_start_answered_says_nothing_of_this_one(clock: Clock) -> None:
    earlier = known()
    instance = known(start="start-2")

    instance_probed(instance=earlier, passed=False, text="503")

    instance.refresh_from_db()
    assert instance.probe_passed is None


def test_the_journal_reaches_back_thirty_days(clock: Clock) -> None:
    known()
    clock.ticks(services.JOURNAL_DAYS.total_seconds())
    kept = journal_trimmed(now=clock.now)
    clock.ticks(1)

    assert (kept, journal_trimmed(now=clock.now)) == (0, 1)
    assert journal() == []
