"""The join routes: strict JSON in, strict JSON out; what a message is worth is its signature.

GET  /v1/join/ca                       the CA certificate; a site compares it with its invitation
POST /v1/join/request                  {secret, joined, enrolment}
GET  /v1/join/sites/<identity>         where a site's request stands; <identity> is SHA-256 of the key
GET  /v1/join/sites/<identity>/members the enrolments of all members, for an approved site
POST /v1/join/leave, /v1/join/keys     a signed site.left, site.keys_rotated
POST /v1/join/enrolment                a signed site.enrolled, with other keys of the same identity
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Final

from audit.canonical import parse_strict
from audit.entries import body_document
from audit.errors import AuditError
from federation.network.errors import JoinRefusedError, MembershipError
from federation.network.membership import Membership, utc_now
from federation.network.roster import Member

JSON: Final = "application/json"
PEM: Final = "application/x-pem-file"

_SITE: Final = re.compile(r"/v1/join/sites/([0-9a-f]{64})(/members)?")
_POSTS: Final = frozenset({"/v1/join/request", "/v1/join/leave", "/v1/join/keys", "/v1/join/enrolment"})


class JoinProblem(Exception):  # noqa: N818 - an answer, not a fault
    """A join route's answer that is no success; `code` is stable."""

    def __init__(self, status: int, code: str, detail: str, **fields: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.fields = status, code, detail, fields

    def document(self) -> dict[str, Any]:
        return {"code": self.code, "detail": self.detail, **self.fields}


class Joining:
    """Answers the join routes; synchronous, run in a thread."""

    MAX_BODY_BYTES: Final = 16 << 10

    def __init__(self, membership: Membership, ca_pem: bytes) -> None:
        self._membership, self._ca_pem = membership, ca_pem

    @staticmethod
    def knows(method: str, path: str) -> bool:
        if method == "GET":
            return path == "/v1/join/ca" or _SITE.fullmatch(path) is not None
        return method == "POST" and path in _POSTS

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, str]:
        """Return status, content and content type.

        Raises:
            JoinProblem: the request is refused.
        """
        if path == "/v1/join/ca":
            return 200, self._ca_pem, PEM
        try:
            document = self._dispatch(method, path, body)
        except JoinRefusedError as error:
            raise JoinProblem(403, error.code, str(error), reason=error.reason) from error
        except MembershipError as error:
            raise JoinProblem(409, error.code, str(error)) from error
        return 200, json.dumps(document).encode(), JSON

    def _dispatch(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        found = _SITE.fullmatch(path)
        if method == "GET" and found is not None:
            return self._site(found.group(1), members=found.group(2) is not None)
        document = _object(body)
        if path == "/v1/join/request":
            if set(document) != {"secret", "joined", "enrolment"} or not isinstance(document["secret"], str):
                raise JoinProblem(422, "network.malformed", "send secret, joined and enrolment")
            member = self._membership.request(document["secret"], document["joined"], document["enrolment"])
        elif path == "/v1/join/leave":
            member = self._membership.leave(document)
        elif path == "/v1/join/enrolment":
            member = self._membership.enrol(document)
        else:
            member = self._membership.rotate(document)
        return _shown(member)

    def _site(self, identity: str, *, members: bool) -> dict[str, Any]:
        member = next(
            (
                member
                for member in reversed(list(self._membership.roster.refresh()))
                if member.identity_key and identity_digest(member.identity_key) == identity
            ),
            None,
        )
        if member is None:
            raise JoinProblem(404, "network.unknown_site", "no site with that identity has asked to join")
        if not members:
            return _shown(member)
        if member.standing(utc_now()) != "approved":
            raise JoinProblem(403, "network.membership", "only members see the members")
        return {"enrolments": [body_document(item) for item in self._membership.members_enrolments()]}


def identity_digest(identity_key: str) -> str:
    """Return the path element that stands for an identity key."""
    return hashlib.sha256(identity_key.encode()).hexdigest()


def _shown(member: Member) -> dict[str, Any]:
    return {
        "site": member.site,
        "state": member.standing(utc_now()),
        "node_key": member.node_key,
        "node_expires": member.node_expires,
        "reason": member.reason,
    }


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = parse_strict(body)
    except AuditError as error:
        raise JoinProblem(422, "network.malformed", f"the body is not strict JSON: {error}") from error
    if not isinstance(document, dict):
        raise JoinProblem(422, "network.malformed", "the body is no JSON object")
    return document
