"""The page of the shop, as the gateway renders it; tests/system/test_page.py tries it in a browser."""

from __future__ import annotations

from django.test import Client
from pytest_django import Settings


def test_faults_on_purpose_are_told_while_there_are_any(client: Client, settings: Settings) -> None:
    assert "Faults on purpose" not in client.get("/").text

    settings.DEBUG = True
    faults = {"users": {"get_user": {"error": 1}, "*": {"latency": 1}}}
    settings.MICROSERVICES = {**settings.MICROSERVICES, "FAULTS": faults}

    assert '<p class="banner" role="note">Faults on purpose: users/get_user, users/*</p>' in client.get("/").text
