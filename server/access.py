"""The authoriser: Cedar policies decide every call, and each decision names the policies that made it.

Cedar skips a policy whose condition fails to evaluate, which would let a broken `forbid` allow; so any
evaluation error is a refusal here. Policies are checked against the schema when they are loaded, and every
request against the same schema when it is asked.

A decision is a pure function of the rules, the principal and the question (Cedar reads no clock), so
decisions on models are remembered by all three: a changed rule, key or model is another key of the memory,
and a change of rules drops it whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeAlias

import cedarpy

from audit.entries import PolicyApplied
from audit.principal import ROLES, AttributeValue, Decision, Principal, Question
from server.errors import PolicyLoadError
from server.policy_places import by_their_names, located, place_of

_logger = logging.getLogger(__name__)

DEFAULT_DENY: Final = "default-deny"
EVALUATION_ERROR: Final = "policy-evaluation-error"
MAX_TEXT_BYTES: Final = 49_152  # a change of rules is one entry, and holds the text

_RESOURCE_TYPES: Final = {
    "predict": "Model",
    "entry.read": "Entry",
    "evidence.export": "Entry",
    "reviews.read": "Entry",
}
OFFICERS_NEED: Final = ("policy.read", "policy.change")
_REMEMBERED: Final = 4_096


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


def with_shipped_schema(policies: str) -> PolicyText:
    """Return a federation's own policies under our schema: the requests are ours."""
    return PolicyText(policies=policies, schema=shipped_policies().schema)


def read_policies(path: Path) -> PolicyText:
    """Read a federation's own policies."""
    try:
        return with_shipped_schema(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyLoadError(f"{path}: cannot be read ({error}); give a Cedar file") from error


def authorizer_of(path: Path) -> CedarAuthorizer:
    """Load a file of rules.

    Raises:
        PolicyLoadError: as `CedarAuthorizer`; names the file, the line or the policy.
    """
    text = read_policies(path)
    try:
        return CedarAuthorizer(text)
    except PolicyLoadError as error:
        raise PolicyLoadError(f"{path}: {error}") from error


def locked_out(authorizer: CedarAuthorizer) -> tuple[str, ...]:
    """Return what an officer needs to change the rules and may not do under these, by `OFFICERS_NEED`.

    Asked for a plain officer, of no region and by an API key. With none left, the rules can be read and
    changed at the coordinator's home alone.
    """
    officer = Principal(id="p-officer", role="officer")
    asked = {action: Question(action=action, resource="service") for action in OFFICERS_NEED}
    return tuple(action for action in asked if not authorizer.decide(officer, asked[action]).allowed)


@dataclass(frozen=True, slots=True)
class _Rules:
    """One validated set; replaced as a whole, so that no decision sees half of a change."""

    policies: cedarpy.PolicySet
    schema: cedarpy.Schema
    text: PolicyText
    policy_set: str
    schema_digest: str
    names: frozenset[str]
    remembered: dict[Hashable, Decision]


class CedarAuthorizer:
    """Decides by a validated policy set, parsed once."""

    def __init__(self, text: PolicyText) -> None:
        """Load and validate.

        Raises: PolicyLoadError: the text does not parse, names something that the schema lacks, or leaves a
            policy without an `@id` or with one used twice.
        """
        self._rules = _load(text)

    def replace(self, text: PolicyText) -> None:
        """Decide by other rules from the next question on; errors as at the start, and nothing changes."""
        self._rules = _load(text)

    @property
    def text(self) -> PolicyText:
        return self._rules.text

    @property
    def policy_set(self) -> str:
        """SHA-256 of the policies' text."""
        return self._rules.policy_set

    @property
    def schema_digest(self) -> str:
        return self._rules.schema_digest

    @property
    def names(self) -> frozenset[str]:
        """The policies' names."""
        return self._rules.names

    def applied(self) -> PolicyApplied:
        """Return the entry that says which rules decide from now on."""
        rules = self._rules
        return PolicyApplied(
            policy_set=rules.policy_set,
            schema_digest=rules.schema_digest,
            engine=f"cedarpy {version('cedarpy')}",
        )

    def decide(self, principal: Principal, question: Question) -> Decision:
        """Ask Cedar. An evaluation error, an unknown role or an ill-typed request is a refusal."""
        rules = self._rules
        if principal.role not in ROLES:
            return _refused(rules, DEFAULT_DENY)
        kind = _RESOURCE_TYPES.get(question.action, "Service")
        if kind == "Entry":  # each is asked about once
            return _ask(rules, kind, principal, question)
        try:
            key = (principal, question.action, question.resource, _key(question.attributes),
                   _key(question.context))  # fmt: skip
            found = rules.remembered.get(key)
        except TypeError:  # an attribute of no kind that a question has: Cedar says so
            return _ask(rules, kind, principal, question)
        if found is None:
            found = _ask(rules, kind, principal, question)
            if EVALUATION_ERROR not in found.policies:
                if len(rules.remembered) >= _REMEMBERED:
                    rules.remembered.clear()
                rules.remembered[key] = found
        return found


FrozenAttributes: TypeAlias = "tuple[tuple[str, tuple[type, Any]], ...]"


def frozen(values: Mapping[str, Any]) -> FrozenAttributes:
    """Return attributes as what they are told apart by: 1, True and 1.0 are equal in Python, not in Cedar."""
    return tuple([(name, (type(value), value)) for name, value in values.items()])


class SharedAttributes(Mapping[str, AttributeValue]):
    """Attributes that many questions have in common: frozen and hashed once."""

    __slots__ = ("_hash", "_values", "frozen")

    def __init__(self, values: Mapping[str, AttributeValue]) -> None:
        self._values, self.frozen = dict(values), frozen(values)
        try:
            self._hash: int | None = hash(self.frozen)
        except TypeError:
            self._hash = None

    def __hash__(self) -> int:
        if self._hash is None:
            raise TypeError("an attribute is of no kind that a question has")
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, SharedAttributes) and self.frozen == other.frozen)

    def __getitem__(self, name: str) -> AttributeValue:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _key(values: Mapping[str, Any]) -> Hashable:
    return values if type(values) is SharedAttributes else frozen(values)


