"""DRF serializers as payloads: a handler's annotation, or what it returns."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from .codec import Decoder, PayloadKind
from .exceptions import InvalidPayload

_BASE = ("rest_framework.serializers", "BaseSerializer")


class SerializerPayload(PayloadKind):
    """A handler annotated with a serializer class is given one whose data has been found valid.

    What is not valid never reaches the handler: InvalidPayload names each field. A serializer that a handler
    returns travels as its `data`.
    """

    # Validators may ask the database.
    blocking = True

    def accepts(self, annotation: Any) -> bool:
        # By name, so that a process without serializers never imports DRF.
        bases = getattr(annotation, "__mro__", ())
        return any((base.__module__, base.__qualname__) == _BASE for base in bases)

    def decoder(self, annotation: Any) -> Decoder:
        from rest_framework.exceptions import ValidationError

        from .rest import error_fields

        def decode(raw: bytes | Raw) -> Any:
            try:
                serializer = annotation(data=msgspec.json.decode(raw))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InvalidPayload("The payload is not JSON.") from error
            try:
                serializer.is_valid(raise_exception=True)
            except ValidationError as error:
                fields = error_fields(error)
                raise InvalidPayload(fields[0]["message"], errors=fields) from error
            return serializer

        return decode

    def encode(self, value: Any) -> Any:
        return value.data
