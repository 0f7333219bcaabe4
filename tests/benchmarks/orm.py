"""A handler that reads one row by the ORM: Django's, and TypeORM under NestJS."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from .measure import Case, Side
from .peers import NESTS, load, nest, nest_name, ours, served
from .processes import free_port
from .tcp import packet

USER = packet("user", {"id": 7}, id="0123456789abcdef01234")


def one_row(stack: ExitStack) -> Iterator[Case]:
    """Yield the case: everybody reads the same SQLite file, over TCP."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    database = str(Path(folder, "users.sqlite3"))
    command, env, cwd = nest(NESTS[-1], "orm.js", {})
    subprocess.run([*command[:-1], "--seed", database], env={**os.environ, **env}, cwd=cwd, check=True, timeout=60)
    sides = []
    for name, on, program in (
        *(
            (nest_name(each), "TypeORM, better-sqlite3, on the event loop", partial(nest, each, "orm.js"))
            for each in NESTS
        ),
        ("ours", "Django's ORM, handlers on 16 threads, connections checked", partial(ours, "orm_service.py")),
    ):
        port = free_port()
        server = program({"url": f"tcp://127.0.0.1:{port}", "database": database}).start(stack, name)
        sides.append((name, on, server, port))
    for connections, in_flight, calls in ((1, 128, 6_000), (1, 1, 2_000)):
        yield Case(
            f"one row by its key, {connections} x {in_flight} in flight",
            calls,
            [
                Side(name, on, served(server, load(port, connections, in_flight, USER)))
                for name, on, server, port in sides
            ],
            6_000,
        )
