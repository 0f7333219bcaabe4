"""The fleet in the admin: what the lists show, what they cost, and what cannot be done there."""

from __future__ import annotations

import asyncio
import re
from html import unescape
from pathlib import Path

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.contrib.staticfiles import finders
from django.http import HttpResponse
from django.test import Client
from pytest_django import DjangoAssertNumQueries, Settings

from microservices.discovery.registry import PatternReport
from microservices.registry import admin
from microservices.registry.models import Instance, JournalEntry, Pattern, Service, State
from microservices.registry.probe import Outcome
from tests.toolkit.registry.conftest import Clock, known

pytestmark = pytest.mark.django_db(databases=["default"])

URL = "/admin/registry"


@pytest.fixture(autouse=True)
def _quick_hashes(settings: Settings) -> None:
    # The real ones are slow on purpose.
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


def rows(page: HttpResponse, *columns: str) -> list[tuple[str, ...]]:
    """Return the text of some columns of a list."""
    assert page.status_code == 200
    found = []
    for row in re.findall(r"<tr>(?!\s*<th scope=\"col\").*?</tr>", page.content.decode(), re.DOTALL):
        cells = dict(re.findall(r'class="[^"]*field-(\w+)[^"]*"[^>]*>(.*?)</t[dh]>', row, re.DOTALL))
        if cells:
            found.append(tuple(" ".join(unescape(re.sub(r"<[^>]+>", " ", cells[name])).split()) for name in columns))
    return found


# Lists


def test_the_site_is_called_fleet(admin_client: Client) -> None:
    page = admin_client.get("/admin/").content.decode()

    assert "<title>Services and instances | Fleet</title>" in page


def test_the_list_of_services_sums_up_their_instances(admin_client: Client) -> None:
    doors = {"tcp": "tcp://box:3001", "health": "http://box:9001"}
    patterns = (PatternReport("get_user", "request"),)
    known("users", "a", addresses=doors, patterns=patterns)
    known("users", "b", addresses=doors | {"grpc": "grpc://box:5000"}, version="1.1.0", patterns=patterns)
    known("users", "c", patterns=patterns)
    known("users", "c", sequence=2, state="down")
    known("orders", "a")
    known("payments", "a")
    Instance.objects.filter(service__name="payments").delete()

    page = admin_client.get(f"{URL}/service/")

    assert rows(page, "name", "how", "up", "versions", "transports", "pattern_count") == [
        ("orders", "up", "1/1", "1.0.0", "-", "0"),
        ("payments", "no instance", "0/0", "-", "-", "0"),
        ("users", "1 down 2 up", "2/3", "1.0.0, 1.1.0", "grpc, tcp", "1"),
    ]


def test_the_list_of_instances_tells_how_where_and_since_when(clock: Clock, admin_client: Client) -> None:
    doors = {"tcp": "tcp://box:3001", "health": "http://box:9001"}
    known(addresses=doors, zone="eu-1")
    known(addresses=doors, sequence=2, state="degraded", reason="<b>redis</b> is away", zone="eu-1")
    clock.ticks(3)

    page = admin_client.get(f"{URL}/instance/")

    assert 'data-state="degraded"' in page.content.decode()
    assert "<b>redis</b>" not in page.content.decode()
    [row] = rows(page, "name", "service", "where", "version", "pid", "beat", "zone")
    assert row == ("a", "users", "health box:9001 tcp box:3001", "1.0.0", "42", "3 s ago", "eu-1")
    assert rows(page, "how") == [("degraded <b>redis</b> is away",)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s ago"), (119, "119 s ago"), (120, "2 min ago"), (9000, "2 h ago")]
)
def test_how_long_ago_is_told_in_the_unit_that_fits(clock: Clock, seconds: float, text: str) -> None:
    at = clock.now
    clock.ticks(seconds)

    assert f">{text}</time>" in admin.ago(at)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("service/?q=get_user", ["users"]),
        ("service/?q=order", ["orders"]),
        ("service/?state=draining", ["orders"]),
        ("service/?state=down", []),
        ("instance/?q=box", ["b"]),
        ("instance/?q=43", ["b"]),
        ("instance/?state__exact=draining", ["b"]),
        ("instance/?state__exact=up&zone=eu-2", []),
        ("instance/?zone=eu-1", ["a"]),
        ("instance/?version=1.1.0", ["b"]),
    ],
)
def test_lists_are_searched_and_filtered(admin_client: Client, path: str, names: list[str]) -> None:
    pattern = PatternReport("get_user", "request")
    known("users", "a", host="elsewhere", zone="eu-1", patterns=(pattern, PatternReport("get_users", "request")))
    known("orders", "b", pid=43, version="1.1.0", state="draining")

    found = admin_client.get(f"{URL}/{path}", follow=True)

    assert [name for (name,) in rows(found, "name")] == names


@pytest.mark.parametrize("path", ["service/", "instance/", "pattern/", "journalentry/"])
def test_a_list_costs_the_same_however_long_it_is(
    admin_client: Client, django_assert_max_num_queries: DjangoAssertNumQueries, path: str
) -> None:
    known("users", "a", patterns=(PatternReport("p0", "event"),))
    with django_assert_max_num_queries(30) as few:
        admin_client.get(f"{URL}/{path}")
    for number in range(5):
        for name in "ab":
            known(f"s{number}", name, patterns=(PatternReport(f"p{number}", "event"),))

    with django_assert_max_num_queries(len(few)) as many:
        page = admin_client.get(f"{URL}/{path}")

    assert len(rows(page)) > 5
    assert len(many) <= 10


