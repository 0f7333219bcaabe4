"""A service at several addresses, called as if it were at one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from msgspec import Raw

from . import transports
from .conf import get_settings
from .context import RpcContext
from .discovery.balancer import Balancer
from .discovery.instances import Instance, Location
from .exceptions import NoHandler, RpcException, Unavailable
from .instruments import Bound
from .resilience.breaker import REFUSALS
from .resilience.retry import never_sent
from .transports import Address
from .transports.base import Caller, ClientProxy, Status

_NO_NEWS = (*REFUSALS, NoHandler.code)
_TRIED = 15
"""How many attempts before the last one are remembered."""


def connect(service: str, addresses: Sequence[Address]) -> Caller:
    """Return what calls a service of the map at its address, or at one of several."""

    def proxy(address: Address) -> ClientProxy:
        return transports.load(address, "client")(address, service)  # type: ignore[no-any-return]

    if len(addresses) == 1:
        return proxy(addresses[0])
    known = {str(address): address for address in addresses}
    locations = [Location(url, address.weight, address.zone) for url, address in known.items()]
    settings = get_settings()
    chooser = settings.clients[service].balance
    balancer = Balancer(service, locations, chooser=chooser, zone=settings.zone, source=settings.name)
    return Balanced(balancer, lambda url: proxy(known[url]))


class Balanced:
    """A proxy over one proxy for each instance, which `connect(url)` makes when it is first called.

    `context.peer` tells which instance a call went to, and `context.tried` to which its attempts have gone: the
    next goes to another. A connection that is refused has sent nothing, so that the call goes to the next
    instance at once. A stream stays where it began.
    """

    def __init__(self, balancer: Balancer, connect: Callable[[str], ClientProxy]) -> None:
        self.balancer = balancer
        self._connect = connect
        self._closed = False
        self._proxies: dict[str, ClientProxy] = {}
        first = self._proxy(next(iter(balancer.instances)))
        self.service = balancer.target
        self.scheme = first.scheme
        self.url = ",".join(balancer.instances)
        self.read_record = first.read_record
        """Reads what a transport is told beside one message, the same for all."""

    async def send(self, data: Any, context: RpcContext) -> Raw | None:
        """Do what `ClientProxy.send` does."""
        balancer, proxies = self.balancer, self._proxies
        clock = balancer.clock
        left = len(balancer.instances)
        while True:
            instance = self._choose(context, timed=True)
            began = clock()
            failed: bool | None = None
            try:
                result = await (proxies.get(instance.url) or self._proxy(instance.url)).send(data, context)
                failed = False
                return result
            except RpcException as error:
                failed = _failed(error, context, began)
                left -= 1
                if not left or not never_sent(error):
                    raise
            finally:
                balancer.done(instance, began, failed)

    async def stream(self, data: Any, context: RpcContext) -> AsyncGenerator[Raw]:
        """Do what `ClientProxy.stream` does."""
        left = len(self.balancer.instances)
        while True:
            answers = False
            try:
                with self._untimed(context) as (proxy, well):
                    async with aclosing(proxy.stream(data, context)) as values:
                        async for value in values:
                            if not answers:
                                answers = True
                                well()
                            yield value
                return
            except RpcException as error:
                left -= 1
                if answers or not left or not never_sent(error):
                    raise

    async def emit(self, data: Any, context: RpcContext) -> None:
        """Do what `ClientProxy.emit` does."""
        left = len(self.balancer.instances)
        while True:
            try:
                with self._untimed(context) as (proxy, _):
                    await proxy.emit(data, context)
                return
            except RpcException as error:
                left -= 1
                if not left or not never_sent(error):
                    raise

    @property
    def status(self) -> Status:
        """Connected, if to one of them; else as the first one is."""
        states = [proxy.status for proxy in self._proxies.values()]
        return Status.CONNECTED if Status.CONNECTED in states else states[0]

    @property
    def bounds(self) -> list[Bound]:
        """How full is what stands before all of them together."""
        sums: dict[str, Bound] = {}
        for bound in (bound for proxy in self._proxies.values() for bound in proxy.bounds):
            _, used, limit = sums.get(bound.place, Bound(bound.place, 0, 0))
            sums[bound.place] = Bound(bound.place, used + bound.used, limit + bound.limit)
        return list(sums.values())

    async def close(self) -> None:
        """Close the connections to all of them."""
        self._closed = True
        for proxy in self._proxies.values():
            await proxy.close()

    def unwrap(self) -> dict[str, Any]:
        """Return the native object behind each, by its URL."""
        return {url: proxy.unwrap() for url, proxy in self._proxies.items()}

    def _choose(self, context: RpcContext, *, timed: bool) -> Instance:
        tried = context.tried
        instance = self.balancer.choose(tried, timed=timed)
        url = context.peer = instance.url
        context.tried = (*tried[-_TRIED:], url) if tried else (url,)
        return instance

    @contextmanager
    def _untimed(self, context: RpcContext) -> Iterator[tuple[ClientProxy, Callable[[], None]]]:
        # How long a stream or an event takes says nothing of how quick an instance is.
        balancer = self.balancer
        instance = self._choose(context, timed=False)
        began = balancer.clock()
        failed: bool | None = None

        def well() -> None:
            balancer.done(instance, began, failed=False, timed=False)

        try:
            yield self._proxy(instance.url), well
            failed = False
        except RpcException as error:
            failed = _failed(error, context, began)
            raise
        finally:
            balancer.done(instance, began, failed, timed=False)

    def _proxy(self, url: str) -> ClientProxy:
        proxy = self._proxies.get(url)
        if proxy is None:
            if self._closed:
                raise Unavailable(f"The client of {self.service} is closed.", code="closed")
            proxy = self._proxies[url] = self._connect(url)
        return proxy


def _failed(error: RpcException, context: RpcContext, began: float) -> bool | None:
    if error.code in _NO_NEWS or error.status_code in (429, 501):
        return None  # it tells of what is asked for, and not of who is asked
    if context.deadline is not None and context.deadline <= began:
        return None  # its time was over before
    return error.status_code >= 500
