"""Part of the steps on metrics and gates: counts that the sites released with noise, added up again."""

from __future__ import annotations

from audit.charter_view import CharterView
from audit.errors import AuditError
from audit.private_evaluation import METRIC, SOURCE, Evaluation, worth
from audit.round_bodies import RunEvaluated
from audit.verify.chain import Chain, FailError, GapError, Leaf, expect, need
from audit.verify.history import LINKS
from audit.verify.training import check_statement, evaluation_statements
from audit.weights import decode_update


def check_evaluation(chain: Chain, charter: CharterView) -> str:
    """Add the released counts up again; return what to say of them, "" where the charter asks for none.

    Raises:
        FailError: a statement, a metric or the model is another than it must be.
        GapError: the entry or a matrix is not in the file.
    """
    evaluation = charter.evaluation
    started, completed = need(chain.started, LINKS), need(chain.completed, LINKS)
    found = [leaf for leaf in chain.leaves(RunEvaluated) if leaf.body.run == started.body.run]
    if evaluation is None:
        if found:
            raise FailError("evaluation.none", "the charter has no terms of evaluation", found[0].index)
        return ""
    if not found:
        raise GapError(
            "evaluation.missing", "the charter asks for counts of the sites, and none is in the file"
        )
    if len(found) > 1:
        raise FailError("evaluation.twice", "the run's weights were evaluated twice", found[1].index)
    leaf = found[0]
    expect(
        leaf.body.weights,
        completed.body.weights,
        code="evaluation.weights",
        field="weights",
        entry=leaf.index,
    )
    expect(leaf.body.round, charter.rounds + 1, code="evaluation.round", field="round", entry=leaf.index)
    matrices = _matrices(chain, charter, evaluation, leaf)
    _check_claims(charter, evaluation, matrices, leaf)
    chain.evaluated = leaf
    if not leaf.body.metrics:
        return "; too few sites released counts for the evaluation"
    return (
        f"; accuracy {leaf.body.metrics[0].value} by the counts of {len(matrices)} sites, added up again "
        f"(noise makes ± {leaf.body.spread}), counted as these sites attest"
    )


def _matrices(
    chain: Chain, charter: CharterView, evaluation: Evaluation, leaf: Leaf[RunEvaluated]
) -> list[list[int]]:
    body, last = leaf.body, chain.rounds[-1]
    released = evaluation_statements(chain, body.run)
    if sorted(statement.leaf_hash for statement in released) != sorted(body.statements):
        raise FailError("evaluation.statements", "not each statement of counts is counted, once", leaf.index)
    by_hash = {statement.leaf_hash: statement for statement in released}
    ordered = [by_hash[name] for name in body.statements]
    sites = [statement.body.site for statement in ordered]
    asked = [statement.body.site for statement in last.statements]
    if sites != sorted(set(sites)) or sorted([*sites, *body.missing]) != asked:
        raise FailError(
            "evaluation.sites", "those who counted and those missing are not who took part", leaf.index
        )
    wanted = {
        "charter": charter.digest,
        "base_model": body.weights,
        "participants": tuple(asked),
        "previous_round": last.leaf.leaf_hash,
        "event": evaluation.event,
    }
    matrices = []
    for statement in ordered:
        check_statement(chain, statement, wanted)
        data = chain.evidence.artefacts.get(statement.body.update)
        if data is None:
            raise GapError(
                "evaluation.counts_missing",
                f"the counts of site {statement.body.site} are not in the file",
                leaf.index,
            )
        try:
            matrices.append(decode_update(data))
        except AuditError as error:
            raise FailError("evaluation.counts", str(error), statement.index) from error
    return matrices


def _check_claims(
    charter: CharterView, evaluation: Evaluation, matrices: list[list[int]], leaf: Leaf[RunEvaluated]
) -> None:
    body = leaf.body
    claims = [(metric.name, metric.value, metric.source) for metric in body.metrics]
    try:
        found = worth(evaluation, matrices) if len(matrices) >= charter.minimum_sites else None
    except AuditError:
        found = None
    wanted = [] if found is None else [(METRIC, found.accuracy, SOURCE)]
    expect(claims, wanted, code="evaluation.metric", field="metrics", entry=leaf.index)
    texts = ("", "") if found is None else (found.baseline, found.spread)
    expect(
        (body.baseline, body.spread),
        texts,
        code="evaluation.metric",
        field="baseline and spread",
        entry=leaf.index,
    )