def _ask(rules: _Rules, kind: str, principal: Principal, question: Question) -> Decision:
    user = {"type": "Affidavit::User", "id": principal.id}
    resource = {"type": f"Affidavit::{kind}", "id": question.resource}
    role = {"type": "Affidavit::Role", "id": principal.role}
    attributes = {
        "name": principal.id,
        "site": principal.site,
        "region": principal.region,
        "models": list(principal.models),
        "method": principal.method,
    }
    entities: list[dict[str, Any]] = [
        {"uid": user, "attrs": attributes, "parents": [role]},
        {"uid": resource, "attrs": _plain(question.attributes), "parents": []},
    ]
    request = {
        "principal": user,
        "action": {"type": "Affidavit::Action", "id": question.action},
        "resource": resource,
        "context": _plain(question.context),
    }
    try:
        answer = cedarpy.is_authorized(request, rules.policies, entities, rules.schema)
        errors, reasons = answer.diagnostics.errors, sorted(answer.diagnostics.reasons)
    except (ValueError, TypeError) as error:
        _logger.error("action=%s cannot be evaluated: %s", question.action, error)
        return _refused(rules, EVALUATION_ERROR)
    if errors or answer.decision is cedarpy.Decision.NoDecision:
        _logger.error("action=%s evaluation errors: %s", question.action, "; ".join(errors))
        return _refused(rules, EVALUATION_ERROR)
    if not answer.allowed:
        return _refused(rules, *(reasons or [DEFAULT_DENY]))
    if not reasons:
        return _refused(rules, EVALUATION_ERROR)
    return Decision(allowed=True, policies=tuple(reasons), policy_set=rules.policy_set)


def _refused(rules: _Rules, *policies: str) -> Decision:
    return Decision(allowed=False, policies=policies, policy_set=rules.policy_set)


def _load(text: PolicyText) -> _Rules:
    size = len(text.policies.encode())
    if size > MAX_TEXT_BYTES:
        raise PolicyLoadError(f"the access policies are {size} bytes; at most {MAX_TEXT_BYTES} fit an entry")
    schema, policies, names = _checked(text)
    return _Rules(
        policies=policies,
        schema=schema,
        text=text,
        policy_set=hashlib.sha256(text.policies.encode()).hexdigest(),
        schema_digest=hashlib.sha256(text.schema.encode()).hexdigest(),
        names=names,
        remembered={},
    )


@lru_cache(maxsize=8)
def _checked(text: PolicyText) -> tuple[cedarpy.Schema, cedarpy.PolicySet, frozenset[str]]:
    """Parse and validate; the results are read-only, so that all who ask by one text may share them."""
    try:
        schema = cedarpy.Schema.from_str(text.schema)
    except ValueError as error:
        raise PolicyLoadError(f"the access policies' schema does not parse: {error}") from error
    try:
        document = json.loads(cedarpy.policies_to_json_str(text.policies))
    except ValueError as error:
        where = located(text.policies, str(error))
        raise PolicyLoadError(f"the access policies do not parse: {where}") from error
    verdict = cedarpy.validate_policies(text.policies, schema)
    if not verdict.validation_passed:
        reasons = "; ".join(by_their_names(error.error, document) for error in verdict.errors)
        raise PolicyLoadError(f"the access policies do not fit the schema: {reasons}")
    named = _named(document)
    policies = cedarpy.PolicySet.from_json_str(json.dumps(named))
    return schema, policies, frozenset(named["staticPolicies"])


def _named(document: dict[str, Any]) -> dict[str, Any]:
    """Key each policy by its `@id`, which the text format does not do by itself."""
    named: dict[str, Any] = {}
    for generated, policy in document.get("staticPolicies", {}).items():
        name = (policy.get("annotations") or {}).get("id")
        if not name:
            raise PolicyLoadError(
                f"{place_of(generated, document)} has no @id; name it, for the log records policies by name"
            )
        if name in named or name in (DEFAULT_DENY, EVALUATION_ERROR):
            raise PolicyLoadError(f'@id("{name}") is used twice or reserved; choose another')
        named[name] = policy
    if document.get("templates"):
        raise PolicyLoadError("policy templates are not used; write each policy out")
    return {**document, "staticPolicies": named}


def _plain(values: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
