"""How deep JSON is nested: what may hold anything is read to a bounded depth alone."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw, inspect

MOST = 64
"""How many lists and objects may stand in one another (reliability.md section 8).

msgspec reads some hundreds more, which the code behind it might not bear: it walks them by functions that call
themselves, or writes them again.
"""

SHALLOW = 2 * MOST
"""So many bytes cannot be too deep: each level takes two."""

_ANYTHING = (inspect.AnyType, inspect.RawType, inspect.CustomType)  # of those `object` is one
_AS_LISTS = bytes.maketrans(b"{}", b"[]")
_FILLING = bytes(set(range(256)) - set(b'[]{}"'))
_TOWER = b"[" * (MOST + 1)


def is_beyond(raw: bytes | Raw) -> bool:
    """Return whether JSON is nested deeper than MOST, in time linear in its length; what is no JSON may be either."""
    text = bytes(raw)
    if len(text) <= SHALLOW or text.count(b"[") + text.count(b"{") <= MOST:
        return False
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    # What stands between quotes is text; of the rest the innermost pairs go, level by level.
    text = text.translate(_AS_LISTS, _FILLING).replace(b'""', b"")
    text = b"".join(text.split(b'"')[::2])
    for _ in range(MOST):
        if not text or _TOWER in text:
            break
        text = text.replace(b"[]", b"")
    return bool(text)


def is_unbounded(annotation: Any) -> bool:
    """Return whether what fits a type may be nested as deep as its sender likes."""
    return _nests(inspect.type_info(annotation), ())


def _nests(part: Any, within: tuple[int, ...]) -> bool:
    if isinstance(part, _ANYTHING) or id(part) in within:
        return True
    if isinstance(part, tuple):
        return any(_nests(each, within) for each in part)
    if isinstance(part, inspect.Type | inspect.Field) and isinstance(part, msgspec.Struct):
        return any(_nests(getattr(part, name), (*within, id(part))) for name in part.__struct_fields__)
    return False
