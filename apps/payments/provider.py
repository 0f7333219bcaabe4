"""The payment provider: what it is asked, and a fake one to try the shop with."""

import threading
import time
from functools import cache
from hashlib import sha256
from typing import Literal, NamedTuple, Protocol


class NoAnswer(Exception):
    """The provider did not answer in time; whether it did what it was asked is unknown."""


class Refused(Exception):
    """The provider will not do this with a charge in its state."""


class Charge(NamedTuple):
    """What the provider knows of an authorisation: its reference, and where it stands."""

    ref: str
    state: Literal["authorized", "declined", "captured", "voided"]
    decline_code: str = ""


class Provider(Protocol):
    """What a payment provider can do. A repeated key does nothing more; every call may raise NoAnswer."""

    def authorize(self, *, key: str, token: str, amount: int, currency: str) -> Charge:
        """Hold an amount, or decline to."""
        ...

    def capture(self, *, key: str, ref: str, amount: int) -> None:
        """Take what is held. Raises Refused."""
        ...

    def void(self, *, key: str, ref: str) -> None:
        """Let go what is held. Raises Refused."""
        ...

    def refund(self, *, key: str, ref: str, amount: int) -> str:
        """Give back what was taken and return a reference. Raises Refused."""
        ...

    def find(self, *, key: str) -> Charge | None:
        """Return what an authorisation with this key came to, if there was one."""
        ...


class FakeProvider:
    """A provider in memory: the token decides what happens.

    tok_ok is authorised; tok_declined is not, nor is a token that nobody knows; tok_slow is
    authorised after six seconds; tok_lost_reply is authorised, but the answer is lost.
    """

    slowness = 6.0
    max_charges = 10_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._charges: dict[str, Charge] = {}

    def authorize(self, *, key: str, token: str, amount: int, currency: str) -> Charge:
        """Hold an amount, or decline to."""
        known = self.find(key=key)
        if known is not None:
            return known
        if token == "tok_slow":  # noqa: S105 - the name of a card to try with
            time.sleep(self.slowness)
        charge = self._keep(_charge(_ref(key), token))
        if token == "tok_lost_reply":  # noqa: S105
            raise NoAnswer("the answer was lost")
        return charge

    def capture(self, *, key: str, ref: str, amount: int) -> None:
        """Take what is held. Raises Refused."""
        self._move(ref, "authorized", "captured")

    def void(self, *, key: str, ref: str) -> None:
        """Let go what is held. Raises Refused."""
        self._move(ref, "authorized", "voided")

    def refund(self, *, key: str, ref: str, amount: int) -> str:
        """Give back what was taken and return a reference. Raises Refused."""
        self._move(ref, "captured", "captured")
        return _ref(key)

    def find(self, *, key: str) -> Charge | None:
        """Return what an authorisation with this key came to, if there was one."""
        return self._charges.get(_ref(key))

    def _keep(self, charge: Charge) -> Charge:
        with self._lock:
            kept = self._charges.setdefault(charge.ref, charge)
            if len(self._charges) > self.max_charges:
                del self._charges[next(iter(self._charges))]
        return kept

    def _move(self, ref: str, before: str, after: Literal["captured", "voided"]) -> None:
        with self._lock:
            charge = self._charges.get(ref)
            # What it has forgotten, by a restart or for want of room, it takes for authorised.
            if charge is not None and charge.state not in (before, after):
                raise Refused(f"{ref} is {charge.state}")
            if charge is not None:
                self._charges[ref] = charge._replace(state=after)


def _charge(ref: str, token: str) -> Charge:
    if token in ("tok_ok", "tok_slow", "tok_lost_reply"):
        return Charge(ref, "authorized")
    return Charge(ref, "declined", "insufficient_funds" if token == "tok_declined" else "unknown_token")  # noqa: S105


def _ref(key: str) -> str:
    return f"fake_{sha256(key.encode()).hexdigest()[:24]}"


@cache
def get_provider() -> Provider:
    """Return the provider of this process."""
    return FakeProvider()
