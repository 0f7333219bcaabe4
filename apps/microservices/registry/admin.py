"""The fleet in the admin: to look at, and to ask an instance how it is."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.db.models import Exists, OuterRef, QuerySet
from django.forms.widgets import Script
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from ..client import clients
from ..conf import get_settings
from . import selectors, services
from .models import Instance, JournalEntry, Pattern, Service, State
from .probe import AT_ONCE, LIMIT, Outcome, networks, probe_all

MARGIN = 1.0
"""Seconds beyond the probes' own limit, after which an action gives up."""

# The site is the whole project's: whoever installs the registry runs a fleet.
admin.site.site_header = admin.site.site_title = "Fleet"
admin.site.index_title = "Services and instances"


class Reported:
    """Permissions of what only reports change, and the looks of it."""

    class Media:
        js = (Script("registry/refresh.js", type="module"),)
        css = {"all": ("registry/registry.css",)}  # noqa: RUF012 - Django declares it so

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: an instance tells of itself."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: the next report would undo it."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: who is up comes back with its next beat, who is down goes by itself."""
        return False


class StateFilter(admin.SimpleListFilter):
    """Services with an instance in a state."""

    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """Offer all states."""
        return [(str(value), str(label)) for value, label in State.choices]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Service]) -> QuerySet[Service]:
        """Keep the services of which an instance is in the state."""
        if self.value() is None:
            return queryset
        return queryset.filter(Exists(Instance.objects.filter(service=OuterRef("pk"), state=self.value())))


class InstanceInline(Reported, admin.TabularInline):  # type: ignore[type-arg]  # not subscriptable at run time
    """The instances of a service, on its page."""

    model = Instance
    fields = ("how", "where", "version", "pid", "beat")
    readonly_fields = fields
    show_change_link = True
    extra = 0

    @admin.display(description="state")
    def how(self, instance: Instance) -> SafeString:
        """Return the state and its reason."""
        return state_and_reason(instance)

    @admin.display(description="addresses")
    def where(self, instance: Instance) -> SafeString:
        """Return one address a line."""
        return places(instance.addresses)

    @admin.display(description="last heartbeat")
    def beat(self, instance: Instance) -> SafeString:
        """Return how long ago it was heard."""
        return ago(instance.last_heartbeat)


class PatternInline(Reported, admin.TabularInline):  # type: ignore[type-arg]
    """The patterns of a service, on its page."""

    model = Pattern
    fields = ("name", "kind", "retry", "deadline")
    extra = 0


@admin.register(Service)
class ServiceAdmin(Reported, admin.ModelAdmin):  # type: ignore[type-arg]
    """A list of services."""

    list_display = ("name", "how", "up", "versions", "transports", "pattern_count")
    list_filter = (StateFilter,)
    search_fields = ("name", "patterns__name")
    search_help_text = "Name of a service, or of one of its patterns"
    fields = ("name", "first_seen")
    inlines = (InstanceInline, PatternInline)
    show_full_result_count = False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Service]:
        """Return services with what the list shows of them."""
        return selectors.services_with_instances()

    @admin.display(description="state")
    def how(self, service: Service) -> SafeString:
        """Return the state that all instances share, or how many are in which, the worst first."""
        states = selectors.states_of(service.instances.all())
        if not states:
            return format_html('<span class="registry-muted">{}</span>', "no instance")
        if len(states) == 1:
            return badge(next(iter(states)))
        return format_html_join(" ", "{}", ((badge(state, f"{count} {state}"),) for state, count in states.items()))

    @admin.display(description="instances")
    def up(self, service: Service) -> str:
        """Return how many instances take calls, of how many there are."""
        instances = service.instances.all()
        return f"{sum(instance.state in selectors.SERVING for instance in instances)}/{len(instances)}"

    @admin.display
    def versions(self, service: Service) -> str:
        """Return the versions that run."""
        return ", ".join(sorted({i.version for i in service.instances.all() if i.version})) or "-"

    @admin.display
    def transports(self, service: Service) -> str:
        """Return the ways that lead to the service."""
        schemes = {scheme for instance in service.instances.all() for scheme in instance.addresses}
        return ", ".join(sorted(schemes - {"health"})) or "-"

    @admin.display(description="patterns", ordering="pattern_count")
    def pattern_count(self, service: Any) -> int:
        """Return how many patterns the service has."""
        return int(service.pattern_count)


@admin.register(Instance)
class InstanceAdmin(Reported, admin.ModelAdmin):  # type: ignore[type-arg]
    """A list of instances."""

    list_display = ("how", "name", "service", "where", "version", "pid", "beat", "zone")
    list_display_links = ("name",)
    list_filter = ("state", "service", "zone", "version")
    search_fields = ("name", "host", "=pid")
    search_help_text = "Name, host or PID of an instance"
    actions = ("probe_now",)
    show_full_result_count = False
    readonly_fields = ("how", "where", "beat")
    fieldsets = (
        (None, {"fields": ("service", "name", "how", "since")}),
        ("Reported", {"fields": ("where", "version", "zone", "host", "pid", "started_at")}),
        ("Heard", {"fields": ("beat", "sequence", "start")}),
        ("Probed", {"fields": ("last_probe", "probe_passed", "probe_result")}),
    )

    @admin.display(description="state", ordering="state")
    def how(self, instance: Instance) -> SafeString:
        """Return the state and its reason."""
        return state_and_reason(instance)

    @admin.display(description="addresses")
    def where(self, instance: Instance) -> SafeString:
        """Return one address a line."""
        return places(instance.addresses)

    @admin.display(description="heartbeat", ordering="last_heartbeat")
    def beat(self, instance: Instance) -> SafeString:
        """Return how long ago it was heard."""
        return ago(instance.last_heartbeat)

    def has_probe_permission(self, request: HttpRequest) -> bool:
        """Return whether somebody may have connections made on their behalf."""
        return request.user.has_perm("registry.change_instance")

    @admin.action(description="Probe now", permissions=("probe",))
    def probe_now(self, request: HttpRequest, queryset: QuerySet[Instance]) -> None:
        """Ask the selected instances how they are, and show what they say."""
        instances = list(queryset[: AT_ONCE + 1])
        if len(instances) > AT_ONCE:
            self.message_user(request, f"Select at most {AT_ONCE} instances at a time.", messages.ERROR)
            return
        for instance, outcome in zip(instances, probed(instances), strict=True):
            by = request.user.get_username()
            services.instance_probed(instance=instance, passed=outcome.passed, text=outcome.text, by=by)
            level = messages.SUCCESS if outcome.passed else messages.WARNING
            self.message_user(request, f"{instance.service.name} {instance.name}: {outcome.text}", level)
        LogEntry.objects.log_actions(
            user_id=int(request.user.pk or 0), queryset=instances, action_flag=CHANGE, change_message="Probed."
        )


@admin.register(Pattern)
class PatternAdmin(Reported, admin.ModelAdmin):  # type: ignore[type-arg]
    """A list of patterns."""

    list_display = ("name", "kind", "service", "retry", "deadline", "seen_at")
    list_filter = ("kind", "service", "retry")
    search_fields = ("name",)
    show_full_result_count = False


@admin.register(JournalEntry)
class JournalEntryAdmin(Reported, admin.ModelAdmin):  # type: ignore[type-arg]
    """What happened in the fleet."""

    list_display = ("when", "what", "service", "instance", "text")
    list_filter = ("kind", "service")
    search_fields = ("service", "instance", "text")
    date_hierarchy = "at"
    show_full_result_count = False

    @admin.display(description="at", ordering="at")
    def when(self, entry: JournalEntry) -> str:
        """Return the time to the second."""
        return f"{timezone.localtime(entry.at):%Y-%m-%d %H:%M:%S}"

    @admin.display(description="kind", ordering="kind")
    def what(self, entry: JournalEntry) -> SafeString:
        """Return the kind, coloured where it is a state."""
        return badge(entry.kind)


def probed(instances: list[Instance]) -> list[Outcome]:
    """Ask instances, all at the same time; who has not answered when the time is over has failed."""
    allowed = networks(get_settings().probe_networks)
    asking = clients.run(probe_all([instance.addresses for instance in instances], allowed))
    try:
        return asking.result(LIMIT + MARGIN)
    except TimeoutError:
        asking.cancel()
        return [Outcome(False, "there was no time to ask")] * len(instances)


def badge(state: str, text: str = "") -> SafeString:
    """Return a state as a word with its colour."""
    return format_html('<span class="registry-state" data-state="{}">{}</span>', state, text or state)


def state_and_reason(instance: Instance) -> SafeString:
    """Return a state with the reason for it."""
    if not instance.reason:
        return badge(instance.state)
    return format_html('{}<div class="registry-reason">{}</div>', badge(instance.state), instance.reason)


def places(addresses: Mapping[str, str]) -> SafeString:
    """Return one address a line: what it is for, host and port."""
    shown = ((url, kind, url.partition("://")[2]) for kind, url in sorted(addresses.items()))
    line = '<div class="registry-address" title="{}"><span class="registry-muted">{}</span> {}</div>'
    return format_html_join("", line, shown) or SafeString("-")


def ago(at: datetime) -> SafeString:
    """Return how long ago something was, with the time to hover over."""
    seconds = max(0, round((timezone.now() - at).total_seconds()))
    if seconds < 120:
        text = f"{seconds} s ago"
    elif seconds < 7200:
        text = f"{seconds // 60} min ago"
    else:
        text = f"{seconds // 3600} h ago"
    return format_html('<time datetime="{}" title="{}">{}</time>', at.isoformat(), f"{at:%Y-%m-%d %H:%M:%S %Z}", text)
