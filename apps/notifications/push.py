"""Pushes notifications to the browsers of their user, through the channel layer."""

import logging

import msgspec
from channels.layers import get_channel_layer

from microservices import clients

from .contracts import Notification

logger = logging.getLogger(__name__)

PATIENCE = 2.0


def push(notification: Notification) -> None:
    """Hand a notification to the group `user.<id>`; nothing where there is no channel layer or nobody listens."""
    layer = get_channel_layer()
    if layer is None:
        return
    message = {"type": "notify", "notification": msgspec.to_builtins(notification)}
    # On the application's loop: that is where the layer has its connection, and in memory its queues,
    # which are not safe to fill from another thread.
    pushed = clients.run(layer.group_send(f"user.{notification.user_id}", message))
    try:
        pushed.result(PATIENCE)
    except Exception:
        pushed.cancel()
        logger.exception("notification %s was not pushed; it waits in the inbox", notification.id)
