"""Measures ours beside real NestJS servers and clients, alternated in one run: `script/bench [WORKLOAD ...]`.

What to read is the ratio of CPU per call to the faster NestJS of the same run. Calls a second come second:
machine, load and broker share them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import peers, report
from .measure import measure
from .processes import LAST_CORE
from .workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"some of: {', '.join(WORKLOADS)}")
    parser.add_argument("--rounds", type=int, help="how often each side runs (default: 5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of fewer calls: under a minute a workload")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"no workload {', '.join(sorted(unknown))}; there are: {', '.join(WORKLOADS)}")
    rounds = options.rounds or (3 if options.quick else 5)

    peers.build()
    os.sched_setaffinity(0, {LAST_CORE})  # the measured process has the first core to itself
    facts = report.machine(shlex.join(["script/bench", *sys.argv[1:]]))
    print(report.heading(facts), flush=True)
    found: dict[str, Any] = {}
    for workload in options.workloads or WORKLOADS:
        found[workload] = {}
        try:
            with ExitStack() as stack:
                for case in WORKLOADS[workload](stack):
                    if options.quick:
                        case = case._replace(calls=case.calls // 4)
                    rows = measure(case, rounds)
                    print(f"\n{report.table(workload, case, rounds, rows)}", flush=True)
                    found[workload][case.name] = report.figures(rows)
        except Exception as error:  # noqa: BLE001 - what fails has no figures; the others have theirs
            print(f"\n{workload}: {error}", file=sys.stderr, flush=True)
            found[workload]["error"] = str(error)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rounds": rounds, "workloads": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
