"""Processes that are watched, and what several workers can share."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from microservices import ConfigurationError, event_pattern, message_pattern
from microservices.management import memory
from microservices.supervisor import forkserver
from microservices.supervisor import process as processes
from microservices.supervisor.children import Child, Forked, Launcher, _pipe, modules, subprocess
from microservices.supervisor.process import Process, StartFailed, Supervisor
from microservices.supervisor.workers import hold
from microservices.transports import sockets
from tests.toolkit.django.conftest import until

Install = Callable[..., None]

pytestmark = pytest.mark.asyncio


@message_pattern("echo")
async def echo(data: Any) -> Any:
    return data


@event_pattern("item_gone")
async def item_gone(data: Any) -> None:
    pass


class Script(Process):
    """A child that runs a line of Python, or several."""

    def __init__(self, code: str) -> None:
        super().__init__("script")
        self.code_run = code
        self.lines: list[str] = []

    async def launch(self) -> Child:
        return await subprocess([sys.executable, "-c", self.code_run], {}, {}, output=True)

    def show(self, line: str) -> None:
        self.lines.append(line)


async def test_what_dies_at_once_again_and_again_is_started_more_and_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)
        if len(pauses) == 9:
            raise InterruptedError

    monkeypatch.setattr(processes.asyncio, "sleep", note)  # type: ignore[attr-defined]
    script, said = Script("raise SystemExit(3)"), list[str]()
    await script.start()

    with pytest.raises(InterruptedError):
        await script.keep_running(said.append)

    for pause, longest in zip(pauses, (0.5, 1, 2, 4, 8, 16, 30, 30, 30), strict=True):
        assert longest / 2 <= pause <= longest
    assert said[0] == f"script ended with 3; it is started again in {pauses[0]:.1f} s."


async def test_what_lived_long_is_started_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        script.started_at -= 60
        if len(pauses) == 3:
            raise InterruptedError

    monkeypatch.setattr(processes.asyncio, "sleep", note)  # type: ignore[attr-defined]
    script = Script("pass")
    start = script.start

    async def start_long_ago() -> None:
        await start()
        script.started_at -= 60

    monkeypatch.setattr(script, "start", start_long_ago)
    await script.start()

    with pytest.raises(InterruptedError):
        await script.keep_running(lambda _: None)

    assert max(pauses) <= 0.5


async def test_what_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(_: float) -> None:
        if len(said) > 3:
            raise InterruptedError

    async def fail() -> Child:
        raise FileNotFoundError("no such program")

    monkeypatch.setattr(processes.asyncio, "sleep", at_once)  # type: ignore[attr-defined]
    script, said = Script("pass"), list[str]()
    await script.start()
    monkeypatch.setattr(script, "launch", fail)

    with pytest.raises(InterruptedError):
        await script.keep_running(said.append)
    with pytest.raises(StartFailed, match="script could not be started: no such program"):
        await script.start()

    assert said[1] == "script could not be started: no such program"


async def test_a_child_that_does_not_drain_in_time_is_ended() -> None:
    script = Script("import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)")
    await script.start()
    await until(lambda: bool(script.lines))

    assert await script.stop(0.1) == -signal.SIGKILL


async def test_a_child_whose_output_another_holds_open_has_ended_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "LAST_WORDS", 0.01)
    script = Script("")
    child = Forked(pid=0)
    child.stdout = asyncio.StreamReader()
    child.stdout.feed_data(b"its last words\n")  # and no end
    child.ending.set_result(3)

    async def launch() -> Child:
        return child

    monkeypatch.setattr(script, "launch", launch)
    await script.start()

    async with asyncio.timeout(5):
        code = await script.ended()

    assert (code, script.lines) == (3, ["its last words"])


async def test_a_child_that_ends_by_the_signal_has_ended_well() -> None:
    script = Script("import time; time.sleep(60)")
    await script.start()

    assert await script.stop(10) == 0


# Where children come from


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that tells what it was given."""
    path = tmp_path / "tell.py"
    path.write_text(
        "import gc, os, socket, sys, threading\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, os.environ['TOOLKIT'])\n"
        "from microservices.transports import sockets\n"
        "held = sockets.inherited('door')\n"
        "print(__name__, sys.argv[1:], os.environ['TOLD'], os.environ['DJANGO_SETTINGS_MODULE'])\n"
        "print(held.getsockname()[1], sockets.inherited('door'), os.getsid(0) == os.getpid())\n"
        "print('django.db.models' in sys.modules, gc.isenabled(), len(os.listdir('/proc/self/task')))\n"
        "print('warned', file=sys.stderr)\n"
        "sys.exit(7)\n",
        encoding="utf-8",
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("fork", [True, False])
async def test_a_script_gets_all_it_was_given_forked_or_not(script: Path, fork: bool) -> None:
    launcher = Launcher(fork=fork)
    toolkit = str(Path(sockets.__file__).parents[2])
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]

        child = await launcher.start(
            [str(script), "a", "b"], {"TOLD": "yes", "TOOLKIT": toolkit}, {"door": door}, output=True
        )
        assert child.stdout is not None
        said = (await child.stdout.read()).decode()
        code = await child.wait()
    forked = launcher.pid is not None
    await launcher.close()

    assert (code, child.returncode) == (7, 7), said
    assert sorted(said.splitlines()) == sorted(
        [
            f"__main__ ['a', 'b'] yes {os.environ['DJANGO_SETTINGS_MODULE']}",
            f"{port} None True",
            f"{fork} True 1",
            "warned",
        ]
    )
    assert forked is fork


