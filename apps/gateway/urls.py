"""The paths of the REST API; without a version they mean version 1."""

from django.urls import include, path
from drf_spectacular.views import SpectacularJSONAPIView, SpectacularSwaggerView

from microservices.rest import UnknownPath

from . import views

v1 = [
    path("users", views.UserList.as_view()),
    path("users/<str:id>", views.UserDetail.as_view()),
]

urlpatterns = [
    path("api/docs", SpectacularSwaggerView.as_view(url_name="openapi"), name="docs"),
    path("api/openapi.json", SpectacularJSONAPIView.as_view(), name="openapi"),
    path("api/v1/", include(v1)),
    path("api/", include(v1)),
    path("api/<path:unknown>", UnknownPath.as_view()),
]
