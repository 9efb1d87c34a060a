"""Tests of rules, beside the rules: `access.cedar` has `access.tests.yaml`, a list of cases.

A case is a name, a principal, an action, what the model and the request are, and what must come of it:

    - name: a purpose that the charter does not list
      principal: {role: consumer}
      action: predict
      context: {purpose: marketing}
      expect: deny
      policies: [purpose-outside-charter]     # exactly these; left out: whichever

What a case leaves out of `model` and `context` is what an ordinary request has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, StrictBool, StrictInt, StrictStr, ValidationError

from audit.principal import ACTIONS, AttributeValue, Decision, Principal, Question
from server.access import CedarAuthorizer
from server.errors import PolicyLoadError

SUFFIX: Final = ".tests.yaml"
MAX_CASES: Final = 2_000

ORDINARY_MODEL: Final[dict[str, AttributeValue]] = {
    "name": "model",
    "purposes": ("triage",),
    "state": "live",
    "epsilon_micro": 1_000_000,
    "epsilon_limit_micro": 3_000_000,
    "regions": (),
    "age_days": 0,
    "max_age_days": 0,
    "drift_alarms": 0,
    "legal_basis_required": False,
    "legal_effect": False,
}
ORDINARY_CONTEXT: Final[dict[str, AttributeValue]] = {
    "purpose": "triage",
    "legal_basis": "",
    "consent": False,
    "over_quota": False,
}
_ENTRY: Final[dict[str, AttributeValue]] = {"principal": "", "site": "", "public": False}
_OF_ENTRIES: Final = ("entry.read", "evidence.export", "reviews.read")

Value = StrictBool | StrictInt | StrictStr | list[StrictStr]


class _Strict(BaseModel, frozen=True, extra="forbid"):
    pass


class CasePrincipal(_Strict):
    role: str
    id: str = "p-somebody"
    site: str = ""
    region: str = ""
    models: tuple[str, ...] = ()
    method: Literal["key", "token", "certificate"] = "key"


class Case(_Strict):
    """One question and what must come of it."""

    name: str
    principal: CasePrincipal
    action: str
    model: dict[str, Value] = {}
    entry: dict[str, Value] = {}
    context: dict[str, Value] = {}
    expect: Literal["allow", "deny"]
    policies: tuple[str, ...] | None = None

    def question(self) -> Question:
        """The question, with what an ordinary one has where the case says nothing."""
        if self.action == "predict":
            attributes, context = {**ORDINARY_MODEL, **_plain(self.model)}, {**ORDINARY_CONTEXT}
        else:
            attributes = {**_ENTRY, **_plain(self.entry)} if self.action in _OF_ENTRIES else {}
            context = {}
        resource = str(attributes.get("name", "service"))
        return Question(
            action=self.action,
            resource=resource,
            attributes=attributes,
            context={**context, **_plain(self.context)},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A case that came out otherwise."""

    name: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TestReport:
    """What the cases showed; `untested` are policies that no case names."""

    cases: int
    failed: tuple[Failed, ...]
    untested: tuple[str, ...] = field(default=())

    __test__ = False  # no test class, whatever its name begins with


def shipped_cases() -> tuple[Case, ...]:
    """The tests of the shipped rules."""
    text = resources.files("server.policies").joinpath("access" + SUFFIX).read_text(encoding="utf-8")
    return parse_cases(text, "access" + SUFFIX)


def tests_beside(path: Path) -> Path:
    """Where a rules file's tests are: `my.cedar` has `my.tests.yaml`."""
    return path.with_name(path.name.removesuffix(".cedar") + SUFFIX)


def read_cases(path: Path) -> tuple[Case, ...]:
    """Read a file of cases.

    Raises:
        PolicyLoadError: it cannot be read, or a case is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyLoadError(
            f"{path}: cannot be read ({error}); rules have their tests beside them"
        ) from error
    return parse_cases(text, str(path))


def parse_cases(text: str, source: str) -> tuple[Case, ...]:
    """Read cases from YAML; errors as `read_cases`."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PolicyLoadError(f"{source}: is not YAML ({error})") from error
    if not isinstance(document, list) or not 0 < len(document) <= MAX_CASES:
        raise PolicyLoadError(f"{source}: is no list of 1 to {MAX_CASES} cases")
    cases = []
    for number, item in enumerate(document, start=1):
        try:
            case = Case.model_validate(item)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PolicyLoadError(f"{source}: case {number}, {where}: {first['msg']}") from error
        if case.action not in ACTIONS:
            raise PolicyLoadError(f"{source}: case {number}, action: {case.action!r} is none")
        cases.append(case)
    return tuple(cases)


def run_cases(authorizer: CedarAuthorizer, cases: Sequence[Case]) -> TestReport:
    """Ask every case's question."""
    failed, named = [], set()
    for case in cases:
        principal = Principal(**case.principal.model_dump())
        decision = authorizer.decide(principal, case.question())
        named |= set(decision.policies)
        is_right = decision.allowed == (case.expect == "allow")
        if not is_right or (case.policies is not None and set(case.policies) != set(decision.policies)):
            wanted = case.expect if case.policies is None else f"{case.expect} by {', '.join(case.policies)}"
            failed.append(Failed(name=case.name, expected=wanted, found=_shown(decision)))
    untested = tuple(sorted(authorizer.names - named))
    return TestReport(cases=len(cases), failed=tuple(failed), untested=untested)


def _shown(decision: Decision) -> str:
    return f"{'allow' if decision.allowed else 'deny'} by {', '.join(decision.policies)}"


def _plain(values: dict[str, Any]) -> dict[str, AttributeValue]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
