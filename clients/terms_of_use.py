"""What a charter says of how answers of its models may be used, in lines for the people who decide on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audit.answers import EXACT


def terms_of_use(charter: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one line a term of a charter's canonical JSON values; what is not restricted is said too."""
    answers = charter.get("answers", {})
    return (
        _outgoing(answers),
        "identical requests may be answered from a cache, each with an entry of its own"
        if answers.get("cache")
        else "every answer is computed anew",
        "a person reviews each decision before it is final"
        if charter.get("decisions") == "legal_effect"
        else "no person has to review a decision",
        "every request says its legal basis" if "legal_basis" in charter else "no legal basis is asked for",
        f"asked for from {', '.join(charter['regions'])} alone"
        if charter.get("regions")
        else "asked for from any region",
        f"for {charter['max_age_days']} days after a version's registration"
        if "max_age_days" in charter
        else "for as long as a version is live",
        "answers are not explained"
        if answers.get("label_only")
        else "answers may be explained, feature by feature, where it is asked for",
        _scored(charter),
        *_groups(charter),
    )


def _outgoing(answers: Mapping[str, Any]) -> str:
    if answers.get("label_only"):
        return "an answer is a label, without a number"
    decimals = answers.get("decimals", EXACT)
    if decimals >= EXACT:
        return "an answer's numbers go out exactly as computed"
    return f"an answer's numbers go out with {decimals} decimals"


def _scored(charter: Mapping[str, Any]) -> str:
    if "reference" not in charter:
        return "how unusual a row is follows from the declared bounds alone"
    bins = charter["reference"]["bins"]
    return f"how unusual a row is follows from a noisy sketch of the training rows, {bins} bins"


def _groups(charter: Mapping[str, Any]) -> tuple[str, ...]:
    groups = charter.get("fairness", {}).get("groups", ())
    return (f"watched by groups of {', '.join(groups)}",) if groups else ()
