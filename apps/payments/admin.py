"""Payments in the admin: to look at; changes go through services.py."""

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from .models import Payment, Refund


class ViewOnly(admin.ModelAdmin):  # type: ignore[type-arg]  # not subscriptable at run time
    """A list to search and filter; nothing here reaches the provider."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Refuse: payments come with orders."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: a form would change the row and move no money."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: what was paid stays on record."""
        return False


@admin.register(Payment)
class PaymentAdmin(ViewOnly):
    """A list of payments."""

    list_display = ("id", "order_id", "amount", "currency", "status", "created_at")
    list_filter = ("status", "currency")
    search_fields = ("=id", "=order_id", "=user_id", "=provider_ref")


@admin.register(Refund)
class RefundAdmin(ViewOnly):
    """A list of refunds."""

    list_display = ("id", "payment", "amount", "status", "created_at")
    list_filter = ("status",)
    search_fields = ("=id", "=payment__id")
