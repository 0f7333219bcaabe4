#!/usr/bin/env python
"""Django's command line for this project."""

import os
import sys

from config import fleet


def main() -> None:
    """Run the command that the shell asks for."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    live_here(sys.argv)
    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import execute_from_command_line

    try:
        execute_from_command_line(sys.argv)
    except ImproperlyConfigured as error:
        sys.exit(f"Improperly configured: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def live_here(argv: list[str]) -> None:
    """Make `runmicroservice NAME...` and `grpcserve NAME...` processes of just these services, as SERVICES would."""
    # Names that are not on the map are left for the command to report.
    named = [word for word in argv[2:] if word in fleet.SERVICES]
    if argv[1:2] in (["runmicroservice"], ["grpcserve"]) and named:
        os.environ.setdefault("SERVICES", ",".join(named))


if __name__ == "__main__":
    main()
