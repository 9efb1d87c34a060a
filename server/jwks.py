"""An issuer's public keys: fetched, remembered, and used a while longer when the issuer cannot be reached.

Keys count for `LIFESPAN_S` after a fetch. A token that names a key we lack makes us look again, at most every
`COOLDOWN_S`, because anybody can invent key ids. When a fetch fails, the last keys count for `stale_s` more;
after that no token can be judged and all are refused with an error that says so. Only https is fetched (http
from this machine alone), no redirect is followed, and only public signature keys are kept.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import IO, Any, Final

import jwt

from server.errors import IssuerUnreachableError, SettingsError

_logger = logging.getLogger(__name__)

LIFESPAN_S: Final = 300.0
COOLDOWN_S: Final = 30.0  # between two looks for an unknown key id
RETRY_S: Final = 5.0  # between two tries of an issuer that failed
MAX_BYTES: Final = 1 << 20
MAX_KEYS: Final = 64
MIN_RSA_BITS: Final = 2_048
_TIMEOUT_S: Final = 5.0
_PUBLIC: Final = frozenset({"RSA", "EC", "OKP"})
_LOCAL: Final = frozenset({"127.0.0.1", "::1", "localhost"})

Fetch = Callable[[str], bytes]


class UnknownKeyError(Exception):
    """The issuer has no such key."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None  # an error follows, as for any other status


def fetch(url: str) -> bytes:
    """Return a small document.

    Raises:
        OSError: it cannot be had, redirects, or is too large.
    """
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as reply:
            data: bytes = reply.read(MAX_BYTES + 1)
    except HTTPException as error:
        raise OSError(f"{url}: {type(error).__name__}") from error
    if len(data) > MAX_BYTES:
        raise OSError(f"{url}: more than {MAX_BYTES} bytes")
    return data


def check_url(url: str, setting: str) -> str:
    """Return an address that may be fetched.

    Raises:
        SettingsError: it is neither https nor on this machine.
    """
    parts = urllib.parse.urlsplit(url)
    is_local = parts.scheme == "http" and parts.hostname in _LOCAL
    if not (parts.scheme == "https" or is_local) or not parts.hostname or parts.username or parts.fragment:
        raise SettingsError(f"{setting}: {url[:100]!r} is no https address; http is for this machine alone")
    return url


class IssuerKeys:
    """The keys of one issuer."""

    def __init__(
        self,
        issuer: str,
        jwks_url: str = "",
        *,
        stale_s: float = 3_600.0,
        fetch: Fetch = fetch,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = check_url(issuer, "oidc_issuer")
        self._jwks_url = check_url(jwks_url, "oidc_jwks_url") if jwks_url else ""
        self._stale_s, self._fetch, self._clock = stale_s, fetch, clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched = self._tried = float("-inf")
        self._failed = ""
        self._lock = threading.Lock()
        self.fetches = 0  # that were tried

    def key(self, kid: str) -> jwt.PyJWK:
        """Return the key of that id; blocks while it is fetched.

        Raises:
            UnknownKeyError: the issuer has none.
            IssuerUnreachableError: what is known is too old, and no more is to be had.
        """
        key = self._keys.get(kid)
        if key is not None and self._clock() - self._fetched < LIFESPAN_S:
            return key
        with self._lock:  # one fetches, the others wait for what it finds
            self._look(kid)
            if self._clock() - self._fetched >= LIFESPAN_S + self._stale_s:
                raise IssuerUnreachableError(
                    f"the keys of {self._issuer} cannot be fetched ({self._failed}), so no token counts; "
                    "try again later, or use an API key",
                    retry_after_s=int(RETRY_S),
                )
            key = self._keys.get(kid)
        if key is None:
            raise UnknownKeyError
        return key

    def _look(self, kid: str) -> None:
        now = self._clock()
        is_fresh = now - self._fetched < LIFESPAN_S
        if is_fresh and (kid in self._keys or now - self._tried < COOLDOWN_S):
            return
        if not is_fresh and self._failed and now - self._tried < RETRY_S:
            return
        self._tried = now
        self.fetches += 1
        try:
            found = self._read()
        except (OSError, ValueError, KeyError, TypeError, jwt.PyJWTError) as error:
            self._failed = f"{type(error).__name__}: {error}"[:200]
            _logger.error("the keys of %s cannot be fetched: %s", self._issuer, self._failed)
            return
        self._keys, self._fetched, self._failed = found, self._clock(), ""

    def _read(self) -> dict[str, jwt.PyJWK]:
        url = self._jwks_url or self._discovered()
        document = json.loads(self._fetch(url))
        given = document["keys"]
        if not isinstance(given, list) or len(given) > MAX_KEYS:
            raise ValueError(f"keys: is no list of at most {MAX_KEYS}")
        found = {}
        for item in given:
            key = _usable(item)
            if key is not None:
                found[item["kid"]] = key
        if not found:
            raise ValueError("it offers no public signature key with an id")
        return found

    def _discovered(self) -> str:
        url = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
        document = json.loads(self._fetch(url))
        if document["issuer"] != self._issuer:
            raise ValueError(f"{url} speaks for issuer {str(document['issuer'])[:100]!r}")
        try:
            return check_url(str(document["jwks_uri"]), "jwks_uri")
        except SettingsError as error:
            raise ValueError(str(error)) from error


def _usable(item: Any) -> jwt.PyJWK | None:
    """The key, if it is a public one for signatures; a symmetric or short one verifies nothing here."""
    if not isinstance(item, dict) or item.get("kty") not in _PUBLIC or item.get("use", "sig") != "sig":
        return None
    if not isinstance(item.get("kid"), str) or "d" in item:  # a private key in public is nobody's
        return None
    try:
        key = jwt.PyJWK.from_dict(item)
    except jwt.PyJWTError:
        return None
    if item["kty"] == "RSA" and key.key.key_size < MIN_RSA_BITS:
        return None
    return key
