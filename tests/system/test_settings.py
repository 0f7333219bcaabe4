"""What the environment makes of a process: each in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.shop import MANAGE, ROOT

pytestmark = pytest.mark.slow


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment that sets nothing of the shop's but `env`."""
    bare = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return subprocess.run(command, cwd=ROOT, env=bare | env, capture_output=True, text=True, timeout=50)


def told(script: str, *argv: str, **env: str) -> Any:
    """Run a script as `manage.py ARGV` would see the settings; return the JSON that it prints last."""
    setting = f"import json, sys; sys.argv = ['manage.py', *{argv!r}]; import config; "
    process = run(sys.executable, "-c", setting + script, DJANGO_SETTINGS_MODULE="config.settings", **env)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def databases(folder: Path) -> dict[str, str]:
    return {
        "GATEWAY_DATABASE_URL": f"sqlite:///{folder / 'gateway.sqlite3'}",
        "USERS_DATABASE_URL": f"sqlite:///{folder / 'users.sqlite3'}",
    }


def test_without_a_secret_key_one_line_says_what_to_set() -> None:
    process = run(*MANAGE, "patterns")

    assert process.returncode != 0
    assert process.stdout == ""
    assert process.stderr == (
        "Improperly configured: "
        "Set SECRET_KEY, or SECRET_KEY_FILE, to a long random string; for development set DEBUG=1 instead.\n"
    )


def test_the_secret_key_may_lie_in_a_file_and_debug_is_off(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("$tarts with a dollar\n", encoding="utf-8")
    script = "from django.conf import settings; print(json.dumps([settings.SECRET_KEY, settings.DEBUG]))"

    assert told(script, "patterns", SECRET_KEY_FILE=str(file)) == ["$tarts with a dollar", False]


def test_a_service_alone_opens_only_its_own_database(tmp_path: Path) -> None:
    script = """
import django; django.setup()
from django.conf import settings
from django.core.management import call_command
from django.db import connection, transaction
call_command("migratefleet", stdout=sys.stderr)
failures = []
for query in (lambda: connection.cursor(), lambda: transaction.atomic().__enter__()):
    try:
        query()
    except Exception as error:
        failures.append(type(error).__name__)
from users.models import User
print(json.dumps([failures, User.objects.count()]))
"""

    answer = told(script, "runmicroservice", "users", DEBUG="1", SERVICES="users", **databases(tmp_path))

    assert answer == [["ImproperlyConfigured", "ImproperlyConfigured"], 0]
    assert sorted(file.name for file in tmp_path.glob("*.sqlite3")) == ["users.sqlite3"]


def test_an_unknown_name_in_services_is_named_with_the_known() -> None:
    process = run(*MANAGE, "patterns", DEBUG="1", SERVICES="users,usres")

    assert process.returncode != 0
    known = "gateway, users, orders, payments, notifications"
    assert process.stderr == f"Improperly configured: SERVICES names usres; config/fleet.py knows {known}.\n"


@pytest.mark.parametrize(
    ("command", "given", "listens"),
    [("runserver", {}, False), ("serve", {}, True), ("runserver", {"LISTEN": "1"}, True)],
    ids=["runserver", "serve", "runserver with LISTEN=1"],
)
def test_runserver_keeps_the_doors_closed_unless_it_is_told_otherwise(
    command: str, given: dict[str, str], listens: bool
) -> None:
    script = "from django.conf import settings; print(json.dumps(settings.MICROSERVICES['LISTEN']))"

    assert told(script, command, DEBUG="1", **given) is listens


@pytest.mark.parametrize("faults", ["full", "[]", '{"users"'])
def test_faults_that_cannot_be_read_are_told_by_their_name(faults: str) -> None:
    process = run(*MANAGE, "patterns", DEBUG="1", FAULTS=faults)

    assert process.returncode != 0
    assert process.stderr == f"Improperly configured: FAULTS must be a JSON object, not {faults!r}.\n"


def test_faults_are_read_from_json() -> None:
    script = "from django.conf import settings; print(json.dumps(settings.MICROSERVICES['FAULTS']))"

    assert told(script, "patterns", DEBUG="1", FAULTS='{"users": {"*": {"drop": 1}}}') == {"users": {"*": {"drop": 1}}}
    assert told(script, "patterns", DEBUG="1", FAULTS=" ") == {}
