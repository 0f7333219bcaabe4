"""The figures, for people and for programs."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .measure import Case, Row

PACKAGES = ("msgspec", "uvloop", "hiredis", "pamqp", "aiokafka", "grpcio", "django")
_COLUMNS = ("", "calls/s", "ratio", "CPU us", "ratio", "+-%", "p50 ms", "p99 ms", "MB", "load", "on")


def machine(command: str) -> dict[str, Any]:
    """Return what a figure is worth nothing without."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "node": _output("node", "--version"),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "command": command,
    }


def heading(facts: dict[str, Any]) -> str:
    """Return the facts as a few lines."""
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    return (
        f"{facts['date']}, {facts['processor']}, {facts['cores']} cores, load {facts['load']:.1f}, "
        f"commit {facts['commit']}\nPython {facts['python']}, Node {facts['node']}, {packages}\n{facts['command']}"
    )


def table(workload: str, case: Case, rounds: int, rows: Sequence[Row]) -> str:
    """Return one case as a table; a ratio above 1 is better than the faster NestJS, or the first side."""
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    title = f"{workload}: {case.name}, {case.calls:,} calls, {rounds} rounds, medians"
    return "\n".join([title, *(_line(cells, widths) for cells in lines)])


def figures(rows: Iterable[Row]) -> dict[str, Any]:
    """Return one case for the JSON file."""
    return {
        row.name: {**row.sample._asdict(), "rate_ratio": row.rate_ratio, "cpu_ratio": row.cpu_ratio, "on": row.on}
        for row in rows
    }


def _cells(row: Row) -> tuple[str, ...]:
    sample = row.sample
    return (
        row.name,
        f"{sample.rate:,.0f}" if sample.rate >= 100 else f"{sample.rate:.2f}",
        _number(row.rate_ratio, 2),
        _number(sample.cpu, 1),
        _number(row.cpu_ratio, 2),
        f"{row.spread * 100:.0f}",
        _number(sample.p50, 3),
        _number(sample.p99, 3),
        f"{sample.memory:.0f}",
        f"{sample.load:.2f}",
        row.on,
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *numbers, last = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return f"  {first.strip().ljust(widths[0])}  {'  '.join(numbers)}  {last.strip()}".rstrip()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
