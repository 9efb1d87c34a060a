"""An issuer's public keys: fetched, remembered, and used a while longer when the issuer cannot be reached.

Keys count for `LIFESPAN_S` after a fetch. A token that names a key we lack makes us look again, at most every
`COOLDOWN_S`, because anybody can invent key ids. When a fetch fails, the last keys count for `stale_s` more;
after that no token can be judged and all are refused with an error that says so. Only https is fetched (http
from this machine alone), no redirect is followed, and only public signature keys are kept.

An issuer may also be silent: it takes the connection and says nothing. So one fetch at a time is under way,
on a thread of its own; who has a key that still counts never waits for it, and who has none waits until
`WAIT_S` after that fetch began, however many come, and nobody fetches again beside it. The next try comes no
sooner than `RETRY_S` after the last one ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from http.client import HTTPException
from typing import IO, Any, Final

import jwt

from server.errors import IssuerUnreachableError, SettingsError, TooBusyError

_logger = logging.getLogger(__name__)

LIFESPAN_S: Final = 300.0
COOLDOWN_S: Final = 30.0  # between two looks for an unknown key id
RETRY_S: Final = 5.0  # between the end of a try that failed and the next
WAIT_S: Final = 3.0  # after a fetch began: whoever waits for it waits no longer
MAX_WAITING: Final = 64  # requests of one worker that wait for a fetch; more are told to come back
MAX_BYTES: Final = 1 << 20
MAX_KEYS: Final = 64
MIN_RSA_BITS: Final = 2_048
_TIMEOUT_S: Final = 5.0  # of one step: connecting, and each reading
_MOST_S: Final = 15.0  # of reading one document
_CHUNK: Final = 1 << 16
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
        OSError: it cannot be had, redirects, is too large, or comes too slowly.
    """
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
    data, begun = b"", time.monotonic()
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as reply:
            while piece := reply.read1(_CHUNK):
                data += piece
                if len(data) > MAX_BYTES:
                    raise OSError(f"{url}: more than {MAX_BYTES} bytes")
                if time.monotonic() - begun > _MOST_S:
                    raise OSError(f"{url}: not all there after {_MOST_S:g} s")
    except HTTPException as error:
        raise OSError(f"{url}: {type(error).__name__}") from error
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


@dataclass(frozen=True, slots=True)
class _Known:
    """What one fetch found."""

    keys: Mapping[str, jwt.PyJWK]
    fetched: float  # when, by the clock


@dataclass(frozen=True, slots=True)
class _Flight:
    """A fetch under way."""

    until: float  # by the clock: nobody waits for it any longer
    done: Future[None]


class IssuerKeys:
    """The keys of one issuer; for several threads and an event loop."""

    def __init__(
        self,
        issuer: str,
        jwks_url: str = "",
        *,
        stale_s: float = 3_600.0,
        fetch: Fetch = fetch,
        clock: Callable[[], float] = time.monotonic,
        wait_s: float | None = None,
        most_waiting: int = MAX_WAITING,
    ) -> None:
        self._issuer = check_url(issuer, "oidc_issuer")
        self._jwks_url = check_url(jwks_url, "oidc_jwks_url") if jwks_url else ""
        self._stale_s, self._fetch, self._clock = stale_s, fetch, clock
        self._wait_s = WAIT_S if wait_s is None else wait_s
        self._known = _Known({}, float("-inf"))
        self._tried = float("-inf")  # when the last try began, and once it has ended, when that was
        self._failed = ""
        self._flight: _Flight | None = None
        self._waiting, self._most_waiting = 0, most_waiting
        self._lock = threading.Lock()  # held for bookkeeping alone, never during a fetch
        self.fetches = 0  # that were tried

    def key(self, kid: str) -> jwt.PyJWK:
        """Return the key of that id; blocks for at most `WAIT_S`, and not at all where a key is at hand.

        Raises:
            UnknownKeyError: the issuer has none.
            IssuerUnreachableError: what is known is too old, and no more is to be had.
        """
        flight = self._look(kid)
        if flight is not None:
            wait([flight.done], self._left_s(flight))
        return self.at_hand(kid)

    async def sought(self, kid: str) -> None:
        """Wait, without a thread, for what `key` would block for; `at_hand` then says what came of it.

        Raises:
            TooBusyError: as many requests as may wait do so already.
        """
        flight = self._look(kid)
        if flight is None or (left_s := self._left_s(flight)) <= 0:
            return
        if self._waiting >= self._most_waiting:
            raise TooBusyError("too many tokens wait for their issuer's keys; try again")
        self._waiting += 1
        try:
            await asyncio.wait([asyncio.wrap_future(flight.done)], timeout=left_s)
        finally:
            self._waiting -= 1

    def at_hand(self, kid: str) -> jwt.PyJWK:
        """Return the key of that id as far as is known now; never blocks.

        Raises:
            UnknownKeyError, IssuerUnreachableError: as `key`.
        """
        known = self._known
        if self._clock() - known.fetched >= LIFESPAN_S + self._stale_s:
            why = self._failed or "it has not answered yet"
            raise IssuerUnreachableError(
                f"the keys of {self._issuer} cannot be fetched ({why}), so no token counts; "
                "try again later, or use an API key",
                retry_after_s=int(RETRY_S),
            )
        key = known.keys.get(kid)
        if key is None:
            raise UnknownKeyError
        return key

    def _left_s(self, flight: _Flight) -> float:
        return max(0.0, flight.until - self._clock())

    def _look(self, kid: str) -> _Flight | None:
        """Begin a fetch where one is due; return the one under way that `kid` has to wait for."""
        now, known = self._clock(), self._known
        age, is_known = now - known.fetched, kid in known.keys
        if age < LIFESPAN_S and is_known:
            return None
        with self._lock:
            if self._flight is None and self._is_due(kid, now):
                self._begin(now)
            # with a key that still counts nobody waits: the fetch is for those who come later
            return None if is_known and age < LIFESPAN_S + self._stale_s else self._flight

    def _is_due(self, kid: str, now: float) -> bool:
        if now - self._known.fetched < LIFESPAN_S:
            return kid not in self._known.keys and now - self._tried >= COOLDOWN_S
        return not self._failed or now - self._tried >= RETRY_S

    def _begin(self, now: float) -> None:
        flight = _Flight(now + self._wait_s, Future())
        thread = threading.Thread(target=self._fly, args=(flight,), name="issuer-keys", daemon=True)
        thread.start()
        self._flight, self._tried = flight, now
        self.fetches += 1

    def _fly(self, flight: _Flight) -> None:
        found, failed = None, ""
        try:
            found = self._read()
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the next try must be possible
            failed = f"{type(error).__name__}: {error}"[:200]
            _logger.error("the keys of %s cannot be fetched: %s", self._issuer, failed)
        with self._lock:
            now = self._clock()
            if found is not None:
                self._known = _Known(found, now)
            self._failed, self._tried, self._flight = failed, now, None
        flight.done.set_result(None)

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
