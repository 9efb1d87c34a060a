"""What is asked and answered, and the steps from one to the other that wait for nothing: plain functions.

`server.service` takes them for one request, with the waiting between them; `server.crowd` takes each of them
for all requests of a turn before the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from audit.canonical import canonical_bytes
from audit.commitments import commit, new_salt
from audit.encoding import EncodingError, PlainRow, plain_row
from audit.entries import ZERO_DIGEST, Prediction, RowCommitment
from audit.principal import Decision
from audit.row_tree import RowTree
from server.errors import RowContractError
from server.hooks import Answering
from server.warm import WarmModel
from server.watching import Level

Opened = tuple[dict[str, str], ...]


class Asked(NamedTuple):  # one a request, as `Answered`: a frozen dataclass would cost four times as much
    """One request for answers."""

    model: str
    purpose: str
    rows: Sequence[Mapping[str, Any]]
    request_id: str
    site: str | None = None
    version: str | None = None  # a digest, "live" or "candidate"; None: live, or a canary by its share
    subject: str | None = None  # the caller's own id for the person that the rows are about
    legal_basis: str | None = None  # one of audit.serving_bodies.LEGAL_BASES
    consent: str | None = None  # the caller's reference of the person's consent; to the vault
    explain: bool = False  # attribute each answer to its features


TEST_ONLY: Final = "a tester's answer: nothing may rest on it"


def never_final(role: str, transition: str) -> str:
    """Return why nothing may ever rest on an answer, whoever reviews it, or ""."""
    return TEST_ONLY if role == "tester" or transition == ZERO_DIGEST else ""


class Answered(NamedTuple):
    """The answers and all that proves them."""

    model: str
    version: str
    answers: tuple[dict[str, Any], ...]  # numbers as decimal text
    decision: Decision
    request_id: str
    leaf_index: int
    leaf_hash: str
    entry_id: str  # by which `/v1/receipts` knows it
    receipt: dict[str, Any]
    opened: Opened
    sealed: dict[str, str] | None = None  # of a named person: pseudonym, and what opens the context
    level: Level = "sequenced"
    proof: str | None = None  # C2SP tlog-proof, above "sequenced"
    annotations: Mapping[str, Any] = MappingProxyType({})  # what `server.hooks` added
    review: str = ""  # what names this decision at /v1/reviews, where a person must review it; else ""
    never_final: str = ""  # why no review can make it final; "" where one can


def encode(warm: WarmModel, asked: Asked) -> tuple[list[dict[str, Any]], list[list[float]]]:
    quick = [warm.encoder.read_plain(row) for row in asked.rows]
    if None not in quick:
        read = [found for found in quick if found is not None]
        return [plain for plain, _ in read], [encoded for _, encoded in read]
    plain, most = [], len(warm.encoder.names)
    for number, row in enumerate(asked.rows):
        if len(row) > most:
            raise _too_wide(number, row, frozenset(warm.encoder.names))
        try:
            plain.append(plain_row(row))
        except EncodingError as error:
            fields = [
                {"row": number, "field": found.field, "problem": found.message, "code": found.code}
                for found in error.problems
            ]
            raise RowContractError(f"row {number}, {error}", fields=fields) from error
    return plain, warm.encode(plain)


def _too_wide(number: int, row: Mapping[str, Any], names: frozenset[str]) -> RowContractError:
    """The error of a row with more features than the charter has; some that are not its are named."""
    problem = "is not in the charter; leave it out"
    fields = [
        {"row": number, "field": name[:80], "problem": problem, "code": "unknown_field"}
        for name in islice((name for name in row if name not in names), 50)
    ]
    return RowContractError(f"row {number}, {fields[0]['field']}: {problem}", fields=fields)


@dataclass(frozen=True, slots=True)
class Commitments:
    """What an entry holds of its rows: one stands in it, many are leaves of a tree."""

    rows: tuple[RowCommitment, ...] = ()
    row_count: int = 0
    rows_root: str = ""


def entry_of(answering: Answering, rows: Commitments) -> Prediction:
    asked, served, decision = answering.asked, answering.served, answering.decision
    principal = answering.principal
    return Prediction(
        request_id=asked.request_id,
        model=served.model,
        version=served.version,
        charter=served.charter_digest,
        transition=served.transition,
        purpose=asked.purpose,
        principal=principal.id,
        role=principal.role,
        site=asked.site or "",
        policies=decision.policies,
        policy_set=decision.policy_set,
        rows=rows.rows,
        row_count=rows.row_count,
        rows_root=rows.rows_root,
        legal_basis=asked.legal_basis or "",
        region=principal.region,
    )


def commit_row(row: Mapping[str, Any], answer: Mapping[str, Any]) -> tuple[str, str, dict[str, str]]:
    """Return the commitments to a row and to its answer, and what opens them."""
    input_text = row.canonical() if type(row) is PlainRow else canonical_bytes(row)
    output_text = canonical_bytes(answer)
    input_salt, output_salt = new_salt(), new_salt()
    opened = {
        "input_salt": input_salt.hex(),
        "output_salt": output_salt.hex(),
        "input": input_text.decode(),
        "output": output_text.decode(),
    }
    return commit("input", input_salt, input_text), commit("output", output_salt, output_text), opened


def commit_rows(
    plain: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> tuple[Commitments, Opened]:
    """Return the commitments to each row and answer, and what opens them."""
    commitments: list[RowCommitment] = []
    opened: list[dict[str, str]] = []
    for row, answer in zip(plain, answers, strict=True):
        given, said, opening = commit_row(row, answer)
        commitments.append(RowCommitment(input=given, output=said))
        opened.append(opening)
    if len(commitments) == 1:
        return Commitments(rows=tuple(commitments)), tuple(opened)
    tree = RowTree(commitments)
    for number, opening in enumerate(opened):
        opening["row"], opening["path"] = str(number), tree.path(number)
    return Commitments(row_count=len(commitments), rows_root=tree.root), tuple(opened)
