"""Notifications in the admin: to look at; changes go through services.py."""

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from .models import Delivery, Notification


class ViewOnly:
    """Permissions of what only services.py may change."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: notifications come from events."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: a user has been told what is here."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Refuse: without the row a repeated event would be told again."""
        return False


class DeliveryInline(ViewOnly, admin.TabularInline):  # type: ignore[type-arg]  # not subscriptable at run time
    """How a notification went out, on its page."""

    model = Delivery


@admin.register(Notification)
class NotificationAdmin(ViewOnly, admin.ModelAdmin):  # type: ignore[type-arg]
    """A list of notifications."""

    list_display = ("title", "user_id", "kind", "read_at", "created_at")
    list_filter = ("kind",)
    search_fields = ("=id", "=user_id", "title")
    inlines = (DeliveryInline,)
