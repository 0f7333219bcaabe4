"""All settings, for every role of a process: derived from fleet.py and from the environment."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured

from . import fleet

# Any variable may come as <NAME>_FILE, the path of a file that holds it.
env = environ.FileAwareEnv()

BASE_DIR = Path(__file__).resolve().parent.parent

# Where development keeps its databases, its mail and its bus.
DATA_DIR = Path(env.str("DATA_DIR", default=str(BASE_DIR / "data")))

DEBUG = env.bool("DEBUG", default=False)

# Not env.str: it takes a key that starts with "$" for the name of another variable.
SECRET_KEY = env.ENVIRON.get("SECRET_KEY", "").strip()
if not SECRET_KEY:
    if not DEBUG:
        raise ImproperlyConfigured(
            "Set SECRET_KEY, or SECRET_KEY_FILE, to a long random string; for development set DEBUG=1 instead."
        )
    SECRET_KEY = "insecure-key-for-development-only"  # noqa: S105 - says so itself

ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["localhost", "127.0.0.1", "[::1]"])


# Who lives here, and whether the doors are open

MAP = ["gateway", *fleet.SERVICES]
HERE = [name.strip() for name in env.list("SERVICES", default=[])] or MAP
if unknown := [name for name in HERE if name not in MAP]:
    raise ImproperlyConfigured(f"SERVICES names {', '.join(unknown)}; config/fleet.py knows {', '.join(MAP)}.")
GATEWAY = "gateway" in HERE
SERVICES = [name for name in fleet.SERVICES if name in HERE]


def number(name: str, default: float) -> float:
    """Return a variable's number. Raises ImproperlyConfigured, naming it, where it holds none."""
    text: str = env.str(name, default=str(default)).strip()
    try:
        return float(text)
    except ValueError as error:
        raise ImproperlyConfigured(f"{name} must be a number, not {text!r}.") from error


def json_object(name: str) -> dict[str, Any]:
    """Return a variable's JSON object. Raises ImproperlyConfigured, naming it, where it holds none."""
    text: str = env.str(name, default="").strip() or "{}"
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ImproperlyConfigured(f"{name} must be a JSON object, not {text!r}.")
    return found


def service_url(name: str) -> str:
    """Return the URL of a service: <NAME>_URL, else the broker that all of them share, else that of the map."""
    shared = env.str("SERVICES_URL", default="").strip() or fleet.SERVICES[name]["url"]
    url: str = env.str(f"{name.upper()}_URL", default=shared)
    return url.strip()


def port(name: str, kind: str, default: int) -> int:
    """Return a port of a service: <NAME>_<KIND>_PORT, or <KIND>_PORT where it lives alone."""
    alone = int(number(f"{kind}_PORT", default)) if [name] == HERE else default
    return int(number(f"{name.upper()}_{kind}_PORT", alone))


def grpc_url(name: str) -> str:
    """Return the URL of a service's gRPC methods: <NAME>_GRPC_URL, else its port of the map on the service's host."""
    if "grpc" not in fleet.SERVICES[name]:
        return ""
    host = urlsplit(fleet.SERVICES[name]["url"]).hostname
    default = f"grpc://{host}:{port(name, 'GRPC', fleet.SERVICES[name]['grpc'])}"
    url: str = env.str(f"{name.upper()}_GRPC_URL", default=default)
    return url.strip()


def patterns(name: str) -> dict[str, dict[str, str]]:
    """Return the policies of single patterns of a service."""
    return {pattern: {"retry": retry} for pattern, retry in fleet.RETRY[name].items()}


def served_at(url: str) -> str:
    """Return a gRPC URL as its server takes it: in development it also tells what it can."""
    return f"{url}?reflection=true" if url.startswith("grpc") and DEBUG and "?" not in url else url


def place(name: str) -> dict[str, Any]:
    """Return where a service is."""
    health = port(name, "HEALTH", fleet.SERVICES[name]["health"])
    return {"url": service_url(name), "grpc": grpc_url(name), "health": health}


# The event bus and the channel layer; without it both stay in the memory of the process.
REDIS_URL: str = env.str("REDIS_URL", default="").strip()

PLACES = {name: place(name) for name in fleet.SERVICES}

MICROSERVICES = {
    "NAME": HERE[0] if len(HERE) == 1 else "shop",
    "CLIENTS": {
        name: {**PLACES[name], "rpcs": fleet.RPCS.get(name, {}), "patterns": patterns(name)} for name in PLACES
    },
    "SERVERS": {
        name: {**PLACES[name], "url": served_at(PLACES[name]["url"]), "grpc": served_at(PLACES[name]["grpc"])}
        for name in SERVICES
    },
    "HTTP_PORT": int(number("HTTP_PORT", number("PORT", fleet.HTTP_PORT))),
    "PROTO_PATH": [str(BASE_DIR / "proto")],
    "GRPC_PORT": int(number("GRPC_PORT", fleet.GRPC_PORT)),
    "DATA_DIR": str(DATA_DIR),
    "LISTEN": env.bool("LISTEN", default="runserver" not in sys.argv),
    "EVENTS_URL": env.str("EVENTS_URL", default=REDIS_URL.replace("://", "-streams://", 1) or "memory://"),
    "CALL_TIMEOUT": number("CALL_TIMEOUT", 5.0),
    "FAULTS": json_object("FAULTS"),
    "DRAIN_TIMEOUT": number("DRAIN_TIMEOUT", 30.0),
    "DRAIN_PAUSE": number("DRAIN_PAUSE", 0.0 if DEBUG else 5.0),
    # A debugger holds the loop for longer than any watchdog would take.
    "WATCHDOG": number("WATCHDOG", 0.0 if DEBUG else 30.0),
    "INSECURE_DOORS": env.bool("INSECURE_DOORS", default=False),
    "INSECURE_BROKERS": env.bool("INSECURE_BROKERS", default=False),
    "HEARTBEAT": number("HEARTBEAT", 5.0),
    "TRACEBACKS": DEBUG,
    "INSTANCE": env.str("INSTANCE", default="").strip(),
    "ZONE": env.str("ZONE", default="").strip(),
    "ADVERTISE_HOST": env.str("ADVERTISE_HOST", default="").strip(),
    "SERVER_MIDDLEWARE": ["microservices.telemetry.logging.CallLog"],
    "CLIENT_MIDDLEWARE": ["microservices.telemetry.logging.CallLog"],
}


