"""Who has a port of this machine."""

from __future__ import annotations

import os
from pathlib import Path

_LISTENING = "0A"


def owner(port: int) -> str:
    """Return which process listens on a port, for people; empty where that cannot be told."""
    try:
        inodes = {
            f"socket:[{fields[9]}]"
            for table in ("/proc/net/tcp", "/proc/net/tcp6")
            for fields in map(str.split, Path(table).read_text().splitlines()[1:])
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port
        }
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and _has_one(process, inodes):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f"process {process.name}: {command.strip()[:80]}"
    except OSError:
        return ""  # no Linux, or a process that has just ended
    return ""


def _has_one(process: Path, inodes: set[str]) -> bool:
    try:
        return any(os.readlink(descriptor) in inodes for descriptor in (process / "fd").iterdir())
    except OSError:
        return False  # somebody else's process
