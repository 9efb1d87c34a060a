"""Who asks, what they ask, and who decides: the three types every use case takes.

A use case builds a `Question` and calls `require(authorizer, principal, question)` before it does anything.
Packages below the server know only the protocol; the server answers with Cedar policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from audit.errors import AuditError

AttributeValue = str | int | bool | tuple[str, ...]

ROLES: Final = ("node", "officer", "scientist", "consumer", "operator", "tester")

ACTIONS: Final = frozenset(
    {
        "predict",
        "models.read",
        "models.register",
        "models.approve",
        "models.rollback",
        "runs.start",
        "log.read",
        "log.read_own",
        "tiles.read",
        "entry.read",
        "log.cosign",
        "evidence.export",
        "keys.list",
        "keys.create",
        "keys.revoke",
        "keys.rotate",
        "metrics.read",
        "alarms.read",
        "alarms.close",
        "alarms.raise",
        "policy.read",
        "policy.change",
        "reviews.read",
        "reviews.write",
        "subjects.erase",
        "subjects.export",
        "subjects.find",
        "subjects.open",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Whoever asks. `id` is a random pseudonym; `key` the person's own public key, where they hold one."""

    id: str
    role: str  # one of ROLES
    key: str = ""
    site: str = ""  # the site that a node's key speaks for
    region: str = ""  # where they ask from, as their key or their issuer says; "" where neither does
    models: tuple[str, ...] = ()  # the only models they may ask; empty: any
    method: str = "key"  # "key" | "token" | "certificate": how they showed who they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One thing somebody wants to do to one resource."""

    action: str  # one of ACTIONS
    resource: str  # its name: a model, a leaf index, a run
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)  # what is known of the resource
    context: Mapping[str, AttributeValue] = field(default_factory=dict)  # what is known of the request


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The answer, the policies that determined it, and the digest of the policy set that was asked."""

    allowed: bool
    policies: tuple[str, ...]
    policy_set: str  # hex SHA-256


class Authorizer(Protocol):
    """Decides; never raises for a refusal, and refuses when it cannot decide."""

    def decide(self, principal: Principal, question: Question) -> Decision:
        """Return the decision on `question`."""
        ...


class AccessDeniedError(AuditError):
    """The authoriser said no; `decision` names the policies."""

    code = "access.denied"

    def __init__(self, principal: Principal, question: Question, decision: Decision) -> None:
        super().__init__(
            f"{question.action} on {question.resource} is refused to role {principal.role} "
            f"by {', '.join(decision.policies)}"
        )
        self.principal, self.question, self.decision = principal, question, decision
        self.entry: Mapping[str, int | str] | None = None  # where the log records it: leaf_index, leaf_hash


def require(authorizer: Authorizer, principal: Principal, question: Question) -> Decision:
    """Return the decision that allowed `question`.

    Raises:
        AccessDeniedError: it was refused.
    """
    decision = authorizer.decide(principal, question)
    if not decision.allowed:
        raise AccessDeniedError(principal, question, decision)
    return decision


class LocalOwner:
    """The authoriser of commands run by the person who owns the home's files: the file system decided."""

    POLICY: Final = "owner-of-the-home"
    POLICY_SET: Final = "0" * 64

    def decide(self, principal: Principal, question: Question) -> Decision:
        """Allow: whoever can write the home could do all of this without us."""
        return Decision(allowed=True, policies=(self.POLICY,), policy_set=self.POLICY_SET)
