"""Who asks: an API key, an issuer's token, or a client certificate that a trusted proxy passed on.

What stands in `Authorization` decides alone; a certificate counts only where nothing stands there. A
remembered key or token costs no thread and no database.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from anyio import to_thread
from starlette.requests import Request

from audit.principal import Principal
from server.errors import UnauthenticatedError
from server.keys import KeyStore
from server.oidc import TokenVerifier
from server.proxy_identity import ProxyIdentity

_KEY: Final = "affidavit_"


def bearer_credentials(authorization: str) -> str | None:
    """Return what follows `Bearer` in the header, as FastAPI's `HTTPBearer` reads it, else None."""
    scheme, _, credentials = authorization.partition(" ")
    return credentials.strip() or None if scheme.lower() == "bearer" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Identities:
    """The ways in that this server has."""

    keys: KeyStore
    tokens: TokenVerifier | None
    certificates: ProxyIdentity | None

    async def principal(self, request: Request, credentials: str | None) -> Principal:
        """Return who asks.

        Raises:
            UnauthenticatedError: nobody that we know.
            IssuerUnreachableError: a token, and the issuer's keys are not to be had.
            TooBusyError: too many unknown keys, or too many tokens that wait for their issuer's keys.
        """
        fingerprint = "" if self.certificates is None else self.certificates.fingerprint(request)
        if credentials is not None:
            return await self.holder(credentials)
        if request.headers.get("authorization"):
            raise UnauthenticatedError("send `Authorization: Bearer …`, and nothing else")
        if fingerprint:
            return await to_thread.run_sync(self.keys.authenticate_certificate, fingerprint)
        raise UnauthenticatedError("an API key is needed: send `Authorization: Bearer affidavit_…`")

    async def holder(self, credentials: str) -> Principal:
        """Return who holds a key or a token; errors as `principal`."""
        source = self._source(credentials)
        recalled = source.recall(credentials)
        if recalled is not None:
            return recalled
        if isinstance(source, TokenVerifier):  # whose issuer may be silent: its callers keep no key waiting
            return await source.authenticated(credentials)
        return await to_thread.run_sync(source.authenticate, credentials)

    def recalled(self, credentials: str) -> Principal | None:
        """Return who holds a key or a token that is remembered, where no certificate could matter."""
        return None if self.certificates is not None else self._source(credentials).recall(credentials)

    def _source(self, credentials: str) -> KeyStore | TokenVerifier:
        return self.keys if self.tokens is None or credentials.startswith(_KEY) else self.tokens
