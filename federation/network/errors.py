"""What can go wrong between machines: one class an actor, stable codes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from federation.errors import FederationError


class NetworkError(FederationError):
    """The network part of a federation cannot do what was asked."""

    code = "network.error"


class PkiError(NetworkError):
    """A certificate or key is missing, malformed, or does not fit the others."""

    code = "network.pki"

    def __init__(self, path: Path, problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}; {fix}")
        self.path, self.problem, self.fix = path, problem, fix


class InvitationError(NetworkError):
    """The invitation is not one, or was cut short."""

    code = "network.invitation"


class JoinRefusedError(NetworkError):
    """The coordinator does not take a request; `reason` is one of `audit.membership.JOIN_REFUSALS`."""

    code = "network.join_refused"

    _TEXTS: ClassVar[dict[str, str]] = {
        "expired": "the invitation or the node key is past its time; ask the operator for an invitation",
        "identity_taken": "this identity key belongs to another site; add a site of your own",
        "key_taken": "this node key is registered already; make new keys with `affidavit site add`",
        "not_invited": "the coordinator knows no such invitation; check that the line is whole",
        "left": "the site has left; it comes back with a new invitation",
        "replaced": "the site has joined anew with another invitation",
        "revoked": "the operator has shut this site out; talk to them",
        "signature": "a signature of the request does not verify",
        "site_mismatch": "the invitation is for another site",
        "used": "the invitation was used already. If that was not you, somebody else has read it: "
        "tell the operator at once, they can revoke what was joined with it",
    }

    def __init__(self, site: str, reason: str) -> None:
        super().__init__(f"site {site or '?'}: {self._TEXTS.get(reason, reason)}")
        self.site, self.reason = site, reason


class MembershipError(NetworkError):
    """The site is not in the state that this step starts from."""

    code = "network.membership"


class ProcessError(NetworkError):
    """A supervised process did not start, or does not stay up."""

    code = "network.process"


class NotCarriedOutError(NetworkError):
    """Nobody carries the run out now; it has no end in the log and can be resumed."""

    code = "network.not_carried_out"


class RunControlError(NetworkError):
    """A run cannot be submitted, found or stopped."""

    code = "network.run"
