"""The hybrid application: HTTP and message servers in one process."""

import os

import config  # noqa: F401 - puts apps/ on the import path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

from channels.routing import ProtocolTypeRouter
from django.core.asgi import get_asgi_application

http = get_asgi_application()  # sets Django up: what follows needs its applications

from microservices import HybridApplication

application = HybridApplication(ProtocolTypeRouter({"http": http}))
