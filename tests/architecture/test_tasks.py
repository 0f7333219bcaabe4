"""Every task has an owner, and every queue a bound: what is started elsewhere fails here first."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

APPS = Path(__file__).parents[2] / "apps"
SOURCES = sorted(path for path in APPS.rglob("*.py") if "migrations" not in path.parts)

STARTS = {"create_task", "ensure_future"}
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "yaml"}


def calls(tree: ast.AST, names: set[str]) -> Iterator[tuple[ast.Call, ast.AST | None]]:
    """Yield the calls of functions with these names, each with the statement that it is the whole of."""
    whole = {id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in names:
                yield node, whole.get(id(node))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(APPS)))
def test_nothing_is_started_and_forgotten(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))

    forgotten = [call.lineno for call, statement in calls(tree, STARTS) if statement is not None]
    unbounded = [call.lineno for call, _ in calls(tree, {"Queue", "LifoQueue"}) if not call.args and not call.keywords]

    assert forgotten == []
    assert unbounded == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(APPS)))
def test_nothing_is_unpickled(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    }

    assert modules & UNPICKLES == set()
