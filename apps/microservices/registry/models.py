"""What the registry keeps."""

from django.db import models


class State(models.TextChoices):
    """How an instance is, as it says itself, or as its silence says; the worst last."""

    UP = "up"
    DEGRADED = "degraded"
    DRAINING = "draining"
    SUSPECT = "suspect"
    DOWN = "down"


class Service(models.Model):
    """A service that at least one instance has reported for."""

    name = models.CharField(max_length=100, unique=True)
    first_seen = models.DateTimeField()

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Instance(models.Model):
    """One process of a service. `last_heartbeat` is by this side's clock, `started_at` by its own."""

    service = models.ForeignKey(Service, models.CASCADE, related_name="instances")
    name = models.CharField(max_length=100)
    state = models.CharField(max_length=10, choices=State)
    reason = models.CharField(max_length=300, blank=True)
    since = models.DateTimeField("in this state since")
    version = models.CharField(max_length=300, blank=True)
    host = models.CharField(max_length=300, blank=True)
    pid = models.PositiveIntegerField("PID")
    zone = models.CharField(max_length=300, blank=True)
    addresses = models.JSONField(default=dict)
    start = models.CharField("start id", max_length=64)
    sequence = models.PositiveIntegerField()
    # Of all that a report says beside its sequence: a beat without news is told by it.
    digest = models.CharField(max_length=64, editable=False)
    started_at = models.DateTimeField()
    last_heartbeat = models.DateTimeField()
    last_probe = models.DateTimeField(null=True, blank=True)
    probe_passed = models.BooleanField(null=True, blank=True)
    probe_result = models.CharField(max_length=300, blank=True)

    class Meta:
        ordering = ("service__name", "name")
        constraints = (models.UniqueConstraint(fields=["service", "name"], name="registry_instance_once"),)

    def __str__(self) -> str:
        return self.name


class Pattern(models.Model):
    """A pattern of a service, as the last report with news had it."""

    service = models.ForeignKey(Service, models.CASCADE, related_name="patterns")
    name = models.CharField(max_length=300)
    kind = models.CharField(max_length=100)
    retry = models.CharField(max_length=100)
    deadline = models.FloatField("deadline (s)", null=True, blank=True)
    seen_at = models.DateTimeField()

    class Meta:
        ordering = ("service__name", "name", "kind")
        constraints = (models.UniqueConstraint(fields=["service", "name", "kind"], name="registry_pattern_once"),)

    def __str__(self) -> str:
        return self.name


class JournalEntry(models.Model):
    """Something that happened in the fleet. It names what it is about, which may be gone."""

    at = models.DateTimeField(db_index=True)
    kind = models.CharField(max_length=20)
    service = models.CharField(max_length=100)
    instance = models.CharField(max_length=100, blank=True)
    text = models.CharField(max_length=500, blank=True)

    class Meta:
        ordering = ("-at", "-id")
        verbose_name_plural = "journal entries"

    def __str__(self) -> str:
        return f"{self.kind} {self.service} {self.instance}".rstrip()