# Apps

INSTALLED_APPS = ["microservices", *SERVICES]
if GATEWAY:
    INSTALLED_APPS = [
        "daphne",  # before staticfiles: both have a runserver, the first one is taken
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django.contrib.messages",
        "django.contrib.staticfiles",
        "rest_framework",
        "drf_spectacular",
        "drf_spectacular_sidecar",
        "channels",
        "microservices",
        "microservices.registry",
        "gateway",
        *SERVICES,
    ]


# Browsers: groups that services push to and WebSockets join. No event travels here.

CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        # No time-out: a layer that waits for messages is silent for as long as nobody sends one.
        "CONFIG": {"hosts": [{"address": REDIS_URL, "socket_timeout": None}]},
    }
    if REDIS_URL
    else {"BACKEND": "channels.layers.InMemoryChannelLayer"}
}


# E-mail: into files in development

globals().update(env.email_url("EMAIL_URL", default="filemail://" if DEBUG else "smtp://localhost:25"))
EMAIL_FILE_PATH = str(DATA_DIR / "mail")
EMAIL_TIMEOUT = 10
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL", default="shop@example.org")


# Databases: an alias per service that lives here; `default` is the gateway's

# Deferred transactions fail with "database is locked" when two writers upgrade at once.
SQLITE = {
    "transaction_mode": "IMMEDIATE",
    "timeout": 5,
    "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
}


def database(name: str) -> dict[str, Any]:
    """Return the database of a service: <NAME>_DATABASE_URL, or an SQLite file of its own."""
    config: dict[str, Any]
    if url := env.str(f"{name.upper()}_DATABASE_URL", default="").strip():
        config = env.db_url_config(url)
    else:
        DATA_DIR.mkdir(parents=True, exist_ok=True)
        config = {"ENGINE": "django.db.backends.sqlite3", "NAME": DATA_DIR / f"{name}.sqlite3"}
    if config["ENGINE"].endswith("sqlite3"):
        config["OPTIONS"] = SQLITE | config.get("OPTIONS", {})
    return {
        # Kept open: the threads of the pool serve message after message, and no request ends there.
        "CONN_MAX_AGE": 600,
        "CONN_HEALTH_CHECKS": True,
        # Django's tests would make `default` first, which a process without the gateway has not.
        "TEST": {"DEPENDENCIES": []},
        **config,
    }


# Empty without the gateway, so that a query that names no alias fails loudly.
DATABASES = {"default": database("gateway") if GATEWAY else {}}
DATABASES |= {name: database(name) for name in SERVICES}
DATABASE_ROUTERS = ["microservices.db.ServiceRouter"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"


# HTTP

ASGI_APPLICATION = "config.asgi.application"
ROOT_URLCONF = "config.urls"

# A process without the gateway only tells how it is.
MIDDLEWARE = GATEWAY * [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    # Last, against its own advice. It is sync, so all those above run with it in one thread;
    # otherwise each would hop to a thread and back, which doubles the cost of a request.
    "whitenoise.middleware.WhiteNoiseMiddleware",
]

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

STATIC_URL = "/static/"
WHITENOISE_USE_FINDERS = True  # the API's page and the admin work without collectstatic
# WhiteNoise hands out files by sync iterators; Django says so with each process's first one.
warnings.filterwarnings("ignore", "StreamingHttpResponse must consume synchronous iterators", Warning)

DATA_UPLOAD_MAX_MEMORY_SIZE = 1024 * 1024

REST_FRAMEWORK = {
    "EXCEPTION_HANDLER": "microservices.rest.exception_handler",
    "DEFAULT_AUTHENTICATION_CLASSES": [],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.AllowAny"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
}

SPECTACULAR_SETTINGS = {
    "TITLE": "Shop API",
    "DESCRIPTION": "Errors are problem documents (RFC 9457).",
    "VERSION": "1",
    "COMPONENT_SPLIT_PATCH": False,  # what may change is optional in its own shape already
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "PREPROCESSING_HOOKS": ["microservices.rest.only_versioned"],
}


# Time, and the log on stderr

USE_TZ = True
TIME_ZONE = "UTC"

LOG_FORMAT = env.str("LOG_FORMAT", default="text" if DEBUG else "json", choices=["text", "json"])
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "text": {"format": "{asctime} {levelname} {name} {message}", "style": "{"},
        "json": {"()": "microservices.telemetry.logging.JsonFormatter"},
    },
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": LOG_FORMAT}},
    "root": {"handlers": ["console"], "level": env.str("LOG_LEVEL", default="INFO").upper()},
    # Without handlers of its own: Django's would print each line a second time.
    # A probe that hears "starting" is no event; who asked has the answer.
    "loggers": {"django": {"handlers": []}, "health_check": {"level": "CRITICAL"}},
}
