"""TLS of the transports whose schemes end in `s`: options, and the contexts made of them."""

from __future__ import annotations

import ssl

from ..exceptions import ConfigurationError
from .base import Options


class TlsOptions(Options, frozen=True, kw_only=True):
    """Files in PEM. A server needs `certfile` and `keyfile`; with `cafile` it asks its peers for certificates, too.

    A client trusts `cafile`, or without one what the system trusts, and shows its own certificate where it has one;
    `server_name` is the name that it expects where the address has another.
    """

    certfile: str = ""
    keyfile: str = ""
    cafile: str = ""
    server_name: str = ""

    def client_context(self) -> ssl.SSLContext:
        """Return a client's side. Raises ConfigurationError for files that cannot be used."""
        return self._loaded(ssl.Purpose.SERVER_AUTH)

    def server_context(self) -> ssl.SSLContext:
        """Return a server's side. Raises ConfigurationError for files that are missing or cannot be used."""
        if not (self.certfile and self.keyfile):
            raise ConfigurationError("A server with TLS needs the options certfile and keyfile.")
        context = self._loaded(ssl.Purpose.CLIENT_AUTH)
        if self.cafile:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _loaded(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(purpose, cafile=self.cafile or None)
            if self.certfile:
                context.load_cert_chain(self.certfile, self.keyfile or None)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(file for file in (self.certfile, self.keyfile, self.cafile) if file)
            raise ConfigurationError(f"TLS cannot be set up with {files}: {error}.") from error
        return context
