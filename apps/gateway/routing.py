"""The WebSockets of the gateway."""

from channels.security.websocket import WebsocketDenier
from django.urls import URLPattern, path, re_path

from .sockets import NotificationsSocket

websocket_urlpatterns: list[URLPattern] = [
    path("ws/notifications", NotificationsSocket.as_asgi()),
    re_path("", WebsocketDenier.as_asgi()),  # without it an unknown path is an exception, not a refusal
]
