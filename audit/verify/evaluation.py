"""Part of the steps on metrics and gates: counts that the sites released with noise, added up again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from audit.charter_view import CharterView
from audit.entries import SiteStatement
from audit.errors import AuditError
from audit.private_evaluation import METRIC, SOURCE, Evaluation, worth
from audit.round_bodies import RunEvaluated, RunReferenced
from audit.verify.chain import Chain, FailError, GapError, Leaf, expect, kept_back, need
from audit.verify.history import LINKS
from audit.verify.members import CHARTER
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
    expect(leaf.body.round, charter.most_rounds + 1, code="evaluation.round", field="round", entry=leaf.index)
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
    last = chain.rounds[-1]
    asked = [statement.body.site for statement in last.statements]
    wanted = {
        "charter": charter.digest,
        "base_model": leaf.body.weights,
        "participants": tuple(asked),
        "previous_round": last.leaf.leaf_hash,
        "event": evaluation.event,
    }
    released = evaluation_statements(chain, leaf.body.run)
    return released_counts(chain, leaf, released, asked, wanted, code="evaluation")


def released_counts(
    chain: Chain,
    leaf: Leaf[RunEvaluated] | Leaf[RunReferenced],
    released: Sequence[Leaf[SiteStatement]],
    asked: Sequence[str],
    wanted: Mapping[str, object],
    *,
    code: str,
) -> list[list[int]]:
    """Return the counts of each statement that an entry names, once statements and sites are as they must be.

    Raises:
        FailError: under `code`; a statement is left out, doubled, or of other fields.
        GapError: counts are not in the file.
    """
    body = leaf.body
    if sorted(statement.leaf_hash for statement in released) != sorted(body.statements):
        raise FailError(f"{code}.statements", "not each statement of counts is counted, once", leaf.index)
    by_hash = {statement.leaf_hash: statement for statement in released}
    ordered = [by_hash[name] for name in body.statements]
    sites = [statement.body.site for statement in ordered]
    if sites != sorted(set(sites)) or sorted([*sites, *body.missing]) != list(asked):
        raise FailError(
            f"{code}.sites", "those who counted and those missing are not who took part", leaf.index
        )
    matrices, answers = [], need(chain.charter, CHARTER).serving.answers
    for statement in ordered:
        check_statement(chain, statement, wanted)
        data = chain.evidence.artefacts.get(statement.body.update)
        if data is None:
            raise GapError(
                f"{code}.counts_missing",
                f"the counts of site {statement.body.site} are not in the file{kept_back(answers)}",
                leaf.index,
            )
        try:
            matrices.append(decode_update(data))
        except AuditError as error:
            raise FailError(f"{code}.counts", str(error), statement.index) from error
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
