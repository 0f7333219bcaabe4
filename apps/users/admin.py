"""Users in the admin: to look at; changes go through services.py."""

from django.contrib import admin
from django.http import HttpRequest

from .models import User


@admin.register(User)
class UserAdmin(admin.ModelAdmin):  # type: ignore[type-arg]  # not subscriptable at run time
    """A list of users that operators may search and filter."""

    list_display = ("email", "name", "role", "status", "created_at")
    list_filter = ("role", "status")
    search_fields = ("email", "name")
    exclude = ("password",)
    readonly_fields = ("id", "created_at")

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Refuse: users register."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        """Refuse: a form would change a user without raising its version."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        """Refuse: deleting would remove a row that other services refer to."""
        return False
