"""Who may come in: doors that anybody could reach are refused, and patterns may be for some peers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

from . import transports
from .context import RpcContext
from .exceptions import FORBIDDEN, ConfigurationError, RpcException
from .instruments import dropped
from .middleware import Call, Endpoint
from .packets import pattern_name
from .transports import Address

Network = IPv4Network | IPv6Network

LOCAL, BROKER, CERTIFICATE = "local", "broker", "cert:"
_DOORS = ("tcp", "grpc")
_MOST_ROUTES = 1024


def open_to_all(addresses: Iterable[Address]) -> Iterator[str]:
    """Tell of each door that others than this host can reach, and that knows none of them: no TLS."""
    for address in addresses:
        if address.scheme in _DOORS and not _is_loopback(address.host):
            secure = "grpcs" if address.scheme == "grpc" else "tcps"
            yield (
                f"{address} takes calls from other hosts without TLS: anybody there may make them. "
                f"Use {secure}://, bind 127.0.0.1, or set INSECURE_DOORS where the network keeps others out."
            )


def without_password(addresses: Iterable[Address]) -> Iterator[str]:
    """Tell of each broker elsewhere that asks for no password, and no certificate."""
    for address in addresses:
        known = address.username or address.password or address.options.get("certfile")
        if transports.SCHEMES[address.scheme].broker and not known:
            if all(_is_loopback(host) for host, _ in address.hosts):
                continue
            yield (
                f"{address} is used without a password: anybody who reaches it may forge messages. "
                f"Give the URL a user and a password, or set INSECURE_BROKERS where the network keeps others out."
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class Rule:
    """Who may call a pattern: networks, `cert:NAME` for a client's certificate, `broker`; this process always may.

    Raises ConfigurationError for what is none of these.
    """

    def __init__(self, told: Iterable[str]) -> None:
        self._networks: list[Network] = []
        self._names: set[str] = set()
        self._broker = False
        for each in told:
            if each == BROKER:
                self._broker = True
            elif each.startswith(CERTIFICATE):
                self._names.add(each.removeprefix(CERTIFICATE))
            else:
                try:
                    self._networks.append(ip_network(each))
                except ValueError as error:
                    raise ConfigurationError(f"{each!r} is no network, no cert:NAME and not {BROKER!r}.") from error

    def admits(self, context: RpcContext) -> bool:
        """Return whether whoever sent this may."""
        if context.transport == LOCAL:
            return True
        if context.transport not in _DOORS:
            return self._broker
        if self._names and not self._names.isdisjoint(_names(context.native)):
            return True
        if not self._networks:
            return False
        address = _address(context.peer.rpartition(":")[0].strip("[]"))
        return address is not None and any(address in network for network in self._networks)


class Allow:
    """A Middleware of a service: patterns that have a rule are for those alone whom it names; 403 for others.

    `rules` are by the names of patterns.
    """

    def __init__(self, service: str, rules: Mapping[str, Iterable[str]]) -> None:
        self._service = service
        self._rules = {name: Rule(told) for name, told in rules.items()}
        self._found: dict[str, Rule | None] = {}
        """Rules by route. Bounded: behind a wildcard a peer chooses the routes."""

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def allowed(data: Any, context: RpcContext) -> Any:
            self._check(context)
            return await endpoint(data, context)

        return allowed

    def in_place(self, call: Call) -> Call:
        """Stand before inline handlers, too."""

        def allowed(data: Any, context: RpcContext) -> Any:
            self._check(context)
            return call(data, context)

        return allowed

    def _check(self, context: RpcContext) -> None:
        route = context.pattern
        if route in self._found:
            rule = self._found[route]
        else:
            rule = self._rules.get(pattern_name(route))
            if len(self._found) < _MOST_ROUTES:
                self._found[route] = rule
        if rule is not None and not rule.admits(context):
            dropped.add(self._service, "allow", "forbidden")
            raise RpcException({"statusCode": 403, "code": "forbidden", "message": FORBIDDEN})


@lru_cache(1024)
def _address(host: str) -> Any:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _names(native: Any) -> set[str]:
    """Return the names in the certificate that a peer has shown."""
    if hasattr(native, "auth_context"):  # gRPC
        facts = native.auth_context()
        keys = ("x509_common_name", "x509_subject_alternative_name")
        return {name.decode(errors="replace") for key in keys for name in facts.get(key, ())}
    certificate = native.get_extra_info("peercert") if hasattr(native, "get_extra_info") else None
    if not certificate:
        return set()
    subject = {value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"}
    return subject | {value for _, value in certificate.get("subjectAltName", ())}
