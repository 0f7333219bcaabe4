"""The socket of the embedded HTTP server."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace

import pytest
from pytest_django import Settings

from microservices import ConfigurationError, serving
from microservices.serving import HttpServer, bind


def test_a_free_port_is_bound_and_not_inherited(free_port: int) -> None:
    with bind("127.0.0.1", free_port) as bound:
        place, inherited = bound.getsockname(), bound.get_inheritable()

    assert place == ("127.0.0.1", free_port)
    assert not inherited


def test_port_0_takes_any() -> None:
    with bind("127.0.0.1", 0) as bound:
        assert bound.getsockname()[1] > 0


def test_a_port_is_free_again_as_soon_as_it_is_left(free_port: int) -> None:
    for _ in range(2):
        with bind("127.0.0.1", free_port) as bound:
            bound.listen()
            with socket.create_connection(("127.0.0.1", free_port)):
                bound.accept()[0].close()  # leaves the port in TIME_WAIT


def test_a_taken_port_is_named(taken_port: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        bind("127.0.0.1", taken_port)

    assert str(caught.value) == f"HTTP cannot listen on 127.0.0.1:{taken_port}: Address already in use"


def test_a_host_that_is_not_of_this_machine_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"HTTP cannot listen on 192\.0\.2\.1:0: "):
        bind("192.0.2.1", 0)


def test_the_server_leaves_signals_and_lifespan_to_the_process_that_owns_it() -> None:
    server = HttpServer(None)

    with server.capture_signals() as captured:
        server.finish(2.5)

    assert captured is None
    assert server.should_exit
    assert server.config.lifespan == "off"


def test_uvloop_is_taken_where_it_is_installed_and_missed_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert serving._loop_factory() is None

    monkeypatch.setitem(sys.modules, "uvloop", SimpleNamespace(new_event_loop="its own"))
    assert serving._loop_factory() == "its own"


@pytest.mark.parametrize(("channels", "expected"), [(True, "websockets-sansio"), (False, "none")])
def test_websockets_are_served_where_channels_is_installed(settings: Settings, channels: bool, expected: str) -> None:
    settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if channels or app != "channels"]

    config = HttpServer(None).config

    assert config.ws == expected
    assert config.ws_max_size == 4096
