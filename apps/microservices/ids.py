"""Ids of records: UUIDv7 as text, in the order of their making, and the cursors made of them."""

import secrets
import threading
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from uuid import UUID

_lock = threading.Lock()
# The one piece of state: without it two ids of the same millisecond would be in random order.
_last = 0


def uuid7() -> str:
    """Return a new id (RFC 9562), greater than every earlier one of this process."""
    global _last
    # 48 bits of time, then 74 random ones, the first of them 0 to leave room for counting up.
    now = (time.time_ns() // 1_000_000) << 74 | secrets.randbits(73)
    with _lock:
        _last = value = max(now, _last + 1 + secrets.randbits(32))
    high, low = divmod(value, 1 << 62)
    return str(UUID(int=(high >> 12) << 80 | 0x7 << 76 | (high & 0xFFF) << 64 | 0b10 << 62 | low))


def is_id(text: str) -> bool:
    """Return whether this is the text of a UUID, as `uuid7` writes it."""
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def cursor_after(id: str) -> str:
    """Return an opaque cursor that stands behind this id."""
    return urlsafe_b64encode(UUID(id).bytes).rstrip(b"=").decode()


def id_before(cursor: str) -> str:
    """Return the id that a cursor stands behind. Raises ValueError for a text that is none."""
    return str(UUID(bytes=urlsafe_b64decode(cursor + "==")))
