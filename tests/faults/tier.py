"""Two tiers: a fast one for every run of the tests, and a full one whose figures mean more."""

from __future__ import annotations

import os

FULL = os.environ.get("FAULTS_TIER") == "full"


def seconds(fast: float, full: float) -> float:
    """Return for how long a fault is there."""
    return full if FULL else fast
