"""How a verifier reads what a charter says of answers: its sketch, its rounding, its groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from audit.answers import AnswerTerms
from audit.reference import Reference, SketchError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTerms:
    """The terms of answering under one charter."""

    reference: Reference | None
    answers: AnswerTerms
    groups: tuple[str, ...]

    @classmethod
    def of_charter(cls, charter: Mapping[str, Any]) -> ServingTerms:
        """Read the terms from a charter's canonical JSON values.

        Raises:
            AuditError: a part is malformed; names the key.
        """
        return cls(
            reference=_reference(charter), answers=AnswerTerms.of_charter(charter), groups=_groups(charter)
        )


def _reference(charter: Mapping[str, Any]) -> Reference | None:
    part = charter.get("reference")
    if part is not None and (
        not isinstance(part, Mapping)
        or set(part) != {"bins", "noise_multiplier"}
        or type(part["bins"]) is not int
    ):
        raise SketchError("reference holds exactly bins, a whole number, and noise_multiplier")
    return Reference.of_charter(charter)


def _groups(charter: Mapping[str, Any]) -> tuple[str, ...]:
    part = charter.get("fairness")
    if part is None:
        return ()
    groups = part.get("groups") if isinstance(part, Mapping) and set(part) == {"groups"} else None
    names = {feature["name"] for feature in charter["features"]}
    if not isinstance(groups, list) or not groups or len(set(map(str, groups))) < len(groups):
        raise SketchError("fairness holds exactly groups, a list of distinct features")
    if not all(isinstance(group, str) and group in names for group in groups):
        raise SketchError("fairness.groups names what is no feature")
    return tuple(groups)
