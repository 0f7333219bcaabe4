"""Over TCP with TLS, NestJS and ourselves understand each other, and strangers are sent away."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from microservices import RpcException, Unavailable
from tests.interop.links import Link
from tests.interop.nest import VERSIONS, Answer, free_port, nest_client, nest_server
from tests.interop.ours import our_client, our_server
from tests.toolkit.transports.certificates import Authority, Pair

LINKS = [Link("tcp", version) for version in VERSIONS]

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
    pytest.mark.usefixtures("node_modules"),
    pytest.mark.parametrize("link", LINKS, ids=str),
]

TEXT = "é😀x" * 20_000  # of several records of TLS


class Certificates:
    """Those of a service and of two callers, of which one is a stranger."""

    def __init__(self, folder: Path) -> None:
        (folder / "elsewhere").mkdir()
        authority, elsewhere = Authority(folder), Authority(folder / "elsewhere")
        self.cafile, self.strange_cafile = authority.cafile, elsewhere.cafile
        self.service, self.friend, self.stranger = (
            authority.issue("service"),
            authority.issue("friend"),
            elsewhere.issue("stranger"),
        )


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """Certificates of two authorities."""
    return Certificates(tmp_path)


def ours(port: int, pair: Pair | None = None, **options: str) -> str:
    """Return an address of ours."""
    told = urlencode({**(pair._asdict() if pair else {}), **options})
    return f"tcps://127.0.0.1:{port}?{told}"


def nests(pair: Pair | None = None, ca: str = "", **options: Any) -> dict[str, Any]:
    """Return NestJS's options, with paths where it wants what is in the files."""
    own = {"cert": pair.certfile, "key": pair.keyfile} if pair else {}
    return {**own, **({"ca": ca} if ca else {}), **options}


class TestNestCallsUs:
    @pytest.mark.case("TLS")
    async def test_nest_calls_us_over_tls(self, link: Link, certificates: Certificates) -> None:
        port = free_port()
        tls = nests(ca=certificates.cafile)
        async with (
            our_server(ours(port, certificates.service)),
            nest_client(f"tcp://127.0.0.1:{port}", version=link.version, tlsOptions=tls) as nest,
        ):
            echoed = await nest.send("echo", {"text": TEXT})
            many = await nest.send_many("echo", 50)

        assert echoed == Answer([{"text": TEXT}])
        assert many == Answer([{"n": n, "text": f"é😀{n}"} for n in range(50)])

    @pytest.mark.case("TLS: a server that is not trusted")
    async def test_nest_does_not_call_us_if_it_does_not_trust_us(self, link: Link, certificates: Certificates) -> None:
        port = free_port()
        tls = nests(ca=certificates.strange_cafile)
        async with (
            our_server(ours(port, certificates.service)),
            nest_client(f"tcp://127.0.0.1:{port}", version=link.version, tlsOptions=tls) as nest,
        ):
            answer = await nest.send("echo", "secret")

        assert (answer.values, answer.error["name"]) == ([], "Error")

    @pytest.mark.case("TLS with client certificates")
    async def test_we_let_nest_in_by_its_certificate_alone(self, link: Link, certificates: Certificates) -> None:
        port = free_port()
        answers = []
        async with our_server(ours(port, certificates.service, cafile=certificates.cafile)):
            for caller in (certificates.friend, certificates.stranger, None):
                tls = nests(caller, ca=certificates.cafile)
                async with nest_client(f"tcp://127.0.0.1:{port}", version=link.version, tlsOptions=tls) as nest:
                    answers.append(await nest.send("echo", "let me in"))

        friend, *others = answers
        assert friend == Answer(["let me in"])
        for stranger in others:
            assert stranger.values == []
            assert stranger.error["name"] == "Error"  # at once, not after a time-out


class TestWeCallNest:
    @pytest.mark.case("TLS")
    async def test_we_call_nest_over_tls(self, link: Link, certificates: Certificates) -> None:
        port = free_port()
        tls = nests(certificates.service)
        async with (
            nest_server(f"tcp://127.0.0.1:{port}", version=link.version, tlsOptions=tls),
            our_client(ours(port, cafile=certificates.cafile)) as client,
        ):
            echoed = await client.send("echo", {"text": TEXT})
            streamed = [value async for value in client.stream("stream", {"count": 50})]

        assert echoed == {"text": TEXT}
        assert streamed == list(range(50))

    @pytest.mark.case("TLS: a server that is not trusted")
    async def test_we_do_not_call_nest_if_we_do_not_trust_it(self, link: Link, certificates: Certificates) -> None:
        port = free_port()
        tls = nests(certificates.service)
        async with (
            nest_server(f"tcp://127.0.0.1:{port}", version=link.version, tlsOptions=tls),
            our_client(ours(port, cafile=certificates.strange_cafile)) as client,
            our_client(ours(port, cafile=certificates.cafile, server_name="another")) as misled,
        ):
            for caller in (client, misled):
                with pytest.raises(Unavailable, match="certificate verify failed"):
                    await caller.send("echo", "secret")

    @pytest.mark.case("TLS with client certificates")
    async def test_nest_lets_us_in_by_our_certificate_alone(self, link: Link, certificates: Certificates) -> None:
        port = free_port()
        tls = nests(certificates.service, ca=certificates.cafile, requestCert=True, rejectUnauthorized=True)
        trust = {"cafile": certificates.cafile}
        async with nest_server(f"tcp://127.0.0.1:{port}", version=link.version, tlsOptions=tls):
            async with our_client(ours(port, certificates.friend, **trust)) as client:
                answer = await client.send("echo", "let me in")
            for stranger in (certificates.stranger, None):
                async with our_client(ours(port, stranger, **trust)) as client:
                    with pytest.raises(RpcException) as caught:
                        await client.send("echo", "let me in", timeout=5)
                assert caught.value.status_code == 503  # not 504: at once

        assert answer == "let me in"
