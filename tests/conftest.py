"""A shop for each test, on databases that were migrated and seeded once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.shop import MANAGE, ROOT, Shop


@pytest.fixture(scope="session")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Databases as script/server leaves them."""
    folder = tmp_path_factory.mktemp("seeded")
    shop = Shop(folder)
    for command in ("migratefleet", "seed_users", "seed_products"):
        subprocess.run(
            [*MANAGE, command], env={**os.environ, **shop.env}, cwd=ROOT, check=True, capture_output=True, timeout=60
        )
    return folder


@pytest.fixture
def shop(seeded: Path, tmp_path: Path) -> Iterator[Shop]:
    """A shop with a copy of them; whatever a test started in it is ended."""
    databases = tmp_path / "databases"
    shutil.copytree(seeded, databases)
    shop = Shop(databases)
    yield shop
    shop.stop()