@pytest.mark.slow
async def test_a_child_of_the_fork_server_hears_signals(tmp_path: Path) -> None:
    launcher = Launcher()
    path = tmp_path / "wait.py"
    path.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    child = await launcher.start([str(path)], {}, {}, output=True)
    assert child.stdout is not None
    assert await child.stdout.readline() == b"up\n"

    child.send_signal(signal.SIGTERM)

    assert await child.wait() == -signal.SIGTERM
    child.send_signal(signal.SIGTERM)  # to nobody
    await launcher.close()


@pytest.mark.slow
async def test_where_no_fork_server_comes_up_processes_are_started_without(
    script: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (script.parent / "threads.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n", encoding="utf-8"
    )
    monkeypatch.setattr("microservices.supervisor.children.modules", lambda: ["threads"])
    launcher = Launcher({"PYTHONPATH": str(script.parent)})
    (script.parent / "plain.py").write_text("print('plain')", encoding="utf-8")

    child = await launcher.start([str(script.parent / "plain.py")], {}, {}, output=True)

    assert child.stdout is not None
    assert await child.stdout.read() == b"plain\n"
    assert await child.wait() == 0
    assert launcher.pid is None
    assert "each process imports everything for itself" in caplog.text
    assert "an import has started 1 threads" in capfd.readouterr().err
    await launcher.close()


@pytest.mark.slow
async def test_a_fork_server_whose_supervisor_is_gone_leaves_nobody_behind(tmp_path: Path) -> None:
    path = tmp_path / "wait.py"
    path.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-P", forkserver.__file__, str(theirs.fileno())]
        server = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()])
    ours.send(b"[]")
    assert await asyncio.to_thread(ours.recv, 100)
    said, (write,) = await _pipe()
    request = json.dumps({"argv": [str(path)], "env": {}, "output": True, "sockets": [], "variable": ""}).encode()

    socket.send_fds(ours, [request], [write])
    assert await said.readline() == b"up\n"
    # It goes without a look at what it was told, and what it asked for last is still to be done.
    server.send_signal(signal.SIGSTOP)
    socket.send_fds(ours, [request], [write])
    ours.close()
    os.close(write)
    server.send_signal(signal.SIGCONT)

    async with asyncio.timeout(20):
        await said.read()  # to the end: nobody holds the other end any more
        assert await server.wait() == 0


async def test_where_one_cannot_be_started_the_others_are_not_started_behind_the_owners_back() -> None:
    notes: list[str] = []

    class Failing(Process):
        async def launch(self) -> Child:
            raise OSError("no more")

    class Slow(Process):
        async def launch(self) -> Child:
            try:
                await asyncio.Event().wait()
            finally:
                notes.append("not started")
            raise AssertionError

        async def stop(self, grace: float) -> int:
            notes.append("stopped")
            return await super().stop(grace)

    supervisor = Supervisor([Failing("one"), Slow("other")], 0, notes.append)

    with pytest.raises(StartFailed, match="one could not be started: no more"):
        await supervisor.run()

    assert notes == ["not started", "stopped"]


async def test_no_app_is_preloaded_and_nothing_of_the_project() -> None:
    names = modules()

    assert "django.db.models" in names
    assert [name for name in names if name.partition(".")[0] in ("config", "microservices", "users", "gateway")] == []
    apps = ("django.contrib.admin.", "rest_framework.", "daphne.")
    assert [name for name in names if f"{name}.".startswith(apps)] == []


