"""Bearer tokens of an OpenID Connect issuer: who somebody is, by the issuer's signature alone.

A token counts when an asymmetric key of the issuer signed it (the algorithm is the key's, never one that the
token may choose), issuer, audience, subject and expiry are there and right, and it names exactly one role.
Addresses and keys inside a token (`jku`, `x5u`, `jwk`) are not looked at. A verified token is remembered
until it expires, a minute at most; what the issuer revokes it for counts no sooner than its expiry, so issue
short ones. The subject becomes a random pseudonym: no name, address or issuer's id enters the log.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import jwt
from anyio import CapacityLimiter, to_thread

from audit.principal import ROLES, Principal
from server.errors import SettingsError, UnauthenticatedError
from server.jwks import MAX_WAITING, IssuerKeys, UnknownKeyError
from server.settings import Settings

_logger = logging.getLogger(__name__)

ALGORITHMS: Final = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
MAX_TOKEN_CHARS: Final = 16_384
REMEMBERED_S: Final = 60.0
LEEWAY_S: Final = 30  # between the issuer's clock and ours, for `nbf` and `iat`; `exp` has none
_CACHE_SIZE: Final = 4_096
_THREADS: Final = 4  # that judge tokens: none of those which check API keys or readiness
_REFUSED: Final = "the token is malformed, expired, or not this issuer's for this service"
_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})
_NOT_OURS: Final = (jwt.PyJWTError, UnknownKeyError, ValueError, TypeError, RecursionError)
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """Which claims say what."""

    role: str
    region: str
    models: str
    site: str


class TokenVerifier:
    """Verifies the tokens of one issuer."""

    def __init__(
        self,
        *,
        issuer: str,
        audience: str,
        keys: IssuerKeys,
        claims: Claims,
        pseudonym: Callable[[str, str], str],
        clock: Callable[[], datetime],
    ) -> None:
        self._issuer, self._audience, self._keys, self._claims = issuer, audience, keys, claims
        self._pseudonym, self._clock = pseudonym, clock
        self._threads = CapacityLimiter(_THREADS)
        self._known: OrderedDict[bytes, tuple[Principal, int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def recall(self, token: str) -> Principal | None:
        """Return a remembered token's principal while it has not expired; touches no network."""
        known = self._known.get(hashlib.sha256(token.encode()).digest())
        if known is None:
            return None
        principal, expires, until = known
        if until <= time.monotonic() or expires <= self._clock().timestamp():
            return None
        return principal

    def authenticate(self, token: str) -> Principal:
        """Return whom the token is about; blocks while keys are fetched, for at most `server.jwks.WAIT_S`.

        Raises:
            UnauthenticatedError: it does not count; the answer never says why, the server's own log does.
            IssuerUnreachableError: the issuer's keys are not to be had.
        """
        return self._judged(token, self._keys.key)

    async def authenticated(self, token: str) -> Principal:
        """`authenticate` for an event loop: waits for keys without a thread, and judges on one of its own.

        Raises:
            UnauthenticatedError, IssuerUnreachableError: as `authenticate`.
            TooBusyError: too many wait for the issuer's keys.
        """
        try:
            algorithm_and_kid = _header(token)
        except _NOT_OURS as error:
            raise _refused(error) from error
        await self._keys.sought(algorithm_and_kid[1])
        return await to_thread.run_sync(self._judged, token, self._keys.at_hand, limiter=self._threads)

    def _judged(self, token: str, key_of: Callable[[str], jwt.PyJWK]) -> Principal:
        recalled = self.recall(token)
        if recalled is not None:
            return recalled
        try:
            claims = self._verified(token, key_of)
            principal = self._principal(claims)
        except _NOT_OURS as error:
            raise _refused(error) from error
        self._remember(token, principal, int(claims["exp"]))
        return principal

    def _verified(self, token: str, key_of: Callable[[str], jwt.PyJWK]) -> Mapping[str, Any]:
        algorithm, kid = _header(token)
        claims: Mapping[str, Any] = jwt.decode(
            token,
            key_of(kid),
            algorithms=[algorithm],
            audience=self._audience,
            issuer=self._issuer,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        if not isinstance(claims["sub"], str) or not 0 < len(claims["sub"]) <= 255:
            raise ValueError("its subject is no short text")
        if not isinstance(claims["exp"], (int, float)) or claims["exp"] <= self._clock().timestamp():
            raise ValueError("it has expired")
        return claims

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        names = self._claims
        given = claims.get(names.role)
        roles = [given] if isinstance(given, str) else given if isinstance(given, list) else []
        known = [role for role in roles if role in ROLES]
        if len(known) != 1:
            raise ValueError(f"claim {names.role} names {len(known)} roles of ours; exactly one is needed")
        region, site = claims.get(names.region, ""), claims.get(names.site, "")
        for name, value in ((names.region, region), (names.site, site)):
            if value != "" and not (isinstance(value, str) and _NAME.fullmatch(value)):
                raise ValueError(f"claim {name} is no name")
        if site and known[0] != "node":
            raise ValueError(f"claim {names.site} is for role node alone")
        models = claims.get(names.models, [])
        if not isinstance(models, list) or len(models) > 64:
            raise ValueError(f"claim {names.models} is no list of at most 64 names")
        if not all(isinstance(model, str) and _MODEL.fullmatch(model) for model in models):
            raise ValueError(f"claim {names.models} holds what is no model's name")
        if names.models in claims and not models:
            raise ValueError(f"claim {names.models} is empty: it allows no model")
        return Principal(
            id=self._pseudonym(self._issuer, claims["sub"]),
            role=known[0],
            site=site,
            region=region,
            models=tuple(sorted(set(models))),
            method="token",
        )

    def _remember(self, token: str, principal: Principal, expires: int) -> None:
        digest = hashlib.sha256(token.encode()).digest()
        with self._lock:
            self._known[digest] = (principal, expires, time.monotonic() + REMEMBERED_S)
            self._known.move_to_end(digest)
            while len(self._known) > _CACHE_SIZE:
                self._known.popitem(last=False)


def _header(token: str) -> tuple[str, str]:
    """The algorithm and the key's id that a token names, both of ours in form; errors are `_NOT_OURS`."""
    if len(token) > MAX_TOKEN_CHARS or not token.isascii():
        raise ValueError("longer than any token of ours, or no ASCII")
    header = jwt.get_unverified_header(token)
    algorithm, kid, kind = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {str(algorithm)[:20]!r} is none that we take")
    if not isinstance(kid, str) or not 0 < len(kid) <= 256:
        raise ValueError("it names no key")
    if "crit" in header or not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise ValueError("it is of another kind, or asks for what we do not know")
    return algorithm, kid


def _refused(error: Exception) -> UnauthenticatedError:
    _logger.info("a token was refused: %s: %s", type(error).__name__, str(error)[:200])
    return UnauthenticatedError(_REFUSED)


def token_verifier(
    settings: Settings, pseudonym: Callable[[str, str], str], clock: Callable[[], datetime]
) -> TokenVerifier | None:
    """Return what verifies tokens under these settings; None where no issuer is named.

    Raises:
        SettingsError: an issuer without an audience, or an address that may not be fetched.
    """
    if not settings.oidc_issuer:
        return None
    if not settings.oidc_audience:
        raise SettingsError("oidc_audience: name what tokens must be for; without it any service's would do")
    return TokenVerifier(
        issuer=settings.oidc_issuer,
        audience=settings.oidc_audience,
        keys=IssuerKeys(
            settings.oidc_issuer,
            settings.oidc_jwks_url,
            stale_s=settings.oidc_stale_s,
            most_waiting=max(
                1, min(MAX_WAITING, settings.max_in_flight // 4)
            ),  # the others' places stay free
        ),
        claims=Claims(
            role=settings.oidc_role_claim,
            region=settings.oidc_region_claim,
            models=settings.oidc_models_claim,
            site=settings.oidc_site_claim,
        ),
        pseudonym=pseudonym,
        clock=clock,
    )
