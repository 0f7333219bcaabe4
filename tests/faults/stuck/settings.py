"""The shop's settings, with this service in place of the shop."""

import os

os.environ.setdefault("SERVICES", "users")

from config.settings import *  # noqa: F403
from config.settings import MICROSERVICES as SHOP

_PLACE = {"url": os.environ["STUCK_URL"], "health": int(os.environ["STUCK_HEALTH_PORT"])}

INSTALLED_APPS = ["microservices", "tests.faults.stuck"]
DATABASES: dict[str, object] = {"default": {}}
MICROSERVICES = {
    **SHOP,
    "NAME": "stuck",
    "CLIENTS": {"stuck": _PLACE},
    "SERVERS": {"stuck": _PLACE},
    "EVENTS_URL": "memory://",
    "HEARTBEAT": 0,
}
