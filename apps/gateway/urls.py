"""The paths of the page and of the REST API; without a version they mean version 1."""

from django.urls import include, path
from drf_spectacular.views import SpectacularJSONAPIView, SpectacularSwaggerView

from microservices.rest import UnknownPath

from . import pages, views

v1 = [
    path("users", views.UserList.as_view()),
    path("users/<str:id>", views.UserDetail.as_view()),
    path("products", views.ProductList.as_view()),
    path("products/<str:id>", views.ProductDetail.as_view()),
    path("orders", views.OrderList.as_view()),
    path("orders/<str:id>", views.OrderDetail.as_view()),
    path("orders/<str:id>/cancel", views.OrderCancel.as_view()),
    path("payments", views.PaymentList.as_view()),
    path("payments/<str:id>", views.PaymentDetail.as_view()),
    path("notifications", views.NotificationList.as_view()),
]

urlpatterns = [
    path("", pages.ShopPage.as_view(), name="shop"),
    path("api/docs", SpectacularSwaggerView.as_view(url_name="openapi"), name="docs"),
    path("api/openapi.json", SpectacularJSONAPIView.as_view(), name="openapi"),
    path("api/v1/", include(v1)),
    path("api/", include(v1)),
    path("api/<path:unknown>", UnknownPath.as_view()),
]
