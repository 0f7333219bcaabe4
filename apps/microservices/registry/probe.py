"""Asks an instance itself whether it is there."""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from ..transports import SCHEMES

LIMIT = 2.0
AT_ONCE = 50
_LONGEST_LINE = 4096
# Whoever reads further than the status would be led elsewhere: a redirect is an answer like any other.
_REQUEST = b"GET /readyz HTTP/1.1\r\nHost: %s\r\nUser-Agent: registry\r\nAccept: */*\r\nConnection: close\r\n\r\n"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Outcome(NamedTuple):
    """Whether an instance answered as one that is well, and what it said."""

    passed: bool
    text: str


def networks(texts: Iterable[str]) -> list[Network]:
    """Read CIDRs. Raises ValueError for what is none."""
    return [ipaddress.ip_network(text) for text in texts]


async def probe(addresses: Mapping[str, str], allowed: Sequence[Network], *, limit: float = LIMIT) -> Outcome:
    """Ask the health page among these addresses, or else see whether a door of them opens."""
    page = addresses.get("health") or addresses.get("http") or ""
    doors = (url for scheme, url in addresses.items() if scheme in SCHEMES and not SCHEMES[scheme].broker)
    url = page if page.startswith("http://") else next(doors, "")
    if not url:
        return Outcome(False, "it has no address that could be asked")
    began = time.monotonic()
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if not host or not port:
            return Outcome(False, f"{url} names no host and port")
        async with asyncio.timeout(limit):
            ip = await _resolved(host, port, allowed)
            if ip is None:
                return Outcome(False, f"{host} lies outside of PROBE_NETWORKS: not asked")
            reader, writer = await asyncio.open_connection(ip, port, limit=_LONGEST_LINE)
            try:
                if url != page:
                    return Outcome(True, f"{url} opened in {_ms(began)}")
                writer.write(_REQUEST % parts.netloc.encode("ascii", "replace"))
                return _judged(await reader.readline(), began)
            finally:
                writer.close()
    except TimeoutError:
        return Outcome(False, f"{url}: no answer within {limit:g} s")
    except (OSError, ValueError) as error:  # nobody there, no name, no URL, no end of a line
        reason = getattr(error, "strerror", None) or error
        return Outcome(False, f"{url}: {reason}")


async def probe_all(
    instances: Iterable[Mapping[str, str]], allowed: Sequence[Network], *, limit: float = LIMIT
) -> list[Outcome]:
    """Ask several at the same time, given the addresses of each."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(addresses: Mapping[str, str]) -> Outcome:
        async with room:
            return await probe(addresses, allowed, limit=limit)

    return await asyncio.gather(*(one(addresses) for addresses in instances))


async def _resolved(host: str, port: int, allowed: Sequence[Network]) -> str | None:
    # Once, and then by number: a name may lead elsewhere the second time.
    loop = asyncio.get_running_loop()
    for *_, place in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        ip = ipaddress.ip_address(str(place[0]).partition("%")[0])
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        if any((mapped or ip) in network for network in allowed):
            return str(mapped or ip)
    return None


def _judged(line: bytes, began: float) -> Outcome:
    version, _, rest = line.partition(b" ")
    status = rest[:3]
    if not version.startswith(b"HTTP/") or not status.isdigit():
        return Outcome(False, "its health page speaks no HTTP")
    return Outcome(status == b"200", f"/readyz {status.decode()} in {_ms(began)}")


def _ms(began: float) -> str:
    return f"{(time.monotonic() - began) * 1000:.0f} ms"
