"""The event doors of the registry."""

from ..consumers import EventConsumer
from ..discovery.registry import DOWN, DRAINING, UP, Report
from ..handlers import event_pattern
from . import services


class RegistryConsumer(EventConsumer):
    """Hears what instances tell of themselves.

    Each process that keeps the list hears all: what one misses while it is away, it need not hear later.
    """

    @event_pattern(UP, delivery="each")
    def instance_up(self, data: Report) -> None:
        """Note a beat."""
        services.instance_reported(report=data)

    @event_pattern(DRAINING, delivery="each")
    def instance_draining(self, data: Report) -> None:
        """Note that an instance takes no more calls."""
        services.instance_reported(report=data)

    @event_pattern(DOWN, delivery="each")
    def instance_down(self, data: Report) -> None:
        """Note that an instance has stopped."""
        services.instance_reported(report=data)
