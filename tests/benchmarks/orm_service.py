"""A service that reads a row by Django's ORM: `orm_service.py '{"url": URL, "database": PATH}'`."""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path

import django
import msgspec
from django.conf import settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps"))


class Facts(msgspec.Struct):
    """What the command line says."""

    url: str
    database: str


class Key(msgspec.Struct):
    """Which user."""

    id: int


class Found(msgspec.Struct):
    """What is told of one."""

    id: int
    name: str
    email: str


async def main(facts: Facts) -> None:
    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": facts.database, "CONN_MAX_AGE": None}},
        INSTALLED_APPS=[],
    )
    django.setup()
    from django.db import models

    from microservices import transports
    from microservices.db import fresh_connections
    from microservices.dispatcher import Dispatcher
    from microservices.exceptions import RpcException
    from microservices.executor import Executor
    from microservices.handlers import Handler, message_pattern

    class User(models.Model):
        """The table that NestJS's side has written."""

        id = models.IntegerField(primary_key=True)
        name = models.TextField()
        email = models.TextField()

        class Meta:
            app_label = "bench"
            db_table = "users"
            managed = False

        def __str__(self) -> str:
            return self.name

    @message_pattern("user")
    def user(data: Key) -> Found:
        try:
            row = User.objects.get(id=data.id)
        except User.DoesNotExist as error:
            told = {"statusCode": 404, "code": "user-not-found", "message": "There is no such user."}
            raise RpcException(told) from error
        return Found(row.id, row.name, row.email)

    user.__annotations__ = {"data": Key, "return": Found}
    address = transports.parse(facts.url)
    dispatcher = Dispatcher("bench", [Handler(user)], Executor(units_of_work=[fresh_connections]))
    server = transports.load(address, "server")(address, dispatcher)
    await server.listen()
    gc.freeze()
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.close(1)


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(msgspec.json.decode(sys.argv[1], type=Facts)))
