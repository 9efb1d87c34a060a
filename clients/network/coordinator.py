"""A site's questions to its coordinator, over TLS with the CA pinned by the invitation; always outbound."""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from audit.entries import SiteEnrolled, body_document, parse_body
from audit.errors import AuditError
from clients.errors import ClientsError
from federation.network.errors import JoinRefusedError
from federation.network.pki import pem_fingerprint

TIMEOUT_S: Final = 20.0
MAX_ANSWER_BYTES: Final = 4 << 20


class WrongCaError(ClientsError):
    """Somebody else answers at the coordinator's address, or its CA was replaced."""

    code = "site.wrong_ca"

    def __init__(self, address: str, *, expected: str, found: str) -> None:
        super().__init__(
            f"{address} shows the CA {found[:16]}…, the invitation pins {expected[:16]}…: this is not your "
            "coordinator, or its CA is new. Do not go on; call the operator. It is entered in the site's log"
        )
        self.address, self.expected, self.found = address, expected, found


class CoordinatorError(ClientsError):
    """The coordinator does not answer, or not in the protocol; `code` is its own where it gave one."""

    def __init__(self, message: str, code: str = "site.coordinator") -> None:
        super().__init__(message)
        self.code = code


def fetch_ca(address: str, fingerprint: str) -> bytes:
    """Return the CA certificate whose fingerprint the invitation pins.

    The connection is not authenticated, and need not be: nothing is sent, and what comes is compared.

    Raises:
        WrongCaError: it is another CA.
        CoordinatorError: nobody answers there.
    """
    try:
        with httpx.Client(verify=False, timeout=TIMEOUT_S) as client:  # noqa: S501 - see above
            pem = client.get(f"https://{address}/v1/join/ca").raise_for_status().content
        found = pem_fingerprint(pem[:MAX_ANSWER_BYTES])
    except httpx.HTTPError as error:
        raise CoordinatorError(f"{address} does not answer: {error}") from error
    except ValueError as error:
        raise CoordinatorError(f"{address} shows no certificate; is it a coordinator's gateway?") from error
    if found != fingerprint:
        raise WrongCaError(address, expected=fingerprint, found=found)
    return pem


def pinned_context(ca: Path) -> ssl.SSLContext:
    """Return a context that believes this one CA, and checks the host's name."""
    context = ssl.create_default_context(cafile=str(ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@dataclass(frozen=True, slots=True)
class CoordinatorLink:
    """The join routes of one coordinator; see `server.network.joining`."""

    address: str
    ca: Path

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"https://{self.address}", verify=pinned_context(self.ca), timeout=TIMEOUT_S
        )

    def request(self, secret: str, joined: Any, enrolment: SiteEnrolled) -> dict[str, Any]:
        body = {
            "secret": secret,
            "joined": body_document(joined),
            "enrolment": body_document(enrolment),
        }
        return self._ask("POST", "/v1/join/request", body)

    def standing(self, identity_key: str) -> dict[str, Any]:
        """Return {"site", "state", "node_key", "node_expires", "reason"} of this identity."""
        return self._ask("GET", f"/v1/join/sites/{_digest(identity_key)}")

    def members(self, identity_key: str) -> tuple[SiteEnrolled, ...]:
        """Return the members' enrolments; nothing is believed of them yet."""
        answer = self._ask("GET", f"/v1/join/sites/{_digest(identity_key)}/members")
        try:
            return tuple(parse_body(SiteEnrolled, item) for item in answer["enrolments"])
        except (AuditError, KeyError, TypeError) as error:
            raise CoordinatorError(f"{self.address} lists no members: {error}") from error

    def leave(self, body: Any) -> dict[str, Any]:
        return self._ask("POST", "/v1/join/leave", body_document(body))

    def rotate(self, body: Any) -> dict[str, Any]:
        return self._ask("POST", "/v1/join/keys", body_document(body))

    def enrol(self, body: SiteEnrolled) -> dict[str, Any]:
        return self._ask("POST", "/v1/join/enrolment", body_document(body))

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            with self.client() as client:
                reply = client.request(method, path, json=body)
            document: Any = json.loads(reply.content[:MAX_ANSWER_BYTES] or b"{}")
        except httpx.ConnectError as error:
            if "certificate" in str(error).lower():
                raise CoordinatorError(
                    f"{self.address} does not prove to be the coordinator ({error}); call the operator",
                    "site.wrong_ca",
                ) from error
            raise CoordinatorError(f"{self.address} does not answer: {error}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise CoordinatorError(f"{self.address} does not answer: {error}") from error
        if not isinstance(document, dict):
            raise CoordinatorError(f"{self.address} does not speak the join protocol")
        if reply.status_code < 400:
            return document
        if isinstance(document.get("reason"), str):
            raise JoinRefusedError("", document["reason"])
        code, detail = document.get("code"), document.get("detail")
        if isinstance(code, str) and isinstance(detail, str):
            raise CoordinatorError(detail[:500], code[:80])
        raise CoordinatorError(f"{self.address} answered {reply.status_code}")


def _digest(identity_key: str) -> str:
    return hashlib.sha256(identity_key.encode()).hexdigest()
