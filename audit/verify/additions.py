"""Part of the step on the answer: the score and the attributions that were committed to with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from audit.charter_view import CharterView
from audit.explanations import LINEAR, completeness_problem
from audit.verify.chain import Chain
from audit.verify.reference import scorer_of

OOD: Final = "ood"
ATTRIBUTIONS: Final = "attributions"


def split_answer(answered: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the answer itself, and what was added to it."""
    added = {name: answered[name] for name in (OOD, ATTRIBUTIONS) if name in answered}
    return {name: value for name, value in answered.items() if name not in added}, added


def addition_problem(
    chain: Chain,
    charter: CharterView,
    weights: Sequence[float],
    *,
    encoded: Sequence[float],
    outputs: Sequence[float],
    answer: Mapping[str, Any],
    added: Mapping[str, Any],
    site: int | None,
) -> str:
    """Return how what was added contradicts the sketch or the model, or ""."""
    problem = ""
    if OOD in added:
        problem = scorer_of(chain, charter).differs(added[OOD], encoded)
    elif charter.serving.reference is not None:
        problem = "the charter pays for a sketch, and the answer bears no score by it"
    if ATTRIBUTIONS in added and not problem:
        problem = completeness_problem(
            charter.layers,
            weights,
            charter.features,
            added[ATTRIBUTIONS],
            encoded=encoded,
            outputs=outputs,
            answer=answer,
            task=charter.task,
            label=charter.label,
            site=site,
            slack=charter.serving.answers.slack,
        )
    return problem


def said_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what the answer's step says of what was added to its rows."""
    said = "; the score beside it follows too" if any(OOD in row for row in rows) else ""
    explained = [row[ATTRIBUTIONS] for row in rows if ATTRIBUTIONS in row]
    if explained and all(found["method"] == LINEAR for found in explained):
        said += "; the attributions are the model's own terms"
    elif explained:
        said += (
            "; the attributions add up to what the model answers beyond its baseline, and how they are "
            "shared out is the server's word"
        )
    return said
