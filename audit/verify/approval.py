"""Steps on the model's worth and the decision to use it: metrics and gates, recomputed; the officers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from audit.charter_view import CharterView
from audit.decimals import parse_decimal, rounded_text
from audit.entries import ZERO_DIGEST, GateResult, VersionTransition
from audit.errors import AuditError
from audit.forward import forward
from audit.metrics import evaluate, gate_passes, gate_result
from audit.private_evaluation import SOURCE, private_gate
from audit.public_set import read_public_set
from audit.verify.aggregation import CHEAP_WORK, WEIGHTS
from audit.verify.chain import Chain, FailError, GapError, Leaf, Outcome, expect, need, verify_body
from audit.verify.evaluation import check_evaluation
from audit.verify.history import LINKS
from audit.verify.members import CHARTER
from audit.verify.reference import check_reference
from audit.verify.report import Word
from audit.verify.training import ROUNDS

METRICS, GATES, APPROVALS = "The rounds' metrics", "The gates", "The approvals"
LEGAL: Final = {
    "candidate": ("approved", "retired"),
    "approved": ("live", "retired", "canary", "shadow"),
    "canary": ("live", "retired", "approved"),  # answers a share of the requests
    "shadow": ("live", "retired", "approved", "canary"),  # is asked beside the live one; answers nobody
    "live": ("retired",),
    "retired": ("live",),  # a rollback, for a version that was live before
}
ANSWERING: Final = ("live", "canary")
_TOLERANCE: Final = Decimal("0.000002")
_CHEAP_WORK: Final = 5_000_000  # multiplications that take a moment in plain Python


def check_gates(chain: Chain) -> Outcome:
    """Every gate of the charter, measured again on its public set."""
    charter, registered = need(chain.charter, CHARTER), need(chain.registered, LINKS)
    entry, results = registered.index, registered.body.gates
    if not charter.gates:
        raise GapError(
            "gate.none", "the charter sets no gate, so nothing shows what the model is worth", entry
        )
    expect(len(results), len(charter.gates), code="gate.results", field="number of gates", entry=entry)
    private = [gate for gate in charter.gates if gate["source"] == SOURCE]
    if private:
        need(chain.evaluated, METRICS)
        for gate, claimed in zip(charter.gates, results, strict=True):
            if gate["source"] == SOURCE:
                _check_private(chain, gate, claimed, entry)
    public = [pair for pair in zip(charter.gates, results, strict=True) if pair[0]["source"] != SOURCE]
    if not public:
        return Outcome(
            word=Word.ATTESTED,
            code="gate.private_release",
            detail=f"{len(private)} gates passed by counts that the sites released with noise and attest",
        )
    weights = need(chain.weights, WEIGHTS)
    data = chain.evidence.artefacts.get(charter.public_set)
    if data is None:
        raise GapError("gate.public_set_missing", "the charter's public set is not in the file", entry)
    if _work(charter, data) > CHEAP_WORK and not chain.replay:
        raise GapError("gate.too_costly", "measuring the gates takes long; run again with --replay", entry)
    try:
        rows, labels = read_public_set(data, charter.features, charter.label)
        outputs = [forward(charter.layers, weights, row) for row in rows]
        expect(
            len(rows),
            charter.public_rows,
            code="gate.public_set",
            field="rows of the public set",
            entry=entry,
        )
        measured = [
            gate_result(gate, charter.public_set, charter.task, charter.label, labels, outputs)
            for gate, _ in public
        ]
    except FailError:
        raise
    except AuditError as error:
        raise FailError("gate.public_set", str(error), entry) from error
    for (gate, claimed), found in zip(public, measured, strict=True):
        _compare(claimed, found, entry)
        if not gate_passes(gate, value=found.value, trivial=found.baseline):
            raise FailError("gate.not_passed", f"{found.metric} is {found.value} on the public set", entry)
    shown = ", ".join(f"{found.metric} {found.value} (trivial {found.baseline})" for found in measured)
    detail = f"measured again on the public set of {len(rows)} rows: {shown}; all passed"
    if private:
        detail += f"; {len(private)} more by counts that the sites released with noise and attest"
        return Outcome(word=Word.ATTESTED, code="gate.private_release", detail=detail)
    return Outcome(word=Word.PROVED, detail=detail)


def check_metrics(chain: Chain) -> Outcome:
    """Every metric that a round claims, measured again on the public set with that round's model."""
    charter = need(chain.charter, CHARTER)
    if not chain.rounds:
        need(None, ROUNDS)
    counted = check_evaluation(chain, charter) + check_reference(chain, charter)
    claims = [(found, metric) for found in chain.rounds for metric in found.leaf.body.metrics]
    for found, metric in claims:
        expect(
            (metric.source, metric.dataset),
            ("public_set", charter.public_set),
            code="metric.source",
            field=f"metrics.{metric.name}",
            entry=found.leaf.index,
        )
    if not claims:
        word = Word.ATTESTED if counted else Word.PROVED
        return Outcome(word=word, detail=f"no round claims any{counted}")
    data = chain.evidence.artefacts.get(charter.public_set)
    work = len(chain.rounds) * _work(charter, data or b"")
    if data is None or not chain.outputs or (work > _CHEAP_WORK and not chain.replay):
        why = "the public set is not in the file" if data is None else "not measured again; see --replay"
        detail = f"by the log's operator: {why}{counted}"
        return Outcome(word=Word.ATTESTED, code="metric.skipped", detail=detail)
    try:
        rows, labels = read_public_set(data, charter.features, charter.label)
        for found, weights in zip(chain.rounds, chain.outputs, strict=True):
            if not found.leaf.body.metrics:
                continue
            outputs = [forward(charter.layers, weights, row) for row in rows]
            for metric in found.leaf.body.metrics:
                value = rounded_text(evaluate(metric.name, charter.task, charter.label, labels, outputs))
                name = f"metrics.{metric.name} of round {found.leaf.body.round}"
                _compare_numbers(metric.value, value, name, "metric.value", found.leaf.index)
    except FailError:
        raise
    except AuditError as error:
        raise FailError("metric.value", str(error)) from error
    measured = f"{len(claims)} values in {len(chain.rounds)} rounds"
    word = Word.ATTESTED if counted else Word.PROVED
    return Outcome(word=word, detail=f"{measured}, each measured again on the public set{counted}")


