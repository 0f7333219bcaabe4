"""Calls inside one process, and the bus of one process."""

from microservices.dispatcher import Dispatcher
from microservices.transports.base import ClientProxy
from microservices.transports.local import LocalClient
from tests.toolkit.transports.contract import TransportContract


class TestLocal(TransportContract):
    has_server = False

    async def serve(self, dispatcher: Dispatcher) -> None:
        return None

    def proxy(self, dispatcher: Dispatcher, server: None) -> ClientProxy:
        return LocalClient(dispatcher)
