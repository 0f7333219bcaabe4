"""Events and a channel layer to test notifications with."""

from typing import Any

import pytest
from channels.layers import get_channel_layer
from pytest_django import Settings


@pytest.fixture(autouse=True)
def _nobody_listens(settings: Settings) -> None:
    settings.CHANNEL_LAYERS = {}


@pytest.fixture
def layer(settings: Settings) -> Any:
    """Give the service a channel layer."""
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    return get_channel_layer()
