"""The step on opened fields: which values the entries commit to, and which stay closed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audit.disclosure import CONTEXT, DisclosedPart, roots_of, values_of, verify_disclosed
from audit.entries import Prediction, SubjectErased, SubjectExported
from audit.errors import AuditError
from audit.verify.chain import Chain, FailError, Leaf, Located, Outcome, need
from audit.verify.history import INCLUSION
from audit.verify.report import Word

DISCLOSED = "The opened fields"
_SHOWN = 12  # entries, and fields of an entry, that the report names


def check_disclosed(chain: Chain) -> Outcome:
    """Every opened field, with the commitments of its neighbours, makes the root that its entry states."""
    disclosed = chain.evidence.disclosed or {}
    told = []
    for index, parts in disclosed.items():
        located = need(chain.located.get(index), INCLUSION)
        try:
            verify_disclosed(located.body, parts)
            for part in parts.values():
                values_of(part)
        except AuditError as error:
            raise FailError(error.code, f"leaf {index}: {error}", index) from error
        told.append(_told(located, parts))
    lines = told[:_SHOWN] + ([f"and {len(told) - _SHOWN} entries more"] if len(told) > _SHOWN else [])
    return Outcome(
        word=Word.PROVED,
        detail="; ".join([f"{len(told)} entries opened", *lines, *_about_person(chain, disclosed)]),
    )


def opened_rows(chain: Chain, leaf: Leaf[Prediction]) -> list[tuple[dict[str, Any], dict[str, Any]]] | None:
    """Return (input, output) of every row when the file opens them all; None when it does not."""
    parts = (chain.evidence.disclosed or {}).get(leaf.index, {})
    rows: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number in range(len(leaf.body.rows)):
        found = [parts.get(f"row.{number}.{side}") for side in ("input", "output")]
        if any(part is None or part.closed for part in found):
            return None
        given, answered = (values_of(part) for part in found if part is not None)
        rows.append((given, answered))
    return rows


def opened_context(chain: Chain, leaf: Leaf[Prediction]) -> tuple[str | None, str | None]:
    """Return purpose and legal basis of a sealed prediction, each None where it stays closed.

    A context that is opened and holds no legal basis gives "" for it.
    """
    part = (chain.evidence.disclosed or {}).get(leaf.index, {}).get(CONTEXT)
    if part is None:
        return None, None
    try:
        verify_disclosed(leaf.body, {CONTEXT: part})
        values = values_of(part)
    except AuditError as error:
        raise FailError(error.code, f"leaf {leaf.index}: {error}", leaf.index) from error
    purpose = str(values["purpose"]) if "purpose" in part.opened else None
    return purpose, None if "legal_basis" in part.closed else str(values.get("legal_basis", ""))


def _told(located: Located, parts: Mapping[str, DisclosedPart]) -> str:
    opened = [f"{name}.{field}" for name, part in parts.items() for field in part.opened]
    closed = [f"{name}.{field}" for name, part in parts.items() for field in part.closed]
    closed += [name for name in roots_of(located.body) if name not in parts]
    return f"leaf {located.index} commits to {_listed(opened)}; closed: {_listed(closed)}"


def _about_person(chain: Chain, disclosed: Mapping[int, Any]) -> list[str]:
    """What the file as a whole says about one person: how complete it claims to be, and an erasure."""
    told = []
    subject = chain.located.get(chain.evidence.leaf_index)
    if subject is not None and isinstance(subject.body, SubjectExported):
        body = subject.body
        here = [
            found for found in chain.located.values() if getattr(found.body, "subject", "") == body.subject
        ]
        count = sum(found.index < subject.index for found in here)
        if count != body.entries:
            raise FailError(
                "disclosed.incomplete",
                f"the export states {body.entries} entries about the person, the file has {count}",
                subject.index,
            )
        shut = [f for f in here if f.index < subject.index and roots_of(f.body) and f.index not in disclosed]
        told.append(
            f"all {count} entries that the operator's export (leaf {subject.index}) counts are here"
            + (f", {len(shut)} of them closed" if shut else "")
        )
    told += [f"leaf {leaf.index} says that they were erased" for leaf in chain.leaves(SubjectErased)]
    return told


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
