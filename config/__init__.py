"""The project: which services there are, where they live, on which database."""

import sys
from pathlib import Path

# apps/ is a source root: each folder in it has one import name, `users` and never `apps.users`,
# or there would be two registries of models and of handlers. First, so that it wins over a wheel.
_SOURCE_ROOT = str(Path(__file__).resolve().parent.parent / "apps")
if _SOURCE_ROOT not in sys.path:
    sys.path.insert(0, _SOURCE_ROOT)
