"""Migrates the database of every service that lives in this process."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management import call_command, get_commands
from django.core.management.base import BaseCommand
from django.db import connections
from django.db.migrations.executor import MigrationExecutor


class Command(BaseCommand):
    """`manage.py migratefleet`: `migrate --database NAME` for each database in use."""

    help = "Migrate each database of this process; says nothing about those that are up to date."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--seed", action="store_true", help="then run every seed_* command there is")

    def handle(self, *args: Any, **options: Any) -> None:
        for alias in connections:
            if connections.settings[alias]["ENGINE"].endswith("dummy"):
                continue
            executor = MigrationExecutor(connections[alias])
            if executor.migration_plan(executor.loader.graph.leaf_nodes()):
                self.stdout.write(f"Migrating {alias}.")
                call_command("migrate", database=alias, verbosity=0)
        if options["seed"]:
            for command in sorted(name for name in get_commands() if name.startswith("seed_")):
                call_command(command)
