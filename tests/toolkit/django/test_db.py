"""Which database a model is on, and in what state a handler finds its connections."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User as Operator
from django.db import connections, router
from django.db.backends.signals import connection_created
from django.db.transaction import atomic, on_commit

from microservices import RpcContext, RpcException, message_pattern
from microservices.client import Client
from microservices.context import beyond_deadline
from microservices.db import ServiceRouter, fresh_connections
from microservices.dispatcher import Dispatcher
from microservices.executor import Executor
from microservices.handlers import Handler
from microservices.transports import Address, parse
from microservices.transports.tcp import TcpClient, TcpServer
from users.models import User

Scratch = Callable[..., str]

CONTEXT = RpcContext(service="shop", pattern="ask", transport="test", side="server")


# Routes


def test_a_services_models_are_on_its_own_database_and_all_others_on_default() -> None:
    assert [router.db_for_read(model) for model in (User, Operator)] == ["users", "default"]
    assert [router.db_for_write(model) for model in (User, Operator)] == ["users", "default"]


def test_models_of_one_database_may_relate_and_those_of_two_may_not() -> None:
    rules = ServiceRouter()

    assert rules.allow_relation(User(), User())
    assert rules.allow_relation(LogEntry(), Operator())
    assert not rules.allow_relation(User(), Operator())
    assert not rules.allow_relation(Operator(), User())


@pytest.mark.parametrize(
    ("alias", "app", "allowed"),
    [
        ("users", "users", True),
        ("default", "users", False),
        ("users", "auth", False),
        ("default", "auth", True),
        ("default", "app_without_models", True),
    ],
)
def test_tables_are_made_on_their_own_database_alone(alias: str, app: str, allowed: bool) -> None:
    assert ServiceRouter().allow_migrate(alias, app) is allowed


@pytest.mark.django_db(databases=["default", "users"])
@pytest.mark.parametrize(("alias", "table"), [("default", "auth_user"), ("users", "users_user")])
def test_a_migrated_database_holds_its_own_tables_alone(alias: str, table: str) -> None:
    tables = connections[alias].introspection.table_names()

    assert {"auth_user", "users_user"} & set(tables) == {table}


# Connections


@pytest.fixture
def connection(scratch: Scratch) -> Iterator[Any]:
    """An open connection of this thread."""
    connection = connections[scratch()]
    connection.ensure_connection()
    return connection


def too_old(connection: Any) -> None:
    """Make a connection one that CONN_MAX_AGE would end."""
    connection.close_at = 0


def test_an_old_connection_is_closed_before_a_handler_runs(connection: Any) -> None:
    too_old(connection)

    with fresh_connections(CONTEXT):
        closed = connection.connection is None

    assert closed


def test_a_connection_that_grew_old_under_a_handler_is_closed_after_it(connection: Any) -> None:
    with fresh_connections(CONTEXT):
        before = connection.connection
        too_old(connection)

    assert before is not None
    assert connection.connection is None


def test_an_old_connection_is_closed_also_after_a_handler_that_failed(connection: Any) -> None:
    def fail() -> None:
        with fresh_connections(CONTEXT):
            too_old(connection)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()

    assert connection.connection is None


def test_a_connection_that_may_live_on_is_kept(connection: Any) -> None:
    before = connection.connection

    with fresh_connections(CONTEXT):
        during = connection.connection

    assert before is during is connection.connection
    assert before is not None


def test_an_old_connection_inside_a_transaction_is_left_alone(connection: Any) -> None:
    with atomic(using=connection.alias):
        too_old(connection)
        with fresh_connections(CONTEXT):
            during = connection.connection
        after = connection.connection

    assert during is after is not None


@pytest.mark.parametrize("opened", ["before the first message", "in a message"])
def test_a_new_threads_connections_are_looked_after(scratch: Scratch, opened: str) -> None:
    alias = scratch()

    def work() -> tuple[bool, bool]:
        connection = connections[alias]
        if opened == "before the first message":
            connection.ensure_connection()
        with fresh_connections(CONTEXT):
            connection.ensure_connection()
            before = connection.connection is not None
            too_old(connection)
        return before, connection.connection is None

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(work).result(10) == (True, True)


def test_a_connection_of_a_thread_that_runs_no_handlers_is_not_kept(scratch: Scratch) -> None:
    alias = scratch()

    def work() -> ReferenceType[Any]:
        connections[alias].ensure_connection()
        connections[alias].close()
        mine = ref(connections[alias])
        del connections[alias]
        gc.collect()
        return mine

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(work).result(10)() is None


@pytest.mark.parametrize(("seconds", "messages", "expected"), [(600, 10_000, 4), (0, 500, 500)])
def test_messages_share_the_connections_of_the_pools_threads(
    scratch: Scratch, seconds: int, messages: int, expected: int
) -> None:
    alias = scratch(CONN_MAX_AGE=seconds)
    with connections[alias].schema_editor() as editor:
        editor.create_model(User)
    together = threading.Barrier(4, timeout=10)
    opened: list[Any] = []

    @message_pattern("count")
    def count(data: int) -> int:
        if data < 4:
            together.wait()  # so that each thread of the pool has had a message
        return User.objects.using(alias).count()

    def note(connection: Any, **_: Any) -> None:
        opened.append(connection)

    executor = Executor(4, units_of_work=[fresh_connections])

    async def ask() -> list[int]:
        server = TcpServer(Address("tcp", "127.0.0.1", 0, {}), Dispatcher("shop", [Handler(count)], executor))
        await server.listen()
        client = Client("shop", lambda: TcpClient(parse(f"tcp://127.0.0.1:{server.port}"), "shop"))
        numbers = iter(range(messages))

        async def some() -> list[int]:
            return [await client.send("count", number) for number in numbers]

        try:
            async with asyncio.timeout(60):
                return [answer for answers in await asyncio.gather(*(some() for _ in range(64))) for answer in answers]
        finally:
            await client.close()
            await server.close(0)

    connection_created.connect(note)
    try:
        answers = asyncio.run(ask())
    finally:
        connection_created.disconnect(note)
        executor.close()
        for connection in opened:
            connection.inc_thread_sharing()
            connection.close()

    assert answers == [0] * messages
    assert len(opened) == expected


# Commits


@pytest.fixture
def notes(connection: Any) -> Callable[[], list[str]]:
    """A table `note`, and what has been committed to it."""
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE note (text varchar(20))")

    def notes() -> list[str]:
        with connection.cursor() as cursor:
            return [text for (text,) in cursor.execute("SELECT text FROM note")]

    return notes


def write(alias: str, text: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute("INSERT INTO note VALUES (%s)", [text])


def in_pool(*works: Callable[[RpcContext], Any]) -> list[Any]:
    """Run work as `def` handlers are run, on one thread, each with a minute to its deadline; return what came of it."""

    async def run() -> list[Any]:
        executor = Executor(1, units_of_work=[fresh_connections])
        outcomes: list[Any] = []
        for work in works:
            context = copy(CONTEXT)
            context.cap_deadline(60)
            try:
                outcomes.append(await executor.run(partial(work, context), context))
            except RpcException as error:
                outcomes.append(error.code)
        await executor.run(connections.close_all, CONTEXT)
        executor.close()
        return outcomes

    return asyncio.run(run())


def test_a_handler_whose_caller_has_given_up_commits_nothing(connection: Any, notes: Callable[[], list[str]]) -> None:
    announced = []

    def late(context: RpcContext) -> None:
        with atomic(using=connection.alias):
            write(connection.alias, "late")
            on_commit(lambda: announced.append("late"), using=connection.alias)
            context.cap_deadline(0)

    outcomes = in_pool(late)

    assert outcomes == ["deadline-exceeded"]
    assert (notes(), announced) == ([], [])


def test_a_handler_that_has_committed_something_in_time_goes_on_to_its_end(
    connection: Any, notes: Callable[[], list[str]]
) -> None:
    def pay(context: RpcContext) -> None:
        with atomic(using=connection.alias):
            write(connection.alias, "intent")
        context.cap_deadline(0)
        with atomic(using=connection.alias):
            write(connection.alias, "outcome")

    in_pool(pay)

    assert notes() == ["intent", "outcome"]


def test_what_is_done_beyond_the_deadline_is_committed(connection: Any, notes: Callable[[], list[str]]) -> None:
    def refund(context: RpcContext) -> None:
        context.cap_deadline(0)
        with beyond_deadline(), atomic(using=connection.alias):
            write(connection.alias, "refund")

    in_pool(refund)

    assert notes() == ["refund"]


def test_a_connection_goes_on_after_a_commit_that_came_too_late(
    connection: Any, notes: Callable[[], list[str]]
) -> None:
    def note(text: str, context: RpcContext) -> None:
        with atomic(using=connection.alias):
            write(connection.alias, text)
            if text == "late":
                context.cap_deadline(0)

    in_pool(*(partial(note, text) for text in ("first", "late", "second")))

    assert notes() == ["first", "second"]
