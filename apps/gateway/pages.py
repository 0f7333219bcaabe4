"""The page of the shop: it asks the REST API and listens to the WebSocket, like any other client."""

from typing import Any

from django.http import HttpRequest, HttpResponseBase
from django.views.generic import TemplateView

from microservices import clients

# All that the page is made of comes from here, and nothing of it is inline.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


class ShopPage(TemplateView):
    """Where one orders and sees what comes of it."""

    template_name = "gateway/shop.html"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        """Tell of faults on purpose, so that nobody looks for their cause."""
        return super().get_context_data(faults=clients.faults, **kwargs)

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """Show the page, and say that nothing foreign belongs to it."""
        response = super().dispatch(request, *args, **kwargs)
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        return response