# What workers can share


@pytest.fixture
def held() -> Iterator[Callable[..., dict[str, socket.socket]]]:
    """Hold what workers share, until the test ends."""
    kept: list[socket.socket] = []

    def held(port: int | None = None) -> dict[str, socket.socket]:
        found = hold("127.0.0.1", port, None)
        kept.extend(found.values())
        return found

    yield held
    for bound in kept:
        bound.close()


Held = Callable[..., dict[str, socket.socket]]


async def test_doors_and_http_are_held_by_name(install: Install, held: Held, free_port: int) -> None:
    install(f"tcp://127.0.0.1:{free_port}", shop=[echo])

    found = held(0)

    assert list(found) == ["http", f"shop tcp://127.0.0.1:{free_port}"]
    with socket.create_connection(("127.0.0.1", free_port), timeout=5):
        pass  # it waits for a worker


async def test_closed_doors_are_not_held(install: Install, held: Held) -> None:
    install(shop=[echo])

    assert held() == {}


async def test_a_taken_door_is_named(install: Install, held: Held, taken_port: int) -> None:
    install(f"tcp://127.0.0.1:{taken_port}", shop=[echo])

    with pytest.raises(
        ConfigurationError, match=f"shop cannot listen on tcp://127.0.0.1:{taken_port}: Address already"
    ):
        held()


async def test_a_door_of_which_no_socket_can_be_held_is_refused(
    install: Install, held: Held, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr("microservices.supervisor.workers.TcpServer", int)  # as for a transport of a project's own
    install(f"tcp://127.0.0.1:{free_port}", shop=[echo])

    with pytest.raises(ConfigurationError, match="cannot have several workers: it opens its own port"):
        held(0)


async def test_a_name_of_several_addresses_is_refused(
    install: Install, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [(family, socket.SOCK_STREAM, 6, "", (ip, 3001)) for family, ip in ((2, "127.0.0.1"), (10, "::1"))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    install("tcp://localhost:3001", shop=[echo])

    with pytest.raises(ConfigurationError, match=r"shop at tcp://localhost:3001 is at 127\.0\.0\.1 and ::1"):
        held()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://127.0.0.1:1", "has no groups"),
        ("nats://127.0.0.1:1?queue=", "without a queue group"),
        ("mqtt://127.0.0.1:1", "without `share`"),
        ("mqtt://127.0.0.1:1?share=a&client_id=b", "with a `client_id`"),
        ("kafka://127.0.0.1:1?alone=1", "with `alone`"),
        ("amqp://127.0.0.1:1?exclusive=1", "an exclusive queue"),
    ],
)
async def test_a_broker_that_would_tell_each_worker_is_refused(
    install: Install, held: Held, url: str, reason: str
) -> None:
    install(url, shop=[echo])

    with pytest.raises(ConfigurationError, match=f"cannot have several workers: .*{reason}"):
        held()


@pytest.mark.parametrize(
    "url", ["nats://127.0.0.1:1", "mqtt://127.0.0.1:1?share=a", "kafka://127.0.0.1:1", "amqp://127.0.0.1:1"]
)
async def test_a_broker_with_groups_needs_nothing_held(install: Install, held: Held, url: str) -> None:
    install(url, shop=[echo])

    assert held() == {}


@pytest.mark.parametrize(
    ("bus", "shared"), [("redis://127.0.0.1:1", False), ("redis-streams://127.0.0.1:1", True), ("memory://", True)]
)
async def test_a_bus_must_give_each_event_to_one_worker(install: Install, held: Held, bus: str, shared: bool) -> None:
    install("kafka://127.0.0.1:1", events_url=bus, shop=[item_gone])

    if shared:
        assert held() == {}
    else:
        with pytest.raises(ConfigurationError, match=r"shop at redis://127\.0\.0\.1:1 cannot have several workers"):
            held()


async def test_an_inherited_socket_is_given_out_once(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", free_port))
        monkeypatch.setenv(sockets.VARIABLE, f'{{"shop tcp://127.0.0.1:0": {os.dup(door.fileno())}}}')

    found = sockets.inherited("shop tcp://127.0.0.1:0")

    assert found is not None
    with found:
        assert found.getsockname()[1] == free_port
        assert not found.get_inheritable()
    assert sockets.inherited("shop tcp://127.0.0.1:0") is None


async def test_memory_of_a_process_is_told_and_of_none_is_not() -> None:
    own = memory.proportional(os.getpid())

    assert own is not None
    assert own > 1
    assert memory.proportional(0) is None
