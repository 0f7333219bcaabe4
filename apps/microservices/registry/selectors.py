"""What is read of the list of the fleet."""

from collections.abc import Iterable

from django.db.models import Count, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce

from .models import Instance, Pattern, Service, State

# From the best to the worst.
RANK = {state: rank for rank, state in enumerate(State)}
SERVING = (State.UP, State.DEGRADED, State.SUSPECT)


def services_with_instances() -> QuerySet[Service]:
    """Return all services with their instances and, as `pattern_count`, the number of their patterns."""
    patterns = Pattern.objects.filter(service=OuterRef("pk")).order_by().values("service")
    counted = Coalesce(Subquery(patterns.annotate(n=Count("pk")).values("n")), 0)
    return Service.objects.annotate(pattern_count=counted).prefetch_related("instances")


def states_of(instances: Iterable[Instance]) -> dict[State, int]:
    """Return how many instances are in each state, the worst first."""
    counts: dict[State, int] = {}
    for instance in instances:
        state = State(instance.state)
        counts[state] = counts.get(state, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -RANK[item[0]]))
