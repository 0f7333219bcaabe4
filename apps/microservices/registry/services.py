"""What changes the list of the fleet.

Several processes may hear the same report and sweep the same table: a change of state is an UPDATE
that names the state before it, and only the process whose UPDATE counts writes the journal.
"""

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from django.db import router, transaction
from django.utils import timezone

from ..discovery.registry import PatternReport, Report
from .models import Instance, JournalEntry, Pattern, Service, State

SUSPECT_AFTER = timedelta(seconds=8)
DOWN_AFTER = timedelta(seconds=15)
EVICT_AFTER = timedelta(seconds=60)
PROBE_AGAIN_AFTER = timedelta(seconds=2)
JOURNAL_DAYS = timedelta(days=30)
ATTEMPTS = 3


def instance_reported(*, report: Report) -> None:
    """Note what an instance tells of itself; a report that comes late changes nothing."""
    now = timezone.now()
    digest = _digest(report)
    # The usual beat: nothing new but that it came.
    if report.state != "down" and Instance.objects.filter(
        service__name=report.service,
        name=report.instance,
        start=report.start,
        sequence__lt=report.sequence,
        state=report.state,
        digest=digest,
    ).update(sequence=report.sequence, last_heartbeat=now):
        return
    for _ in range(ATTEMPTS):
        with transaction.atomic(using=router.db_for_write(Instance)):
            if _noted(report, digest, now):
                return


def instances_swept(*, now: datetime, listening_since: datetime) -> list[Instance]:
    """Suspect, end and forget the silent; return those of whom a probe should tell more.

    Who did not listen cannot know of silence: it counts from `listening_since` at the earliest.
    """
    listened = now - listening_since
    if listened < SUSPECT_AFTER:
        return []
    silent = Instance.objects.filter(last_heartbeat__lte=now - SUSPECT_AFTER).select_related("service")
    suspects = []
    for instance in silent:
        if instance.state == State.DOWN:
            if instance.since <= now - EVICT_AFTER:
                _evict(instance, now)
        elif instance.state != State.SUSPECT:
            if _changed(instance, now, State.SUSPECT, f"no beat for {_seconds(now - instance.last_heartbeat)}"):
                suspects.append(instance)
        elif (
            listened >= DOWN_AFTER
            and instance.last_heartbeat <= now - DOWN_AFTER
            and instance.probe_passed is False
            and instance.last_probe is not None
            and instance.last_probe >= instance.since
        ):
            silence = _seconds(now - instance.last_heartbeat)
            _changed(instance, now, State.DOWN, f"no beat for {silence}, probe: {instance.probe_result}")
        elif instance.last_probe is None or instance.last_probe <= now - PROBE_AGAIN_AFTER:
            suspects.append(instance)
    return suspects


def instance_probed(*, instance: Instance, passed: bool, text: str, by: str = "") -> None:
    """Note how an instance answered. The journal tells of those probes that somebody (`by`) asked for."""
    now = timezone.now()
    Instance.objects.filter(pk=instance.pk, start=instance.start).update(
        last_probe=now, probe_passed=passed, probe_result=text[:300]
    )
    if by:
        _journal(now, "probe", instance.service.name, instance.name, f"{by}: {text}")


def journal_trimmed(*, now: datetime) -> int:
    """Drop what is older than the journal reaches back; return how many entries that was."""
    dropped, _ = JournalEntry.objects.filter(at__lt=now - JOURNAL_DAYS).delete()
    return dropped


def _noted(report: Report, digest: str, now: datetime) -> bool:
    known = Instance.objects.filter(service__name=report.service, name=report.instance).first()
    if known is None:
        return _created(report, digest, now)
    same_start = known.start == report.start
    if same_start and report.sequence <= known.sequence:
        return True
    # The farewell of a process says nothing about the one that has its name now.
    if not same_start and report.state in ("draining", "down"):
        return True
    state, reason = report.state, "stopped" if report.state == "down" else report.reason
    news: dict[str, Any] = {"state": state, "reason": reason, "sequence": report.sequence, "last_heartbeat": now}
    news |= _facts(report) | {"digest": digest}
    # "since" is of the state alone; a restart begins it anew.
    turned = known.state != state or not same_start
    if turned:
        news["since"] = now
    before = {"start": known.start, "sequence": known.sequence, "state": known.state}
    if not Instance.objects.filter(pk=known.pk, **before).update(**news):
        return False
    if turned:
        text = reason if same_start else "started again"
        _journal(now, state, report.service, report.instance, text)
    if state != "down" and digest != known.digest:
        _patterns_replaced(known.service_id, report.patterns, now)
    return True


def _created(report: Report, digest: str, now: datetime) -> bool:
    if report.state == "down":
        return True
    service, _ = Service.objects.get_or_create(name=report.service, defaults={"first_seen": now})
    facts = {"state": report.state, "reason": report.reason, "since": now, "sequence": report.sequence}
    facts |= {"digest": digest, "last_heartbeat": now}
    _, created = Instance.objects.get_or_create(service=service, name=report.instance, defaults=facts | _facts(report))
    if created:
        _journal(now, report.state, report.service, report.instance, report.reason or "first report")
        _patterns_replaced(service.pk, report.patterns, now)
    return created


def _facts(report: Report) -> dict[str, Any]:
    return {
        "version": report.version,
        "host": report.host,
        "pid": report.pid,
        "zone": report.zone,
        "addresses": report.addresses,
        "start": report.start,
        "started_at": datetime.fromtimestamp(report.started_at, UTC),
    }


def _patterns_replaced(service_id: int, patterns: tuple[PatternReport, ...], now: datetime) -> None:
    # By name and kind: a report that names one twice must not fail whole.
    wanted = {(p.name, p.kind): (p.retry, p.deadline) for p in patterns}
    kept = {(p.name, p.kind): (p.retry, p.deadline) for p in Pattern.objects.filter(service_id=service_id)}
    if wanted == kept:
        return
    Pattern.objects.filter(service_id=service_id).delete()
    Pattern.objects.bulk_create(
        Pattern(service_id=service_id, name=name, kind=kind, retry=retry, deadline=deadline, seen_at=now)
        for (name, kind), (retry, deadline) in wanted.items()
    )


def _changed(instance: Instance, now: datetime, state: State, reason: str) -> bool:
    with transaction.atomic(using=router.db_for_write(Instance)):
        same = Instance.objects.filter(
            pk=instance.pk, state=instance.state, start=instance.start, sequence=instance.sequence
        )
        if not same.update(state=state, reason=reason[:300], since=now):
            return False
        _journal(now, state, instance.service.name, instance.name, reason)
    return True


def _evict(instance: Instance, now: datetime) -> None:
    with transaction.atomic(using=router.db_for_write(Instance)):
        same = Instance.objects.filter(
            pk=instance.pk, state=instance.state, start=instance.start, sequence=instance.sequence
        )
        if same.delete()[0]:
            _journal(now, "evicted", instance.service.name, instance.name, f"was down: {instance.reason}")


def _journal(now: datetime, kind: str, service: str, instance: str, text: str) -> None:
    JournalEntry.objects.create(at=now, kind=kind, service=service, instance=instance, text=text[:500])


def _digest(report: Report) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(report, sequence=0))).hexdigest()


def _seconds(silence: timedelta) -> str:
    return f"{silence.total_seconds():.0f} s"
