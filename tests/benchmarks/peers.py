"""Both sides of every comparison: how a NestJS and one of ours are built and started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from .measure import Sample
from .processes import FIRST_CORE, LAST_CORE, NOTHING, Process, Tree, call

HERE = Path(__file__).parent
NESTS = ("nest11", "nest12")
BUILD = HERE / "build"

Run = Callable[[int], Sample]


def build() -> None:
    """Compile the load and its counterpart, and install both NestJS; does nothing when that is done."""
    BUILD.mkdir(exist_ok=True)
    sources = [*HERE.glob("*.[ch]")]
    for name in ("load", "answers"):
        program = BUILD / name
        if not program.exists() or program.stat().st_mtime < max(source.stat().st_mtime for source in sources):
            subprocess.run(["cc", "-O2", "-pthread", "-o", program, HERE / f"{name}.c"], check=True)
    for version in NESTS:
        folder = HERE / "nest" / version
        if not (folder / "node_modules").exists():
            subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)


def nest_name(version: str) -> str:
    """Return how a NestJS is called in the tables: with its version."""
    packages = json.loads((HERE / "nest" / version / "package.json").read_text())["dependencies"]
    return f"NestJS {packages['@nestjs/microservices']}"


class Program(NamedTuple):
    """A program, as it is started."""

    command: Sequence[str]
    env: Mapping[str, str] = NOTHING
    folder: Path | None = None

    def start(self, stack: ExitStack, name: str) -> Process:
        """Start a server that ends with `stack`."""
        process = Process(name, self.command, FIRST_CORE, self.env, self.folder)
        stack.callback(process.stop)
        return process

    def call(self, core: int) -> dict[str, Any]:
        """Run it to its end; return the line of JSON that it prints."""
        return call(self.command, core, self.env, self.folder)


def nest(version: str, script: str, facts: dict[str, Any]) -> Program:
    """Return one of the NestJS programs."""
    command = ["node", "--import", "../../interop/versions.js", script, json.dumps(facts)]
    return Program(command, {"NEST": version, "NODE_ENV": "production"}, HERE / "nest")


def ours(script: str, facts: dict[str, Any]) -> Program:
    """Return one of our programs."""
    return Program([sys.executable, str(HERE / script), json.dumps(facts)])


def served(server: Tree, load: Callable[[int], dict[str, Any]]) -> Run:
    """Return what makes calls by `load` and takes the server's time."""

    def run(calls: int) -> Sample:
        before = server.cpu
        made = load(calls)
        cpu = server.cpu - before
        if made.get("failed"):
            raise RuntimeError(f"{server.name}: {made['failed']} of {made['calls']} calls failed")
        return Sample(
            rate=made["calls"] / made["seconds"],
            cpu=cpu / made.get("made", made["calls"]) * 1e6,
            load=made["cpu"] / made["seconds"],
            memory=server.memory,
            p50=made.get("p50"),
            p99=made.get("p99"),
            answer=made.get("answer"),
        )

    return run


def made_by(client: Callable[[int], dict[str, Any]], server: Tree) -> Run:
    """Return what takes the time of a client that makes calls to a `server`."""

    def run(calls: int) -> Sample:
        before = server.cpu
        made = client(calls)
        return Sample(
            rate=made["calls"] / made["seconds"],
            cpu=made["cpu"] / made["calls"] * 1e6,
            load=(server.cpu - before) / made["seconds"],
            memory=made["memory"],
            p50=made.get("p50"),
            p99=made.get("p99"),
        )

    return run


def load(port: int, connections: int, in_flight: int, request: str, question: str = "") -> Callable[[int], Any]:
    """Return what makes calls over TCP by the compiled load."""

    def run(calls: int) -> dict[str, Any]:
        words = [str(port), str(connections), str(in_flight), str(calls), request, *([question] if question else [])]
        return call([str(BUILD / "load"), *words], LAST_CORE)

    return run
