"""The hybrid application: HTTP, WebSockets and message servers in one process."""

import os
from typing import Any

import config  # noqa: F401 - puts apps/ on the import path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.apps import apps
from django.core.asgi import get_asgi_application

protocols: dict[str, Any] = {"http": get_asgi_application()}  # sets Django up: what follows needs its applications

from microservices import EventRouter, HybridApplication

protocols["event"] = EventRouter()
if apps.is_installed("gateway"):
    from gateway.routing import websocket_urlpatterns

    # Any page may open a WebSocket to anywhere; only its Origin tells whose page it is.
    protocols["websocket"] = AllowedHostsOriginValidator(URLRouter(websocket_urlpatterns))

application = HybridApplication(ProtocolTypeRouter(protocols))
