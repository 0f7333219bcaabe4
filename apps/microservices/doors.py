"""Who may come in: doors that anybody could reach are refused, and patterns may be for some peers alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from . import conf, transports
from .context import RpcContext
from .exceptions import FORBIDDEN, ConfigurationError, RpcException
from .handlers import Door, Handler
from .instruments import dropped
from .middleware import Call, Endpoint
from .packets import pattern_name
from .transports import Address

Network = IPv4Network | IPv6Network

LOCAL, BROKER, CERTIFICATE = "local", "broker", "cert:"
_DOORS = ("tcp", "grpc")
_GUESTS = {("guest", "guest")}
"""Names and passwords that everybody knows: a RabbitMQ's own, which it takes from its host alone unless told."""


# Addresses


def refuse_insecure(urls: Iterable[str]) -> None:
    """Raise ConfigurationError for what the system checks E010 and E012 tell of, which can be skipped.

    `urls` are the doors that are about to open.
    """
    settings = conf.get_settings()
    if conf.debug():
        return
    if not settings.insecure_doors:
        for text in open_to_all(map(transports.parse, urls)):
            raise ConfigurationError(text)
    if not settings.insecure_brokers:
        for text in without_password(conf.brokers()):
            raise ConfigurationError(text)


def open_to_all(addresses: Iterable[Address]) -> Iterator[str]:
    """Tell of each door that others than this host can reach, and that knows none of them: no TLS."""
    for address in addresses:
        if address.scheme in _DOORS and not _is_loopback(address.host):
            yield (
                f"{address} takes calls from other hosts without TLS: anybody there may make them. "
                f"Use {address.scheme}s://, bind 127.0.0.1, or set INSECURE_DOORS where the network keeps others out."
            )


def without_password(addresses: Iterable[Address]) -> Iterator[str]:
    """Tell of each broker elsewhere that asks for no password, and no certificate."""
    for address in addresses:
        if not _is_known(address) and not all(_is_loopback(host) for host, _ in address.hosts):
            yield (
                f"{address} is used without a password: anybody who reaches it may forge messages. "
                f"Give the URL a user and a password, or set INSECURE_BROKERS where the network keeps others out."
            )


def _is_known(address: Address) -> bool:
    if address.options.get("certfile"):
        return True
    if address.scheme == "nats" and address.username:
        return True  # alone it is a token
    return bool(address.password) and (address.username, address.password) not in _GUESTS


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


# Peers


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
            elif each.startswith(CERTIFICATE) and each != CERTIFICATE:
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

    `rules` are by the names of patterns. A rule goes for the other doors of its handler, too, unless they have
    their own: else a gRPC method would lead around it. Raises ConfigurationError for a rule that nobody could have
    meant.
    """

    def __init__(self, service: str, rules: Mapping[str, Sequence[str]], handlers: Iterable[Handler]) -> None:
        for text in mistakes(rules, handlers):
            raise ConfigurationError(f"{service}: {text}")
        self._service = service
        self._rules = rules

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        return endpoint

    def at(self, handler: Handler, door: Door) -> Guard | None:
        """Return what stands before a door; None where everybody may pass."""
        own = self._rules.get(pattern_name(door.route))
        if own is None:
            others = [self._rules[name] for each in handler.doors if (name := pattern_name(each.route)) in self._rules]
            if not others:
                return None
            own = [each for told in others for each in told]
        return Guard(self._service, Rule(own))


class Guard:
    """A Middleware before one door: lets those in whom a rule admits."""

    def __init__(self, service: str, rule: Rule) -> None:
        self._service = service
        self._admits = rule.admits

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def allowed(data: Any, context: RpcContext) -> Any:
            if not self._admits(context):
                self._refuse()
            return await endpoint(data, context)

        return allowed

    def in_place(self, call: Call) -> Call:
        """Stand before inline handlers, too."""

        def allowed(data: Any, context: RpcContext) -> Any:
            if not self._admits(context):
                self._refuse()
            return call(data, context)

        return allowed

    def _refuse(self) -> None:
        dropped.add(self._service, "allow", "forbidden")
        raise RpcException({"statusCode": 403, "code": "forbidden", "message": FORBIDDEN})


def mistakes(rules: Mapping[str, Sequence[str]], handlers: Iterable[Handler]) -> Iterator[str]:
    """Tell of each rule about no pattern of these handlers, and of each that cannot be read."""
    known = {pattern_name(door.route) for handler in handlers for door in handler.doors}
    for pattern, told in rules.items():
        if pattern not in known:
            near = difflib.get_close_matches(pattern, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known)) or 'none'}."
            yield f"allow[{pattern!r}]: there is no such pattern; {hint}"
        try:
            Rule(told)
        except ConfigurationError as error:
            yield f"allow[{pattern!r}]: {error}"


@lru_cache(1024)
def _address(host: str) -> IPv4Address | IPv6Address | None:
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
