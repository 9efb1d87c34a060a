"""The authoriser: Cedar policies decide every call, and each decision names the policies that made it.

Cedar skips a policy whose condition fails to evaluate, which would let a broken `forbid` allow; so any
evaluation error is a refusal here. Policies are checked against the schema when they are loaded, and every
request against the same schema when it is asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import cedarpy

from audit.entries import PolicyApplied
from audit.principal import ROLES, Decision, Principal, Question
from server.errors import PolicyLoadError

_logger = logging.getLogger(__name__)

DEFAULT_DENY: Final = "default-deny"
EVALUATION_ERROR: Final = "policy-evaluation-error"

_RESOURCE_TYPES: Final = {"predict": "Model", "entry.read": "Entry", "evidence.export": "Entry"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyText:
    """The two texts, as found."""

    policies: str
    schema: str


def shipped_policies() -> PolicyText:
    """Read the policies that the package carries."""
    folder = resources.files("server.policies")
    return PolicyText(
        policies=folder.joinpath("access.cedar").read_text(encoding="utf-8"),
        schema=folder.joinpath("access.cedarschema").read_text(encoding="utf-8"),
    )


def read_policies(path: Path) -> PolicyText:
    """Read a federation's own policies; the schema stays ours, because the requests are."""
    try:
        return PolicyText(policies=path.read_text(encoding="utf-8"), schema=shipped_policies().schema)
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyLoadError(f"{path}: cannot be read ({error}); give a Cedar file") from error


@lru_cache(maxsize=8)
def _checked(text: PolicyText) -> tuple[cedarpy.Schema, cedarpy.PolicySet]:
    """Parse and validate; both results are read-only, so that all who ask by one text may share them."""
    try:
        schema = cedarpy.Schema.from_str(text.schema)
        document = json.loads(cedarpy.policies_to_json_str(text.policies))
    except ValueError as error:
        raise PolicyLoadError(f"the access policies do not parse: {error}") from error
    verdict = cedarpy.validate_policies(text.policies, schema)
    if not verdict.validation_passed:
        reasons = "; ".join(error.error for error in verdict.errors)
        raise PolicyLoadError(f"the access policies do not fit the schema: {reasons}")
    return schema, cedarpy.PolicySet.from_json_str(json.dumps(_named(document)))


class CedarAuthorizer:
    """Decides by a validated policy set, parsed once."""

    def __init__(self, text: PolicyText) -> None:
        """Load and validate.

        Raises: PolicyLoadError: the text does not parse, names something that the schema lacks, or leaves a
            policy without an `@id` or with one used twice.
        """
        self._schema, self._policies = _checked(text)
        self.policy_set = hashlib.sha256(text.policies.encode()).hexdigest()
        self.schema_digest = hashlib.sha256(text.schema.encode()).hexdigest()

    def applied(self) -> PolicyApplied:
        """Return the entry that says which rules decide from now on."""
        return PolicyApplied(
            policy_set=self.policy_set,
            schema_digest=self.schema_digest,
            engine=f"cedarpy {version('cedarpy')}",
        )

    def decide(self, principal: Principal, question: Question) -> Decision:
        """Ask Cedar. An evaluation error, an unknown role or an ill-typed request is a refusal."""
        if principal.role not in ROLES:
            return self._refused(DEFAULT_DENY)
        kind = _RESOURCE_TYPES.get(question.action, "Service")
        user = {"type": "Affidavit::User", "id": principal.id}
        resource = {"type": f"Affidavit::{kind}", "id": question.resource}
        role = {"type": "Affidavit::Role", "id": principal.role}
        entities: list[dict[str, Any]] = [
            {"uid": user, "attrs": {"name": principal.id, "site": principal.site}, "parents": [role]},
            {"uid": resource, "attrs": _plain(question.attributes), "parents": []},
        ]
        request = {
            "principal": user,
            "action": {"type": "Affidavit::Action", "id": question.action},
            "resource": resource,
            "context": _plain(question.context),
        }
        try:
            answer = cedarpy.is_authorized(request, self._policies, entities, self._schema)
            errors, reasons = answer.diagnostics.errors, sorted(answer.diagnostics.reasons)
        except ValueError as error:
            _logger.error("action=%s cannot be evaluated: %s", question.action, error)
            return self._refused(EVALUATION_ERROR)
        if errors or answer.decision is cedarpy.Decision.NoDecision:
            _logger.error("action=%s evaluation errors: %s", question.action, "; ".join(errors))
            return self._refused(EVALUATION_ERROR)
        if not answer.allowed:
            return self._refused(*(reasons or [DEFAULT_DENY]))
        if not reasons:
            return self._refused(EVALUATION_ERROR)
        return Decision(allowed=True, policies=tuple(reasons), policy_set=self.policy_set)

    def _refused(self, *policies: str) -> Decision:
        return Decision(allowed=False, policies=policies, policy_set=self.policy_set)


def _named(document: dict[str, Any]) -> dict[str, Any]:
    """Key each policy by its `@id`, which the text format does not do by itself."""
    named: dict[str, Any] = {}
    for generated, policy in document.get("staticPolicies", {}).items():
        name = (policy.get("annotations") or {}).get("id")
        if not name:
            raise PolicyLoadError(
                f"{generated} has no @id; name it, because the log records policies by name"
            )
        if name in named or name in (DEFAULT_DENY, EVALUATION_ERROR):
            raise PolicyLoadError(f'@id("{name}") is used twice or reserved; choose another')
        named[name] = policy
    if document.get("templates"):
        raise PolicyLoadError("policy templates are not used; write each policy out")
    return {**document, "staticPolicies": named}


def _plain(values: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
