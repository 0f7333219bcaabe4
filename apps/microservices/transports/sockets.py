"""Sockets that a supervisor holds, so that several workers listen at one door."""

from __future__ import annotations

import json
import os
import socket

VARIABLE = "MICROSERVICES_SOCKETS"
"""The environment's name for them: their descriptors by name, as JSON."""


def inherited(name: str) -> socket.socket | None:
    """Return the socket that the supervisor holds under a name, once; None in a process of its own."""
    held: dict[str, int] = json.loads(os.environ.get(VARIABLE) or "{}")
    descriptor = held.pop(name, None)
    if descriptor is None:
        return None
    os.environ[VARIABLE] = json.dumps(held)
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)
