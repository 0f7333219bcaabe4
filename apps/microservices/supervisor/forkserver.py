"""A process that has imported what is not the project's own, and forks whenever it is asked to.

It runs as a script, by its path: nothing of the toolkit, no settings and no connection are in what its
children begin with. One thread waits for requests and for the ends of children; it knows no event loop.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

LARGEST, MOST_DESCRIPTORS = 256 * 1024, 250
NEVER = ("twisted.internet.reactor",)  # to import it is to make an event loop


def preload(names: list[str]) -> None:
    """Import what can be imported without settings. Raises RuntimeError for what must not be forked."""
    before = _open_descriptors()
    blocked = dict.fromkeys(NEVER)
    sys.modules.update(blocked)  # type: ignore[arg-type]  # None is how an import is refused
    for name in names:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001, S112 - the children import it, with the settings that it needs
                continue
    for name in blocked:
        del sys.modules[name]
    threads = len(os.listdir("/proc/self/task"))
    opened = len(_open_descriptors() - before)
    if threads > 1 or opened:
        raise RuntimeError(f"an import has started {threads - 1} threads and opened {opened} descriptors")


def serve(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork as often as asked; returns in each child, with its request and the descriptors that came with it."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    children: dict[int, int] = {}  # pids by what tells of their end
    while True:
        for ready, _ in poll.poll():
            if ready in children:
                pid = children.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                _tell(channel, ended=pid, code=code)
                continue
            try:
                message, descriptors, *_ = socket.recv_fds(channel, LARGEST, MOST_DESCRIPTORS)
            except ConnectionResetError:  # it has gone without reading all that it was told
                message = b""
            if not message:  # nobody is left to watch them: they drain
                for pid in children.values():
                    os.kill(pid, signal.SIGTERM)
                sys.exit()
            try:
                pid = os.fork()
            except OSError as error:
                _tell(channel, failed=str(error))
                pid = -1
            if pid == 0:
                for descriptor in children:
                    os.close(descriptor)
                return json.loads(message), descriptors
            for descriptor in descriptors:
                os.close(descriptor)
            if pid > 0:
                _tell(channel, started=pid)
                watched = os.pidfd_open(pid)
                children[watched] = pid
                poll.register(watched, select.POLLIN)


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Be the process that was asked for: its session, its output, its environment, its command."""
    os.setsid()  # a Ctrl-C in the terminal is for the supervisor alone
    if request["output"]:
        output = descriptors.pop(0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    os.environ.update(request["env"])
    if request["sockets"]:
        os.environ[request["variable"]] = json.dumps(dict(zip(request["sockets"], descriptors, strict=True)))
    sys.argv[:] = request["argv"]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    gc.enable()
    runpy.run_path(sys.argv[0], run_name="__main__")


def _tell(channel: socket.socket, **facts: Any) -> None:
    with suppress(OSError):  # the supervisor is gone: the next look at the channel says so, and what then
        channel.send(json.dumps(facts).encode())


def _open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def main(descriptor: int) -> None:
    """Preload, then serve a supervisor until it closes its end."""
    channel = socket.socket(fileno=descriptor)
    gc.disable()  # a collection in a child would write to, and so copy, all that it shares
    try:
        os.close(os.pidfd_open(os.getpid()))  # not every kernel, and not every sandbox has it
        preload(json.loads(channel.recv(LARGEST)))
    except (OSError, RuntimeError) as error:
        sys.exit(f"fork server: {error}")
    gc.freeze()
    _tell(channel, ready=len(sys.modules))
    request, descriptors = serve(channel)
    channel.close()
    become(request, descriptors)


if __name__ == "__main__":
    main(int(sys.argv[1]))
