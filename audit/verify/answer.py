"""Steps on one prediction: it was allowed, the version gives this answer, the receipt was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from audit.answers import EXACT, AnswerTerms
from audit.canonical import parse_canonical
from audit.commitments import commit, parse_salt, verify_opening
from audit.decimals import parse_decimal
from audit.disclosure import DisclosureError, opened_row, verify_disclosed
from audit.encoding import RowEncoder
from audit.entries import Prediction, RowCommitment, VersionRegistered, VersionTransition
from audit.errors import AuditError, LogKeyError
from audit.forward import forward
from audit.models import answer_of
from audit.receipts import Receipt, find_signer, verify_kept
from audit.row_tree import RowPathError, verify_row
from audit.verify.additions import addition_problem, said_of, split_answer
from audit.verify.aggregation import CHEAP_WORK, WEIGHTS
from audit.verify.approval import ANSWERING
from audit.verify.chain import Chain, FailError, GapError, Leaf, Outcome, expect, need
from audit.verify.disclosed import opened_context, opened_rows
from audit.verify.history import CHECKPOINT, INCLUSION, LINKS
from audit.verify.members import CHARTER
from audit.verify.report import Word
from audit.verify.review import check_terms

TEST_ONLY: Final = "prediction.test_only"
DECISION, ANSWER, RECEIPT = "The decision to answer", "The answer", "The receipt"
_TOLERANCE: Final = Decimal("0.000001")
_TOLD: Final = 3  # rows of which the report names the answers


def check_decision(chain: Chain) -> Outcome:
    """For a purpose of the charter and within its terms, by a version that was live."""
    charter, leaf = need(chain.charter, CHARTER), need(chain.prediction, LINKS)
    transition, body = need(chain.transition, LINKS), leaf.body
    if body.role == "tester":  # who may also ask what is not live, or drifts: the entry does not say whether
        raise GapError(TEST_ONLY, "a tester's answer: nothing may rest on it", leaf.index)
    if transition.body.to_state not in ANSWERING:
        expect(
            transition.body.to_state,
            "live",
            code="prediction.version_not_live",
            field="to_state",
            entry=leaf.index,
        )
    purpose: str | None = body.purpose
    basis: str | None = body.legal_basis
    if body.sealed:
        purpose, basis = opened_context(chain, leaf)
    check_terms(chain, basis, body.region, leaf.index)
    if purpose is not None and purpose not in charter.purposes:
        raise FailError("prediction.purpose", f"purpose {purpose!r} is not in the charter", leaf.index)
    if not body.policies or not all(body.policies):
        raise FailError("prediction.policies", "the entry names no policy that allowed it", leaf.index)
    if body.site and charter.site(body.site) is None:
        raise FailError("prediction.site", f"site {body.site!r} is not in the charter", leaf.index)
    for later in chain.leaves(VersionTransition):
        if later.body.model == body.model and transition.index < later.index < leaf.index:
            _check_still_live(later, body.version, leaf.index)
    asked = "a purpose that stays closed" if purpose is None else purpose
    allowed = f"asked by role {body.role} for {asked}, within the charter's terms"
    registered = need(chain.registered, LINKS)
    _check_age(chain, charter.max_age_days, registered, leaf)
    since = range(registered.index + 1, leaf.index)  # an old signature may have been logged a second time
    if purpose is not None and all(index in chain.located for index in since):
        return Outcome(word=Word.PROVED, detail=f"{allowed}; the version was live when it answered")
    return Outcome(
        word=Word.ATTESTED,
        detail=f"by the log's operator: {allowed}, and that no entry between leaves {registered.index} and "
        f"{leaf.index} that this file lacks retired the version",
    )


def check_answer(chain: Chain) -> Outcome:
    """Open the rows, encode them, run the version, compare."""
    leaf = need(chain.prediction, LINKS)
    opened = _opened_rows(chain, leaf)
    if opened is None:
        return Outcome(
            word=Word.ATTESTED,
            code="answer.not_opened",
            detail="by the log's operator: the entry commits to inputs and answers, and the file does not "
            "open them",
        )
    charter, weights = need(chain.charter, CHARTER), need(chain.weights, WEIGHTS)
    if not opened:
        raise FailError("answer.rows", "the entry answers no row", leaf.index)
    if len(opened) * charter.work > CHEAP_WORK and not chain.replay:
        raise GapError(
            "answer.too_costly", "running the model takes long; run again with --replay", leaf.index
        )
    encoder = RowEncoder(charter.features)
    names = charter.site_names
    site = names.index(leaf.body.site) if leaf.body.site else None
    parts = [(given, *split_answer(answered)) for given, answered in opened]
    for number, (given, answered, added) in enumerate(parts, start=1):
        try:
            encoded = encoder.encode(given)
            outputs = forward(charter.layers, weights, encoded, site)
            computed = answer_of(charter.task, charter.label, outputs)
        except AuditError as error:
            raise FailError("answer.not_recomputable", f"row {number}: {error}", leaf.index) from error
        problem = _difference(answered, computed, charter.label, charter.serving.answers)
        if problem:
            raise FailError("answer.other_model", f"row {number}: {problem}", leaf.index)
        problem = addition_problem(
            chain,
            charter,
            weights,
            encoded=encoded,
            outputs=outputs,
            answer=answered,
            added=added,
            site=site,
        )
        if problem:
            raise FailError("answer.additions", f"row {number}: {problem}", leaf.index)
    count, of = len(opened), leaf.body.row_count
    shown = f"{count} of {of} rows" if of else f"{count} row{'s' if count > 1 else ''}"
    numbers = [int(row["row"]) for row in chain.evidence.opened or ()] if of else range(count)
    told = _told(numbers, [answered for _, answered, _ in parts])
    return Outcome(
        word=Word.PROVED,
        detail=f"{shown} opened ({told}); this version gives exactly this answer"
        + _rounding(charter.serving.answers)
        + said_of([added for _, _, added in parts]),
    )


def check_receipt(chain: Chain) -> Outcome:
    """The receipt is the log's, for this entry, and was kept."""
    subject = need(chain.located.get(chain.evidence.leaf_index), INCLUSION)
    checkpoint = need(chain.checkpoint, CHECKPOINT)
    need(chain.log, CHECKPOINT)
    try:
        receipt = Receipt.parse(chain.receipt or b"")
        signer = find_signer(receipt, chain.believed_keys)
    except AuditError as error:
        raise FailError("receipt.invalid", str(error)) from error
    if chain.keys is not None:
        try:  # a tree with this entry has at least leaf_index + 1 entries
            chain.keys.check(signer.vkey, receipt.leaf_index + 1, witnessed=chain.is_witnessed)
        except LogKeyError as error:
            raise FailError(error.code, f"the receipt: {error}", error.leaf_index) from error
    expect(
        receipt.leaf_index, subject.index, code="receipt.other_entry", field="leaf_index", entry=subject.index
    )
    expect(
        receipt.leaf_hash.hex(),
        subject.leaf_hash,
        code="receipt.other_entry",
        field="leaf_hash",
        entry=subject.index,
    )
    try:
        verify_kept(receipt, checkpoint, chain.evidence.proofs.get(subject.index, ()))
    except AuditError as error:
        raise FailError("receipt.broken", str(error), subject.index) from error
    return Outcome(
        word=Word.PROVED, detail=f"promised by the log at {receipt.time}, and kept: leaf {subject.index}"
    )


