"""How much of this machine's memory a process has."""

from __future__ import annotations

from pathlib import Path


def proportional(pid: int) -> float | None:
    """Return a process's PSS in MiB: a page that several share counts in parts. None where that cannot be told."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    return None
