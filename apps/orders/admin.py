"""Products and orders in the admin: to look at; changes go through services.py."""

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from .models import Order, OrderLine, Product, Reservation


class ViewOnly:
    """Permissions of what only services.py may change."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: a form would take stock from nobody."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: a form would change a row without its stock, its version and its event."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: what was ordered stays on record."""
        return False


class LineInline(ViewOnly, admin.TabularInline):  # type: ignore[type-arg]  # not subscriptable at run time
    """The lines of an order, on its page."""

    model = OrderLine


class ReservationInline(ViewOnly, admin.TabularInline):  # type: ignore[type-arg]
    """What an order holds in stock, on its page."""

    model = Reservation


@admin.register(Product)
class ProductAdmin(ViewOnly, admin.ModelAdmin):  # type: ignore[type-arg]
    """A list of products with their stock."""

    list_display = ("sku", "name", "price", "currency", "on_hand", "reserved", "active")
    list_filter = ("active", "currency")
    search_fields = ("sku", "name")


@admin.register(Order)
class OrderAdmin(ViewOnly, admin.ModelAdmin):  # type: ignore[type-arg]
    """A list of orders."""

    list_display = ("number", "customer_email", "status", "total", "currency", "placed_at")
    list_filter = ("status", "currency")
    search_fields = ("number", "customer_name", "customer_email", "=id", "=user_id", "=payment_id")
    inlines = (LineInline, ReservationInline)