def _check_still_live(later: Leaf[VersionTransition], version: str, entry: int) -> None:
    if later.body.version == version and later.body.to_state not in ANSWERING:
        raise FailError(
            "prediction.version_not_live",
            f"leaf {later.index} had made the version {later.body.to_state}",
            entry,
        )


def _check_age(
    chain: Chain, max_age_days: int, registered: Leaf[VersionRegistered], leaf: Leaf[Prediction]
) -> None:
    """The version answered within the charter's days since its registration; a minute is given to clocks."""
    if not max_age_days:
        return
    begun, asked = (
        datetime.fromisoformat(chain.located[i].entry.time) for i in (registered.index, leaf.index)
    )
    if asked - begun >= timedelta(days=max_age_days + 1, minutes=1):
        raise FailError(
            "prediction.version_too_old",
            f"the charter lets a version answer for {max_age_days} days after its registration, and it was "
            f"registered {(asked - begun).days} days before",
            leaf.index,
        )


def _opened_rows(chain: Chain, leaf: Leaf[Prediction]) -> list[tuple[dict[str, Any], dict[str, Any]]] | None:
    """Return (input, output) of each row that the file opens, proved to be the entry's; None: none."""
    given = chain.evidence.opened
    if given is None:
        rows = opened_rows(chain, leaf) if leaf.body.sealed else None
        if rows is not None:
            _check_parts(chain, leaf)
        return rows
    if leaf.body.rows_root or leaf.body.row_count:
        return _opened_from_tree(given, leaf)
    expect(
        len(given), len(leaf.body.rows), code="answer.rows", field="number of opened rows", entry=leaf.index
    )
    if any("path" in row for row in given):
        raise FailError("answer.rows", "the entry holds its rows itself, and needs no path", leaf.index)
    sealed = bool(leaf.body.sealed)
    return [
        _open(row, commitment, number, leaf.index, sealed)
        for number, (row, commitment) in enumerate(zip(given, leaf.body.rows, strict=True), start=1)
    ]


