"""The seed_users command: people to try the shop with."""

from typing import Any

from django.contrib.auth.hashers import make_password
from django.core.management.base import BaseCommand, CommandParser

from users.models import Role, User
from users.services import user_seed

PEOPLE = """
Ada Morgan, Ben Hollis, Clara Winter, Daniel Reyes, Elena Novak, Felix Brandt, Grace Okafor, Hugo Laurent,
Iris Nakamura, Jonas Lindqvist, Karin Vogel, Liam Doyle, Maya Fernandes, Nils Bergman, Olivia Hart,
Pavel Dvorak, Quinn Archer, Rosa Marino, Samir Haddad, Tessa Vermeer, Umar Siddiqui, Vera Kowalska,
Walter Baum, Ximena Castro, Yusuf Demir, Zoe Marchand, Anton Weiss, Bianca Costa, Cyril Fontaine, Dora Szabo
"""
STAFF = {"Ada Morgan": Role.MANAGER, "Ben Hollis": Role.SUPPORT, "Clara Winter": Role.SUPPORT}


class Command(BaseCommand):
    """Write thirty users into an empty table."""

    help = "Writes thirty users into an empty table: Ada Morgan is a manager, Ben Hollis and Clara Winter are support."

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare --password."""
        parser.add_argument("--password", help="what all of them sign in with; without it nobody can")

    def handle(self, *args: Any, password: str | None, **options: Any) -> None:
        """Seed, and say what was done."""
        # Hashed once for all: thirty hashes would take many seconds.
        hashed = make_password(password)
        names = [name.strip() for name in PEOPLE.split(",")]
        written = user_seed(users=[_user(name, hashed) for name in names])
        self.stdout.write(f"{written} users written." if written else "There are users already; nothing written.")


def _user(name: str, hashed: str) -> User:
    email = f"{name.lower().replace(' ', '.')}@example.org"
    return User(name=name, email=email, password=hashed, role=STAFF.get(name, Role.CUSTOMER))