# Pages


@pytest.mark.parametrize("model", [Service, Instance, Pattern, JournalEntry])
def test_a_page_is_to_look_at(admin_client: Client, model: type[Service]) -> None:
    known(patterns=(PatternReport("get_user", "request", "safe", 5.0),), addresses={"tcp": "tcp://box:3001"})
    url = f"{URL}/{model._meta.model_name}"
    pk = model.objects.get().pk

    page = admin_client.get(f"{url}/{pk}/change/")

    assert page.status_code == 200
    assert 'name="_save"' not in page.content.decode()
    assert admin_client.get(f"{url}/add/").status_code == 403
    assert admin_client.post(f"{url}/{pk}/change/", {"name": "x"}).status_code == 403
    assert admin_client.post(f"{url}/{pk}/delete/", {"post": "yes"}).status_code == 403
    assert model.objects.count() == 1


def test_the_page_of_a_service_shows_its_instances_and_patterns(admin_client: Client) -> None:
    instance = known(patterns=(PatternReport("get_user", "request", "safe", 5.0),), addresses={"tcp": "tcp://box:1"})

    page = admin_client.get(f"{URL}/service/{instance.service_id}/change/").content.decode()

    assert f"{URL}/instance/{instance.pk}/change/" in page
    assert 'title="tcp://box:1"' in page
    assert "get_user" in page


def test_the_script_is_a_module_of_the_apps_own(admin_client: Client) -> None:
    page = admin_client.get(f"{URL}/instance/").content.decode()

    assert re.search(r'<script src="/static/registry/refresh\.js" type="module">', page)
    assert finders.find("registry/refresh.js")


# Probe now


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Outcome]:
    """What instances answer, by name."""
    outcomes: dict[str, Outcome] = {}
    monkeypatch.setattr(admin, "probed", lambda instances: [outcomes[instance.name] for instance in instances])
    return outcomes


def probe(client: Client, *instances: Instance) -> list[str]:
    """Choose the action for these instances; return what it says."""
    chosen = {"action": "probe_now", "_selected_action": [instance.pk for instance in instances]}
    page = client.post(f"{URL}/instance/", chosen, follow=True)
    return [f"{message.level_tag}: {message}" for message in page.context["messages"]]


def test_the_answers_of_the_probed_are_shown_kept_and_logged(admin_client: Client, answers: dict[str, Outcome]) -> None:
    answers |= {"a": Outcome(True, "/readyz 200 in 1 ms"), "b": Outcome(False, "/readyz 503 in 1 ms")}
    instances = known("users", "a"), known("orders", "b"), known("orders", "c")

    said = probe(admin_client, *instances[:2])

    assert sorted(said) == ["success: users a: /readyz 200 in 1 ms", "warning: orders b: /readyz 503 in 1 ms"]
    kept = Instance.objects.order_by("name").values_list("probe_passed", "probe_result")
    assert list(kept) == [(True, "/readyz 200 in 1 ms"), (False, "/readyz 503 in 1 ms"), (None, "")]
    assert sorted(LogEntry.objects.values_list("object_repr", "user__username")) == [("a", "admin"), ("b", "admin")]
    told = JournalEntry.objects.filter(kind="probe").values_list("instance", "text")
    assert sorted(told) == [("a", "admin: /readyz 200 in 1 ms"), ("b", "admin: /readyz 503 in 1 ms")]


def test_a_probe_from_the_admin_reaches_the_network(admin_client: Client, unused_tcp_port: int) -> None:
    instance = known(addresses={"health": f"http://127.0.0.1:{unused_tcp_port}"})

    [said] = probe(admin_client, instance)

    assert said.startswith(f"warning: users a: http://127.0.0.1:{unused_tcp_port}: ")


def test_probes_that_do_not_come_to_an_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MARGIN", 0.05 - admin.LIMIT)
    monkeypatch.setattr(admin, "probe_all", _never)

    outcomes = admin.probed([Instance(name="a"), Instance(name="b")])

    assert outcomes == [(False, "there was no time to ask")] * 2


async def _never(*_: object) -> None:
    await asyncio.Event().wait()


def test_only_so_many_are_probed_at_once(admin_client: Client, answers: dict[str, Outcome]) -> None:
    instances = [known(instance=f"{number}") for number in range(admin.AT_ONCE + 1)]

    said = probe(admin_client, *instances)

    assert said == ["error: Select at most 50 instances at a time."]
    assert JournalEntry.objects.filter(kind="probe").count() == 0


def test_who_may_only_look_has_nothing_probed(client: Client, answers: dict[str, Outcome]) -> None:
    guest = get_user_model().objects.create_user("guest", password="guest", is_staff=True)
    guest.user_permissions.add(Permission.objects.get(codename="view_instance"))
    client.force_login(guest)
    answers["a"] = Outcome(True, "fine")

    listed = client.get(f"{URL}/instance/")
    probe(client, known())

    assert listed.status_code == 200
    assert "Probe now" not in listed.content.decode()
    assert JournalEntry.objects.filter(kind="probe").count() == 0


def test_every_state_has_a_colour() -> None:
    style = Path(str(finders.find("registry/registry.css"))).read_text(encoding="utf-8")

    assert {state for state in State if f'[data-state="{state}"]' not in style} == set()
