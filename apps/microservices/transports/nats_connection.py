"""How NATS is reached: options, credentials, TLS, one host after another; and what is a subject there."""

from __future__ import annotations

import asyncio
import os
import re

from ..exceptions import ConnectionLost, Unavailable
from . import Address, Count
from .nats_protocol import NatsConnection
from .tls import TlsOptions

_MAX_SUBJECT = 2048  # bytes: NATS ends a connection that sends a longer line than 4096
# What ends a word for NATS or for one of its clients, and half characters.
_BLANK = r" \t\r\n\f\v\ud800-\udfff"
_LITERAL = re.compile(rf"[^.{_BLANK}]+(\.[^.{_BLANK}]+)*")
_SUBJECT = re.compile(rf"((\*|[^.*>{_BLANK}]+)\.)*(\*|>|[^.*>{_BLANK}]+)")


class NatsOptions(TlsOptions, frozen=True, kw_only=True):
    """What any URL may set beside TLS, which one of its files or names asks for."""

    inbox_prefix: str = "_INBOX"
    max_waiting: Count = 10_000
    """How many messages of a route may wait here; more are dropped, and counted."""

    def __post_init__(self) -> None:
        if not is_literal(self.inbox_prefix) or set(self.inbox_prefix) & {"*", ">"}:
            raise ValueError(f"{self.inbox_prefix!r} cannot start the name of an inbox")
        if self.encrypts:
            self.client_context()  # which tells at once what is wrong with the files

    @property
    def encrypts(self) -> bool:
        """Whether TLS is asked for."""
        return bool(self.certfile or self.cafile or self.server_name)

    def inbox(self) -> str:
        """Return a subject that nobody else has."""
        return f"{self.inbox_prefix}.{os.urandom(11).hex()}"


async def open_connection(address: Address, options: NatsOptions, name: str) -> NatsConnection:
    """Connect to the first host that answers. Raises Unavailable, naming NATS and the reason."""
    patience = options.connect_timeout / len(address.hosts)
    failure = ""
    for host, port in address.hosts:
        try:
            async with asyncio.timeout(patience):
                return await _open(address._replace(host=host, port=port), options, name, str(address))
        except TimeoutError:
            failure = f"no connection within {patience:g} s"
        except (ConnectionLost, OSError) as error:
            failure = getattr(error, "strerror", None) or str(error)
    raise Unavailable(f"NATS cannot be reached at {address}: {failure.rstrip('.')}.")


async def _open(address: Address, options: NatsOptions, name: str, where: str) -> NatsConnection:
    user, password = address.username, address.password
    credentials = {"user": user, "pass": password} if password else {"auth_token": user} if user else {}
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: NatsConnection(f"NATS at {where}", options.inbox()), address.host, address.port
    )
    try:
        await connection.greeted
        # Credentials come next: never in the clear where TLS was asked for.
        if options.encrypts and not (connection.info.tls_required or connection.info.tls_available):
            raise ConnectionLost("secure connection not available")
        if options.encrypts or connection.info.tls_required:
            await connection.encrypt(options.client_context(), options.server_name or address.host)
        await connection.introduce(name=name, **credentials)
    except BaseException as error:
        connection.transport.abort()
        if isinstance(error, ConnectionLost) and connection.reason:
            raise ConnectionLost(connection.reason) from error
        raise
    return connection


def is_literal(text: str) -> bool:
    """Return whether a message can be published to it."""
    return bool(_LITERAL.fullmatch(text)) and len(text.encode()) <= _MAX_SUBJECT


def is_subject(text: str) -> bool:
    """Return whether NATS can be subscribed to it: `*` and `>` only as whole words."""
    return bool(_SUBJECT.fullmatch(text)) and is_literal(text)