def _check_private(chain: Chain, gate: Mapping[str, Any], claimed: GateResult, entry: int) -> None:
    found = private_gate(gate, need(chain.evaluated, METRICS).body)
    _compare(claimed, found, entry)
    if found.passed != 1:
        raise FailError(
            "gate.not_passed", f"{found.metric} is {found.value or 'unknown'} by the sites' counts", entry
        )


def check_approvals(chain: Chain) -> Outcome:
    """Back through the model's transitions to the first; then forward, state by state."""
    charter, registered = need(chain.charter, CHARTER), need(chain.registered, LINKS)
    last = chain.transition
    if last is None:
        raise GapError("approval.none", "no transition of the version is in the file", registered.index)
    transitions: list[Leaf[VersionTransition]] = [last]
    while transitions[-1].body.previous_transition != ZERO_DIGEST:
        leaf = transitions[-1]
        transitions.append(
            chain.linked(
                leaf.body.previous_transition, VersionTransition, "the transition before", entry=leaf.index
            )
        )
    transitions.reverse()
    _check_no_fork(chain, transitions)
    states: dict[str, str] = {}
    served: set[str] = set()
    for leaf in transitions:
        body = leaf.body
        expect(body.model, last.body.model, code="approval.chain", field="model", entry=leaf.index)
        before = states.get(body.version, "candidate")
        expect(body.from_state, before, code="approval.state", field="from_state", entry=leaf.index)
        if body.to_state not in LEGAL[before] or (before == "retired" and body.version not in served):
            raise FailError("approval.state", f"{before} cannot become {body.to_state!r}", leaf.index)
        if body.to_state == "live":
            served.add(body.version)
        states[body.version] = body.to_state
        verify_body(body, body.officer, code="approval.signature", who="the officer", entry=leaf.index)
        if body.version == registered.body.version:
            _check_officer(chain, leaf, registered.leaf_hash)
    state = states[registered.body.version]
    is_test = chain.prediction is not None and chain.prediction.body.role == "tester"
    if chain.prediction is not None and state not in ANSWERING and not is_test:
        raise FailError("prediction.version_not_live", f"the version is {state}", chain.prediction.index)
    officers = sorted(
        {
            charter.officers[leaf.body.officer]
            for leaf in transitions
            if leaf.body.version == registered.body.version
        }
    )
    return Outcome(
        word=Word.PROVED,
        detail=f"candidate to {state} by the keys of {', '.join(officers)}, officers of the charter and "
        f"none of the keys that the log names as authors of charter, run or version; "
        f"{len(transitions)} transitions of the model, one after the other",
    )


def _work(charter: CharterView, data: bytes) -> int:
    """Return at most how many multiplications the model costs on a public set, before reading it."""
    rows = data.count(b"\n") + data.count(b"\r") + 1
    return rows * max(charter.work, len(charter.features))


def _compare(claimed: GateResult, found: GateResult, entry: int) -> None:
    for field in (item.name for item in dataclasses.fields(GateResult)):
        is_number = field in ("value", "baseline")
        name = f"gates.{found.metric}.{field}"
        if not is_number:
            expect(
                getattr(claimed, field), getattr(found, field), code="gate.results", field=name, entry=entry
            )
            continue
        _compare_numbers(getattr(claimed, field), getattr(found, field), name, "gate.results", entry)


def _compare_numbers(claimed: str, measured: str, name: str, code: str, entry: int) -> None:
    try:
        difference = abs(parse_decimal(claimed) - parse_decimal(measured))
    except AuditError as error:
        raise FailError(code, f"{name}: {error}", entry) from error
    if difference > _TOLERANCE:
        expect(claimed, measured, code=code, field=name, entry=entry)


def _check_no_fork(chain: Chain, transitions: list[Leaf[VersionTransition]]) -> None:
    known = {leaf.index for leaf in transitions}
    last = transitions[-1]
    for leaf in chain.leaves(VersionTransition):
        if leaf.body.model == last.body.model and leaf.index < last.index and leaf.index not in known:
            raise FailError(
                "approval.fork", "a transition of the model that the chain does not hold", leaf.index
            )


def _check_officer(chain: Chain, leaf: Leaf[VersionTransition], registration: str) -> None:
    charter, started = need(chain.charter, CHARTER), need(chain.started, LINKS)
    published = need(chain.published, CHARTER)
    body = leaf.body
    expect(
        body.gate_results, registration, code="approval.other_version", field="gate_results", entry=leaf.index
    )
    expect(body.charter, charter.digest, code="approval.other_version", field="charter", entry=leaf.index)
    if body.officer not in charter.officers:
        raise FailError("approval.not_an_officer", f"{body.officer} is no officer of the charter", leaf.index)
    if body.officer in (
        started.body.author,
        published.body.author,
        need(chain.registered, LINKS).body.author,
    ):
        raise FailError(
            "approval.own_work", "the officer is the author of the run or of the charter", leaf.index
        )
