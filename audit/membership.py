"""The bodies of entries about who belongs to a federation: how a site came in, and how it went.

`audit.bodies` holds all other bodies; these are entries like them, in a file of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

JOIN_REFUSALS: Final = frozenset(
    {"expired", "identity_taken", "key_taken", "not_invited", "revoked", "signature", "site_mismatch", "used"}
)
"""Why a request to join was not taken; all that the log says of it."""

NODE_REFUSALS: Final = frozenset({"expired", "forged_source", "left", "replayed", "revoked", "unregistered"})
"""Why the gateway turned a node away; one entry an hour for each key and reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteInvited:
    """The operator lets one site ask to join, once, for a time. The secret itself is kept by nobody here."""

    site: str
    label: str  # how people call it
    invitation: str  # SHA-256 of the secret
    expires: str  # time
    approval: str  # "operator": somebody looks at the request; "automatic": nobody does


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteJoined:
    """A site's signed request to join: its identity, and the key that its network node authenticates with."""

    site: str
    origin: str  # the log that the invitation named
    invitation: str
    identity_key: str
    node_key: str  # base64 of the DER SubjectPublicKeyInfo, P-384
    expires: str  # after that time the node key counts for nothing
    enrolment: str  # digest of the canonical site.enrolled body that came with it
    signature: str  # by the identity key


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteApproved:
    """The operator takes the request; from now on the node key may reach the federation."""

    site: str
    invitation: str
    identity_key: str
    node_key: str
    by: str  # "operator" or "invitation"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRevoked:
    """The operator shuts a site, or an invitation that nobody has used, out."""

    site: str
    invitation: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLeft:
    site: str
    origin: str
    invitation: str
    signature: str  # by the identity key


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteKeysRotated:
    """A site's network node has a new key; the old one counts for nothing from here on."""

    site: str
    origin: str
    invitation: str
    previous_key: str
    node_key: str
    expires: str
    signature: str  # by the identity key


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRefused:
    site: str  # of the invitation; "" when there is none
    invitation: str
    reason: str  # one of JOIN_REFUSALS


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRefused:
    site: str  # whose key it is or was; "" for a stranger's
    node_key: str  # SHA-256 of the DER key
    reason: str  # one of NODE_REFUSALS


MembershipBody = (
    SiteInvited
    | SiteJoined
    | SiteApproved
    | SiteRevoked
    | SiteLeft
    | SiteKeysRotated
    | JoinRefused
    | NodeRefused
)

MEMBERSHIP_TYPES: Final[dict[str, type[MembershipBody]]] = {
    "site.invited": SiteInvited,
    "site.joined": SiteJoined,
    "site.approved": SiteApproved,
    "site.revoked": SiteRevoked,
    "site.left": SiteLeft,
    "site.keys_rotated": SiteKeysRotated,
    "join.refused": JoinRefused,
    "node.refused": NodeRefused,
}

MEMBERSHIP_DOMAINS: Final[dict[type[MembershipBody], str]] = {
    SiteJoined: "joining",
    SiteLeft: "leaving",
    SiteKeysRotated: "node-key",
}
"""Which of them a site signs, always with its identity key, and the domain of the signature."""
