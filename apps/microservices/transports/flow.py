"""What every connection of ours does with its flow: what is read can be held, what is written is gathered."""

from __future__ import annotations

import asyncio

_GATHERED = 128
"""How many pieces of bytes wait for the end of the turn at most."""


class FlowProtocol(asyncio.Protocol):
    """Writes once a turn of the loop, tells when the peer takes too little, and reads nothing while it is held."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._flushing = False
        self._held = False
        self._writable: asyncio.Future[None] | None = None

    # Reading

    def hold(self) -> None:
        """Read nothing more for now; the other side bounds what it keeps for us."""
        if not self._held and not self.transport.is_closing():
            self._held = True
            self.transport.pause_reading()

    def release(self) -> None:
        """Read on."""
        if self._held and not self.transport.is_closing():
            self._held = False
            self.transport.resume_reading()
            self.read_on()

    def hold_while_congested(self) -> None:
        """Read nothing more until the other side takes what is written: what comes would be answered in memory."""
        # Only for a full transport, which says when it has room. A broker may also say that it takes nothing for now,
        # and its word that it does again must be read.
        if self._writable is not None and not self._held and self.transport.get_write_buffer_size():
            self.hold()
            self._writable.add_done_callback(lambda _: self.release())

    def read_on(self) -> None:
        """Take what had come before reading was held."""

    # Writing

    def write(self, *parts: bytes) -> None:
        """Send bytes, with the others of this turn of the loop."""
        self._out += parts
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)
        elif len(self._out) >= _GATHERED:
            self.flush()  # only the transport knows when it is too much

    def flush(self) -> None:
        """Send at once what has gathered."""
        self._flushing = False
        if self._out and not self.transport.is_closing():
            self.transport.write(b"".join(self._out))
        self._out.clear()

    def pause_writing(self) -> None:
        self._writable = self._writable or self._loop.create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def congestion(self) -> asyncio.Future[None] | None:
        """Return what to await while the other side takes nothing more; None while it does."""
        return self._writable
