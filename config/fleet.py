"""The map of the fleet: one line per service, its address and its health port."""

from typing import TypedDict


class Place(TypedDict):
    """Where a service is found: the scheme of its URL names the transport."""

    url: str
    health: int


HTTP_PORT = 3000

SERVICES: dict[str, Place] = {
    "users": {"url": "tcp://127.0.0.1:3001", "health": 9001},
    "orders": {"url": "tcp://127.0.0.1:3002", "health": 9002},
    "payments": {"url": "tcp://127.0.0.1:3003", "health": 9003},
    "notifications": {"url": "tcp://127.0.0.1:3004", "health": 9004},
}
