"""The WebSocket of a browser: what the shop tells its user, as it happens."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Annotated, Any

import msgspec
from channels.exceptions import StopConsumer
from channels.generic.websocket import AsyncJsonWebsocketConsumer

from microservices.instruments import dropped
from microservices.lifecycle import State, lifecycle

logger = logging.getLogger(__name__)

MAX_MESSAGE = 4096  # bytes that a browser may say at once
MAX_WAITING = 32  # notifications for a browser that reads slower than it is told
PATIENCE_TO_BE_NAMED = 10.0
PATIENCE_TO_BE_READ = 20.0
PATIENCE_TO_PART = 1.0
SPREAD = 2.0  # seconds over which the sockets of a process that drains close, so that not all come back at once
SPREAD_EACH = 0.02

# Why the server closes a socket: RFC 6455's codes, and one of our own that means what HTTP's 401 does.
NOT_ALLOWED, TOO_BIG, RESTART, TRY_LATER, NOBODY = 1008, 1009, 1012, 1013, 4401
OWN_RANGE = 3000  # added where a server keeps RFC 6455's codes to itself: 1012 becomes 4012


class Hello(msgspec.Struct):
    """The first message of a browser; until there is authentication, it names its user."""

    user_id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f-]{1,36}\Z")]


_hello = msgspec.json.Decoder(Hello)


class NotificationsSocket(AsyncJsonWebsocketConsumer):  # type: ignore[misc] # channels ships no types
    """Sends a user's notifications on: `{"type": "notification", "notification": {...}}`.

    The browser says who its user is, hears `{"type": "ready"}`, and has nothing more to say.
    """

    def __init__(self) -> None:
        super().__init__()
        self._group = ""
        self._waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_WAITING)
        self._open = False
        self._reason = NOBODY

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Live as long as the connection, and leave nothing behind."""
        self._patience = asyncio.timeout(PATIENCE_TO_BE_NAMED)
        self._sender = asyncio.create_task(self._send_on(), name="notifications")
        lifecycle.on_drain.add(self._leave)
        try:
            async with self._patience:
                await super().__call__(scope, receive, send)
        except TimeoutError:
            if not self._patience.expired():
                raise
            await self._part(self._reason)
        finally:
            lifecycle.on_drain.discard(self._leave)
            self._sender.cancel()
            await self._leave_group()

    async def dispatch(self, message: dict[str, Any]) -> None:
        """Take what the browser or the channel layer says.

        Channels' own method goes to a thread for each message, to close database connections: this
        consumer has none.
        """
        match message["type"]:
            case "notify":
                self._tell({"type": "notification", "notification": message["notification"]})
            case "websocket.connect":
                await self.websocket_connect(message)
            case "websocket.receive":
                await self.websocket_receive(message)
            case "websocket.disconnect":
                self._open = False
                raise StopConsumer

    async def connect(self) -> None:
        """Take the connection, unless the process is about to end."""
        if lifecycle.state is State.DRAINING:
            await self.close()
            return
        await self.accept()
        self._open = True

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None, **kwargs: Any) -> None:
        """Learn who the user is."""
        said = text_data.encode() if text_data is not None else bytes_data or b""
        if len(said) > MAX_MESSAGE:
            await self._part(TOO_BIG)
        elif self._group:
            await self._part(NOT_ALLOWED)
        else:
            await self._greet(said)

    async def _greet(self, said: bytes) -> None:
        try:
            hello = _hello.decode(said)
        except (msgspec.DecodeError, RecursionError):
            await self._part(NOBODY)
            return
        self._group = f"user.{hello.user_id}"
        await self.channel_layer.group_add(self._group, self.channel_name)
        self._patience.reschedule(None)
        self._tell({"type": "ready"})

    def _tell(self, message: dict[str, Any]) -> None:
        # Never waits: the layer's own queue for this socket has no bound.
        if self._waiting.full():
            self._waiting.get_nowait()
            dropped.add("gateway", "websocket", "slow-reader")
        self._waiting.put_nowait(message)

    async def _send_on(self) -> None:
        while True:
            message = await self._waiting.get()
            try:
                async with asyncio.timeout(PATIENCE_TO_BE_READ):
                    await self.send_json(message)
            except TimeoutError:
                self._reason = TRY_LATER
                self._patience.reschedule(asyncio.get_running_loop().time())
                return
            except OSError:  # the peer has gone; the server says so to `dispatch`, too
                return

    async def _leave(self) -> None:
        """Close because the process ends; the browser finds another one."""
        await asyncio.sleep(random.uniform(0, min(SPREAD, len(lifecycle.on_drain) * SPREAD_EACH)))  # noqa: S311
        await self._part(RESTART)

    async def _part(self, code: int) -> None:
        if not self._open:
            return
        self._open = False
        self._sender.cancel()  # nothing may be sent after the close
        try:
            async with asyncio.timeout(PATIENCE_TO_PART):
                try:
                    await self.close(code)
                except OSError:
                    raise
                except Exception:  # noqa: BLE001 - daphne lets applications send 3000 to 4999 only, and says it so
                    await self.close(code + OWN_RANGE)
        except OSError:  # the peer has gone, or reads nothing: TimeoutError is an OSError
            logger.debug("a socket was not closed with %d: its peer does not read", code)

    async def _leave_group(self) -> None:
        if not self._group:
            return
        try:
            async with asyncio.timeout(PATIENCE_TO_PART):
                await self.channel_layer.group_discard(self._group, self.channel_name)
        except Exception:
            logger.exception("a socket's membership in its group was not taken back")
