"""Looks after the silent, each second, for as long as the process is ready."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

from django.utils import timezone

from ..conf import get_settings
from ..context import RpcContext
from ..microservice import get_executor
from . import services
from .models import Instance
from .probe import Outcome, networks, probe_all

EACH = 1.0
TRIM_EACH = timedelta(hours=1)
PATIENCE = 10.0

T = TypeVar("T")


async def sweep(pause: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Suspect, probe, end and forget the instances that are silent, until cancelled."""
    allowed = networks(get_settings().probe_networks)
    began = timezone.now()
    trimmed: datetime | None = None
    while True:
        now = timezone.now()
        suspects = await _on_a_thread(partial(services.instances_swept, now=now, listening_since=began))
        if suspects:
            outcomes = await probe_all([instance.addresses for instance in suspects], allowed)
            await _on_a_thread(partial(_note, list(zip(suspects, outcomes, strict=True))))
        if trimmed is None or now - trimmed >= TRIM_EACH:
            await _on_a_thread(partial(services.journal_trimmed, now=now))
            trimmed = now
        await pause(EACH)


def _note(outcomes: list[tuple[Instance, Outcome]]) -> None:
    for instance, outcome in outcomes:
        services.instance_probed(instance=instance, passed=outcome.passed, text=outcome.text)


async def _on_a_thread(work: Callable[[], T]) -> T:
    context = RpcContext(service="registry", pattern="sweep", transport="local", side="server")
    context.cap_deadline(PATIENCE)
    return await get_executor().run(work, context)
