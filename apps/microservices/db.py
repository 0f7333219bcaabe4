"""The Django database side: which alias a service uses, connections that are alive, commits that come in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.db.models import Model
from django.dispatch import receiver
from msgspec import Raw

from . import codec
from .client import clients
from .context import RpcContext, beyond_deadline, current
from .exceptions import DeadlineExceeded


class ServiceRouter:
    """Sends each app to the database alias of its own name, and all others to `default`.

    Relations between apps on different aliases are refused, and so are an app's migrations on
    any alias but its own: a service shares no table with another.
    """

    def db_for_read(self, model: type[Model], **hints: Any) -> str:
        """Return the alias to read a model from."""
        return _alias(model._meta.app_label)

    def db_for_write(self, model: type[Model], **hints: Any) -> str:
        """Return the alias to write a model to."""
        return _alias(model._meta.app_label)

    def allow_relation(self, obj1: Model, obj2: Model, **hints: Any) -> bool:
        """Return whether one object may refer to the other."""
        return _alias(obj1._meta.app_label) == _alias(obj2._meta.app_label)

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        """Return whether an app's tables belong on this alias."""
        return db == _alias(app_label)


@contextmanager
def fresh_connections(context: RpcContext) -> Iterator[None]:
    """Let a handler start and leave with database connections that can be used, and commit only in time.

    A unit-of-work hook. No request signals fire in the pool's threads, so without it CONN_MAX_AGE
    and health checks never act, and a connection that broke fails every later message.

    Where the caller has given up before the handler's first commit, that becomes a rollback and raises
    DeadlineExceeded. Later ones are made: what has begun is ended.
    """
    opened = _opened()
    _close_old(opened)
    begun, _thread.begun = getattr(_thread, "begun", False), False  # inside the thread of a caller, there are two
    try:
        yield
    finally:
        _thread.begun = begun
        _close_old(opened)


_thread = threading.local()


def _opened() -> list[BaseDatabaseWrapper]:
    # Django's `close_old_connections` asks for every alias anew, which costs ten times what its checks do.
    opened: list[BaseDatabaseWrapper] | None = getattr(_thread, "opened", None)
    if opened is None:
        opened = _thread.opened = []
        for connection in connections.all(initialized_only=True):
            _own(connection, opened)
    return opened


def _close_old(opened: list[BaseDatabaseWrapper]) -> None:
    for connection in opened:
        connection.close_if_unusable_or_obsolete()


@receiver(connection_created)
def _note(connection: BaseDatabaseWrapper, **_: Any) -> None:
    # Only in threads that run handlers: elsewhere nobody would let go of it again.
    opened = getattr(_thread, "opened", None)
    if opened is not None and connection not in opened:
        _own(connection, opened)


def _own(connection: BaseDatabaseWrapper, opened: list[BaseDatabaseWrapper]) -> None:
    opened.append(connection)
    commit = connection.commit

    def commit_in_time() -> None:
        if not getattr(_thread, "begun", True):
            context = current.get()
            if context is not None and context.expired():
                connection.rollback()
                raise DeadlineExceeded()
            _thread.begun = True
        commit()

    # Django has no hook before a commit; `atomic` calls this one, wherever the handler uses it.
    connection.commit = commit_in_time  # type: ignore[method-assign]


def _alias(app_label: str) -> str:
    return app_label if app_label in connections.settings else DEFAULT_DB_ALIAS


def emit_on_commit(pattern: Any, data: Any, *, using: str) -> None:
    """Hand an event to the bus when the transaction on `using` commits; at once where none is open.

    The data is encoded here, so that what has no JSON form fails the work and not the announcement.
    A bus that is away then is logged: the work is committed, and its caller must not hear otherwise.
    Raises RpcException for data without a JSON form.
    """
    try:
        body = Raw(codec.encode(data))
    except codec.UNENCODABLE as error:
        raise codec.not_json(error) from error

    def announce() -> None:  # a function: Django names what failed by its __qualname__
        with beyond_deadline():
            clients.events.sync.emit(pattern, body)

    transaction.on_commit(announce, using=using, robust=True)
