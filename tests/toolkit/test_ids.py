"""The ids of users."""

from concurrent.futures import ThreadPoolExecutor
from uuid import RFC_4122, UUID

import pytest

from microservices.ids import is_id, uuid7


def test_an_id_is_a_uuid_of_version_seven() -> None:
    parsed = UUID(uuid7())

    assert (parsed.version, parsed.variant) == (7, RFC_4122)


def test_an_id_begins_with_the_time_of_its_making(monkeypatch: pytest.MonkeyPatch) -> None:
    far_from_now = 4_102_444_800_000
    monkeypatch.setattr("microservices.ids._last", 0)
    monkeypatch.setattr("microservices.ids.time.time_ns", lambda: far_from_now * 1_000_000)

    made = UUID(uuid7())

    assert made.int >> 80 == far_from_now


def test_ids_of_one_thread_are_in_the_order_of_their_making() -> None:
    made = [uuid7() for _ in range(10_000)]

    assert made == sorted(set(made))


def test_ids_stay_in_order_when_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = uuid7()
    monkeypatch.setattr("microservices.ids.time.time_ns", lambda: 0)

    after = uuid7()

    assert after > before


def test_threads_never_make_the_same_id() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: uuid7(), range(5_000)))

    assert len(set(made)) == 5_000


@pytest.mark.parametrize("text", ["", "1", "nonsense", "{" + uuid7() + "}", uuid7().replace("-", ""), uuid7() + "\n"])
def test_what_is_not_written_as_an_id_is_none(text: str) -> None:
    assert not is_id(text)
