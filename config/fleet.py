"""The map of the fleet: one line per service, its address and its health port."""

from typing import TypedDict


class Place(TypedDict):
    """Where a service is found: the scheme of its URL names the transport."""

    url: str
    health: int


HTTP_PORT = 3000

SERVICES: dict[str, Place] = {
    "users": {"url": "tcp://127.0.0.1:3001", "health": 9001},
}
