"""The parts of a charter that say how its model may answer, and by what its answers are watched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, Field, StringConstraints

from audit.answers import EXACT
from audit.decimals import decimal_text
from audit.reference import MAX_BINS, MAX_SIGMA_GRID, sketch_sensitivity
from federation._numbers import Number
from federation.errors import Problem

if TYPE_CHECKING:
    from federation.charter import Charter

PARTS: Final = ("reference", "answers", "fairness")


class Reference(BaseModel, frozen=True, extra="forbid"):
    """A noisy sketch of the training rows by declared bin, for the score of how far a row is from them."""

    bins: Annotated[int, Field(strict=True, ge=2, le=MAX_BINS)] = 8
    noise_multiplier: Number = Field(gt=0)


class Answers(BaseModel, frozen=True, extra="forbid"):
    """How much of an answer goes out; `cache` allows identical requests one computation, each an entry."""

    decimals: Annotated[int, Field(strict=True, ge=0, le=EXACT)] = EXACT
    label_only: Annotated[bool, Field(strict=True)] = False
    cache: Annotated[bool, Field(strict=True)] = False


class Fairness(BaseModel, frozen=True, extra="forbid"):
    """Features by whose values the public set's metrics are told apart."""

    groups: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=64)], ...],
        Field(min_length=1, max_length=16),
    ]


def serving_document(charter: Charter) -> dict[str, Any]:
    """Return the canonical form of the parts that the charter has."""
    document: dict[str, Any] = {}
    if charter.reference is not None:
        document["reference"] = {
            "bins": charter.reference.bins,
            "noise_multiplier": decimal_text(charter.reference.noise_multiplier),
        }
    if charter.answers is not None:
        document["answers"] = {
            "decimals": charter.answers.decimals,
            "label_only": int(charter.answers.label_only),
            "cache": int(charter.answers.cache),
        }
    if charter.fairness is not None:
        document["fairness"] = {"groups": list(charter.fairness.groups)}
    return document


def serving_fields(fields: dict[str, Any]) -> None:
    """Turn the canonical numbers of `answers` into what a `Charter` is built from, in place."""
    if "answers" in fields:
        part = fields["answers"]
        fields["answers"] = {
            **part,
            **{name: _flag(part[name]) for name in ("label_only", "cache")},
        }


def check_serving(charter: Charter) -> Iterator[Problem]:
    """Yield what these parts contradict."""
    if charter.reference is not None:
        rows = charter.privacy.max_rows_per_subject if charter.privacy.unit == "subject" else 1
        moved = sketch_sensitivity(len(charter.features), rows=rows, relation=charter.privacy.relation)
        if charter.reference.noise_multiplier * moved > MAX_SIGMA_GRID:
            yield Problem(
                path="reference.noise_multiplier",
                message="drowns any count, and passes what sites can draw",
                fix=f"write at most {MAX_SIGMA_GRID // moved}",
            )
    if charter.answers is not None and charter.answers.label_only and charter.task == "regression":
        yield Problem(
            path="answers.label_only",
            message="leaves nothing of a regression's answer",
            fix="write decimals: N to round the value",
        )
    if charter.fairness is not None:
        names = {feature.name for feature in charter.features}
        for index, group in enumerate(charter.fairness.groups):
            if group not in names or group in charter.fairness.groups[:index]:
                yield Problem(
                    path=f"fairness.groups[{index}]",
                    message=f"{group!r} is no feature of this charter, or stands twice",
                    fix="name features; numbers are told apart at the middle of their declared bounds",
                )


def _flag(value: object) -> object:
    return bool(value) if type(value) is int and value in (0, 1) else value
