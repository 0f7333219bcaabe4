"""What may import what, where the linter of imports does not look: at run time, and by name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import microservices

ROOT = Path(__file__).resolve().parents[2]
APPS = ROOT / "apps"
NO_SERVICES = {"microservices", "gateway"}

GROUND = ["exceptions", "packets", "codec"]
CORE = ["context", "handlers", "middleware", "dispatcher", "executor", "instruments"]
FOLDERS = ["transports", "discovery", "telemetry"]
HEAVY = ["django", "rest_framework", "channels", "daphne", "twisted", "uvicorn"]


def modules_of(folder: str) -> list[str]:
    """Name the modules of one of the toolkit's folders."""
    files = (APPS / "microservices" / folder).glob("*.py")
    return [folder, *(f"{folder}.{file.stem}" for file in sorted(files) if file.stem != "__init__")]


def sources(*folders: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Read every module of these folders."""
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            if "node_modules" not in file.parts:
                yield file, ast.parse(file.read_text(encoding="utf-8"), str(file))


# Floors


@pytest.mark.slow
def test_the_floors_below_the_settings_are_imported_without_django() -> None:
    names = [f"microservices.{name}" for name in (*GROUND, *CORE, *(m for f in FOLDERS for m in modules_of(f)))]
    script = (
        "import importlib, json, sys\n"
        f"sys.path.insert(0, {str(APPS)!r})\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted(name for name in {HEAVY!r} if name in sys.modules))\n"
    )

    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)

    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "[]"


# Names


def test_the_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((APPS / "microservices" / "__init__.py").read_text(encoding="utf-8"))
    shown = {
        alias.name
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert sorted(shown) == sorted(microservices.__all__)
    assert sorted(microservices._HOMES) == sorted(microservices.__all__)
    assert dir(microservices) == sorted(microservices.__all__)


@pytest.mark.parametrize("name", microservices.__all__)
def test_a_public_name_is_the_one_of_its_home(name: str) -> None:
    home = import_module(f"microservices.{microservices._HOMES[name]}")

    assert getattr(microservices, name) is getattr(home, name)


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'microservices' has no attribute 'Microservces'"):
        _ = microservices.Microservces


# Imports


def under_a_second_name(tree: ast.Module) -> list[int]:
    """The lines that import from `apps`, which is a source root and no package."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        else:
            continue
        lines += [node.lineno for name in names if name.partition(".")[0] == "apps"]
    return lines


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import apps.users", [1]),
        ("from apps.users import models", [1]),
        ("from apps import users", [1]),
        ("from .apps import UsersConfig", []),
        ("from django.apps import apps", []),
        ("import appsettings", []),
    ],
)
def test_the_rule_on_imports_sees_what_it_should(source: str, lines: list[int]) -> None:
    assert under_a_second_name(ast.parse(source)) == lines


def test_nothing_is_imported_under_a_second_name() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file, tree in sources(APPS, ROOT / "config", ROOT / "tests")
        for line in under_a_second_name(tree)
    ]

    assert found == []


# Transactions


def of_no_database(tree: ast.Module) -> list[int]:
    """The lines that open a transaction without saying on which database."""
    named = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and any(keyword.arg == "using" for keyword in node.keywords)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if id(node) not in named
        and isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) == "atomic"
    ]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("with transaction.atomic():\n    pass", [1]),
        ("with transaction.atomic(durable=True):\n    pass", [1]),
        ("@transaction.atomic\ndef change(): ...", [1]),
        ("@atomic\ndef change(): ...", [1]),
        ("change = atomic(change)", [1]),
        ("with transaction.atomic(using='users', durable=True):\n    pass", []),
        ("@atomic(using='users')\ndef change(): ...", []),
    ],
)
def test_the_rule_on_transactions_sees_what_it_should(source: str, lines: list[int]) -> None:
    assert of_no_database(ast.parse(source)) == lines


def test_services_say_on_which_database_a_transaction_is() -> None:
    services = [folder for folder in APPS.iterdir() if (folder / "apps.py").exists() and folder.name not in NO_SERVICES]

    found = [f"{file.relative_to(ROOT)}:{line}" for file, tree in sources(*services) for line in of_no_database(tree)]

    assert APPS / "users" in services
    assert found == []
