"""Microservices for Django with NestJS's programming model, wire-equal with NestJS itself."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import clients
    from .consumers import EventConsumer, EventRouter
    from .context import RpcContext
    from .discovery.balancer import Balancer
    from .discovery.instances import Location
    from .exceptions import (
        ConfigurationError,
        ConnectionLost,
        DeadlineExceeded,
        InvalidPayload,
        MicroserviceError,
        NoHandler,
        RpcException,
        Unavailable,
    )
    from .handlers import event_pattern, grpc_method, message_pattern
    from .hybrid import HybridApplication
    from .middleware import Endpoint, Middleware
    from .resilience.circuit_breaker import CircuitBreaker

# Handed out on first use, so that the floors below the settings can be imported without Django.
_HOMES = {
    "Balancer": "discovery.balancer",
    "CircuitBreaker": "resilience.circuit_breaker",
    "ConfigurationError": "exceptions",
    "ConnectionLost": "exceptions",
    "DeadlineExceeded": "exceptions",
    "Endpoint": "middleware",
    "EventConsumer": "consumers",
    "EventRouter": "consumers",
    "HybridApplication": "hybrid",
    "InvalidPayload": "exceptions",
    "Location": "discovery.instances",
    "Middleware": "middleware",
    "MicroserviceError": "exceptions",
    "NoHandler": "exceptions",
    "RpcContext": "context",
    "RpcException": "exceptions",
    "Unavailable": "exceptions",
    "clients": "client",
    "event_pattern": "handlers",
    "grpc_method": "handlers",
    "message_pattern": "handlers",
}

__all__ = [
    "Balancer",
    "CircuitBreaker",
    "ConfigurationError",
    "ConnectionLost",
    "DeadlineExceeded",
    "Endpoint",
    "EventConsumer",
    "EventRouter",
    "HybridApplication",
    "InvalidPayload",
    "Location",
    "MicroserviceError",
    "Middleware",
    "NoHandler",
    "RpcContext",
    "RpcException",
    "Unavailable",
    "clients",
    "event_pattern",
    "grpc_method",
    "message_pattern",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
