"""Every path of a process: health and metrics everywhere, the rest where the gateway lives."""

from django.apps import apps
from django.urls import URLPattern, URLResolver, include, path

from microservices.health import health_urls
from microservices.metrics import metrics_urls

urlpatterns: list[URLPattern | URLResolver] = [*health_urls(), *metrics_urls()]

if apps.is_installed("gateway"):
    from django.contrib import admin

    urlpatterns += [path("admin/", admin.site.urls), path("", include("gateway.urls"))]
    handler400 = "microservices.rest.bad_request"
    handler500 = "microservices.rest.server_error"
