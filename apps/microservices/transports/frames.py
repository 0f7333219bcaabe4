"""NestJS's TCP frames, and the connection that carries them.

A frame is `<length>#<json>`, the length counted in UTF-16 code units (nest-wire.md section 7).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from typing import cast

from ..exceptions import FrameError, RpcException
from ..packets import Event, Request, Response
from .base import Encode
from .flow import FlowProtocol

FRAMES_PER_TURN = 64

MAX_HEADER = 10
# What nearly all headers say: `int` takes twice as long as a look.
_UNITS = {b"%d" % units: units for units in range(1, 1024)}
_CONTINUATION = bytes(range(0x80, 0xC0))
_ASTRAL = bytes(range(0xF0, 0x100))


def utf16_units(text: bytes) -> int:
    """Return how many UTF-16 code units the UTF-8 text takes: one a character, two beyond U+FFFF."""
    if text.isascii():
        return len(text)
    return 2 * len(text) - len(text.translate(None, _ASTRAL)) - (len(text) - len(text.translate(None, _CONTINUATION)))


class FrameReader:
    """Cuts a stream of bytes into frames, in time linear in the bytes, however they arrive."""

    def __init__(self, max_units: int) -> None:
        self._max_units = max_units
        self._buffer: bytes | bytearray = b""
        self._start = 0  # where the next frame, or the body being read, begins
        self._left = -1  # units of the body still to be found; -1 while the header is not complete
        self._scanned = 0  # the body's bytes up to here are counted

    @property
    def partial(self) -> bool:
        """Whether a frame has begun but not ended."""
        return self._start < len(self._buffer) or self._left >= 0

    def feed(self, data: bytes) -> None:
        """Add what has arrived."""
        if self._start == len(self._buffer) and self._left < 0:
            self._buffer = data
            self._start = 0
            return
        if len(self._buffer) - self._start <= len(data):
            self._buffer = bytes(self._buffer[self._start :]) + data
        else:  # long already: not to be copied with every piece
            if isinstance(self._buffer, bytes):
                self._buffer = bytearray(self._buffer)
            del self._buffer[: self._start]  # moves the front, copies nothing
            self._buffer += data
        self._scanned -= self._start
        self._start = 0

    def cut(self, most: int) -> list[bytes]:
        """Return bodies that are complete, at most so many; none where the next one is not. Raises FrameError."""
        found: list[bytes] = []
        buffer, start = self._buffer, self._start
        if self._left < 0 and isinstance(buffer, bytes):
            # As nearly all are, short, whole and ASCII: bytes and units are the same.
            size, limit = len(buffer), self._max_units
            for _ in range(most):
                mark = buffer.find(b"#", start, start + MAX_HEADER + 1)
                if mark < 0:
                    break
                units = _UNITS.get(buffer[start:mark])
                if units is None:
                    if not (header := buffer[start:mark]).isdigit():
                        break
                    units = int(header)
                end = mark + 1 + units
                if end > size or units > limit:
                    break
                body = buffer[mark + 1 : end]
                if not body.isascii():
                    break
                found.append(body)
                start = end
            self._start = start
        if not found and (any_other := self._next()) is not None:
            found.append(any_other)
        return found

    def _next(self) -> bytes | None:
        if self._left < 0 and not self._read_header():
            return None
        buffer = self._buffer
        while self._left > 0:
            if len(buffer) - self._scanned < self._left:  # a unit is at least one byte
                return None
            piece = bytes(buffer[self._scanned : self._scanned + self._left])
            self._scanned += len(piece)
            self._left -= utf16_units(piece)
        if self._left < 0:
            raise FrameError("The packet length ends inside a character.")
        end = self._end_of_character()
        if end > len(buffer):
            return None
        body = bytes(buffer[self._start : end])
        self._start = end
        self._left = -1
        return body

    def _read_header(self) -> bool:
        start, buffer = self._start, self._buffer
        if start == len(buffer):
            return False
        mark = buffer.find(b"#", start, start + MAX_HEADER + 1)
        header = buffer[start : mark if mark >= 0 else start + MAX_HEADER + 1]
        if mark < 0 and len(header) <= MAX_HEADER and (header.isdigit() or not header):
            return False
        if mark < 0 or not header.isdigit():
            text = ascii(bytes(header).decode("ascii", "replace"))[1:-1]
            raise FrameError(f'Corrupted length value "{text}" supplied in a packet')
        units = int(header)
        if units > self._max_units:
            raise FrameError(f"The packet length ({units}) exceeds the maximum allowed length ({self._max_units})")
        self._start = self._scanned = mark + 1
        self._left = units
        return True

    def _end_of_character(self) -> int:
        """Return where the last counted character ends; its first byte is among the scanned ones."""
        buffer, lead = self._buffer, self._scanned - 1
        if lead < self._start or buffer[lead] < 0x80:
            return self._scanned
        while lead > self._start and 0x80 <= buffer[lead] < 0xC0:
            lead -= 1
        first = buffer[lead]
        width = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1
        return max(self._scanned, lead + width)


class FramedConnection(FlowProtocol):
    """A connection that cuts what is read, gathers what is written, and holds both within bounds."""

    def __init__(self, max_buffer_size: int, max_send_buffer_size: int, encode: Encode) -> None:
        super().__init__()
        self._encode = encode
        self._frames = FrameReader(max_buffer_size)
        self._bodies: Iterator[bytes] = iter(())  # cut, but not taken yet
        self._max_units = max_buffer_size
        self._max_unsent = max_send_buffer_size
        self._out_size = 0
        self.busy = False
        """Whether nothing more should be read for now."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=self._max_unsent)

    def connection_lost(self, error: Exception | None) -> None:
        self._out.clear()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # Reading

    def take(self, body: bytes) -> None:
        """Handle one frame's body."""
        raise NotImplementedError

    def refuse(self, error: Exception) -> None:
        """End a connection whose bytes make no sense."""
        raise NotImplementedError

    def is_busy(self) -> bool:
        """Return what `busy` should be."""
        return self.busy

    def data_received(self, data: bytes) -> None:
        self._frames.feed(data)
        self.pump()

    def pump(self) -> None:
        """Handle the frames that are complete, a bounded number a turn, then write what they gave."""
        if self.transport.is_closing():
            return
        if self.busy:
            self.hold()
            return
        self._flushing = True  # below, when all has been taken
        try:
            left = FRAMES_PER_TURN
            while self._take_cut() and left > 0:
                found = self._frames.cut(left)
                if not found:
                    self.release()
                    return
                left -= len(found)
                self._bodies = iter(found)
            self.hold()
            if not self.busy:
                self._loop.call_soon(self.pump)
        except FrameError as error:
            self.refuse(error)
        finally:
            self.flush()

    def _take_cut(self) -> bool:
        """Handle what is cut; return whether that could be done to the end."""
        for body in self._bodies:
            self.take(body)
            if self.busy:
                return False
        return True

    # Writing

    def put(self, packet: Request | Event | Response) -> Awaitable[None] | None:
        """Put a packet into the next write; gives what to await while the peer takes too little.

        Raises RpcException for a packet that is too large or no JSON.
        """
        body = self._encode(packet)
        size = len(body)
        units = size if body.isascii() else utf16_units(body)
        if units > self._max_units:
            message = f"A packet of {units} UTF-16 units exceeds the limit of {self._max_units}."
            status = 500 if isinstance(packet, Response) else 413  # whose fault it is
            raise RpcException({"statusCode": status, "code": "packet-too-large", "message": message})
        self._out.append(b"%d#%b" % (units, body))
        self._out_size += size
        if self._out_size > self._max_unsent:
            self.flush()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)
        # Shielded, since all that is sent over this connection awaits the same, and one may be given up.
        return None if self._writable is None else asyncio.shield(self._writable)

    def flush(self) -> None:
        """Write all that has gathered, in one call."""
        self._out_size = 0
        super().flush()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.busy = self.is_busy()
        self.pump()
