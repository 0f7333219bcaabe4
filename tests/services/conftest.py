"""Databases and threads for tests of what happens at once."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from microservices import RpcException
from microservices.executor import lending

AtOnce = Callable[..., list[Any]]


@pytest.fixture
def on_files(tmp_path: Path) -> Iterator[None]:
    """Put the databases into files for other threads: in memory, SQLite refuses instead of waiting."""
    homes = {alias: connections[alias].settings_dict["NAME"] for alias in ("orders", "payments")}
    for alias in homes:
        connections[alias].ensure_connection()
        with sqlite3.connect(tmp_path / f"{alias}.sqlite3") as file:
            connections[alias].connection.backup(file)
            # As a migrated database is: of two connections that change the mode at once, SQLite refuses one.
            file.execute("PRAGMA journal_mode=WAL")
        file.close()
        connections[alias].settings_dict["NAME"] = str(tmp_path / f"{alias}.sqlite3")
    yield
    for alias, home in homes.items():
        connections[alias].settings_dict["NAME"] = home


@pytest.fixture
def at_once(on_files: None) -> AtOnce:
    """Make calls at the same moment, each in a thread; return what each returned, or the code of what it raised.

    The test's own thread sees nothing of what they store: it is looked at by another call.
    """

    def at_once(*calls: Callable[[], Any]) -> list[Any]:
        ready = threading.Barrier(len(calls))

        def run(call: Callable[[], Any]) -> Any:
            try:
                with lending():
                    ready.wait(20)
                    return call()
            except RpcException as refused:
                return refused.code
            finally:
                connections.close_all()

        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(run, calls))

    return at_once
