"""What can be measured, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

from . import brokers, gateway, grpc_calls, orm, policies, shapes, starting, tcp
from .measure import Case

Workload = Callable[[ExitStack], Iterator[Case]]
"""Starts processes that end with the stack, and yields its cases one after the other."""

WORKLOADS: Mapping[str, Workload] = {
    "tcp": tcp.server,
    "tcp-client": tcp.client,
    "tcp-events": tcp.events,
    **brokers.WORKLOADS,
    "grpc": grpc_calls.unary,
    "orm": orm.one_row,
    "policies": policies.closed_path,
    "gateway": gateway.users,
    "shapes": shapes.journeys,
    "start": starting.starts,
}