def _opened_from_tree(
    given: Sequence[Mapping[str, str]], leaf: Leaf[Prediction]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (input, output) of the rows that the file opens, each proved to be under the entry's root."""
    body, rows, seen = leaf.body, [], set()
    if body.rows or body.sealed or not body.rows_root or body.row_count < 1:
        raise FailError("answer.rows", "the entry holds its rows in two ways, or in none", leaf.index)
    for row in given:
        text = row.get("row", "")
        if not (text.isascii() and text.isdigit() and str(int(text[:9])) == text) or text in seen:
            raise FailError("answer.rows", "an opened row has no number, or one used twice", leaf.index)
        seen.add(text)
        number = int(text)
        commitments: dict[str, str] = {}
        documents: dict[str, Any] = {}
        for field in ("input", "output"):
            try:
                salt, value = parse_salt(row[f"{field}_salt"]), row[field].encode()
                commitments[field] = commit(field, salt, value)
                documents[field] = parse_canonical(value)
            except (AuditError, ValueError) as error:
                raise FailError("answer.commitment", f"row {text}, {field}: {error}", leaf.index) from error
            if not isinstance(documents[field], dict):
                raise FailError("answer.commitment", f"row {text}, {field}: is not an object", leaf.index)
        try:
            verify_row(RowCommitment(**commitments), number, body.row_count, row["path"], body.rows_root)
        except RowPathError as error:
            raise FailError("answer.row_path", str(error), leaf.index) from error
        rows.append((documents["input"], documents["output"]))
    return rows


def _check_parts(chain: Chain, leaf: Leaf[Prediction]) -> None:
    try:
        verify_disclosed(leaf.body, (chain.evidence.disclosed or {}).get(leaf.index, {}))
    except AuditError as error:
        raise FailError("answer.commitment", str(error), leaf.index) from error


def _open(
    row: Mapping[str, str], commitment: RowCommitment, number: int, entry: int, sealed: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    opened: list[dict[str, Any]] = []
    for field in ("input", "output"):
        try:
            document = _value(row, getattr(commitment, field), field, number - 1, sealed)
        except (AuditError, ValueError) as error:
            raise FailError("answer.commitment", f"row {number}, {field}: {error}", entry) from error
        if not isinstance(document, dict):
            raise FailError("answer.commitment", f"row {number}, {field}: is not an object", entry)
        opened.append(document)
    return opened[0], opened[1]


def _value(row: Mapping[str, str], commitment: str, field: str, number: int, sealed: bool) -> Any:
    if sealed:
        part = f"row.{number}.{field}"
        root, values = opened_row(part, row[f"{field}_salt"], row[field])
        if root != commitment:
            raise DisclosureError(part, "salt and values do not open what the entry commits to")
        return values
    salt, value = parse_salt(row[f"{field}_salt"]), row[field].encode()
    verify_opening(commitment, field=field, salt=salt, value=value)
    return parse_canonical(value)


def _told(numbers: Sequence[int], answers: Sequence[Mapping[str, Any]]) -> str:
    """Return which rows these are, counted from 1, and their answers: one row passes for no other."""
    said = []
    for number, answer in list(zip(numbers, answers, strict=True))[:_TOLD]:
        given = [f"{name} {answer[name]}" for name in ("probability", "value") if name in answer]
        said.append(
            f"row {number + 1}: " + ", ".join([str(answer.get("label", ""))[:60], *given]).strip(", ")
        )
    more = len(answers) - len(said)
    return "; ".join([*said, f"and {more} more"] if more else said)


def _rounding(terms: AnswerTerms) -> str:
    """Return what the charter holds back of an answer, for the step's detail."""
    if terms.label_only:
        return ", of which the charter lets out the label alone"
    return "" if terms.decimals == EXACT else f", rounded by the charter to {terms.decimals} decimals"


def _difference(
    answered: Mapping[str, Any],
    computed: Mapping[str, Any],
    label: Mapping[str, Any],
    terms: AnswerTerms,
) -> str:
    """Return how the answer differs from the recomputed one by more than rounding, or ""."""
    wanted = terms.released(computed)
    if set(answered) != set(wanted):
        return f"the answer has {sorted(answered)}, the model gives {sorted(wanted)}"
    tolerance = _TOLERANCE + terms.slack
    labels = [computed["label"]]
    for field in ("probability", "value", "probabilities"):
        if field not in computed:
            continue
        ours = _numbers(computed[field])
        theirs = _numbers(answered[field]) if field in wanted else ours
        same_shape = field not in wanted or isinstance(answered[field], list) == isinstance(
            computed[field], list
        )
        if (
            not same_shape
            or len(theirs) != len(ours)
            or any(abs(a - b) > tolerance for a, b in zip(theirs, ours, strict=True))
            or (field in wanted and not all(map(terms.is_rounded, theirs)))
        ):
            return f"{field} is {answered[field]!s:.60}, the model gives {computed[field]!s:.60}"
        if field != "value":  # rounding may decide between classes as likely as each other
            chances = [Decimal(1) - ours[0], *ours] if field == "probability" else ours
            near = max(chances) - 2 * _TOLERANCE
            labels += [name for name, chance in zip(label["classes"], chances, strict=True) if chance >= near]
    if answered["label"] not in labels:
        return f"label is {answered['label']!s:.40}, the model gives {computed['label']!s:.40}"
    return ""


def _numbers(value: Any) -> list[Decimal]:
    try:
        return [parse_decimal(item) for item in (value if isinstance(value, list) else [value])]
    except AuditError:
        return []
