"""Part of the step on metrics: the reference sketch, added up again from what the sites released."""

from __future__ import annotations

import hashlib

from audit.charter_view import CharterView
from audit.errors import AuditError
from audit.reference import OodScorer, Reference, sketch_counts, sketch_document
from audit.round_bodies import RunReferenced
from audit.verify.chain import Chain, FailError, GapError, Leaf, expect, need
from audit.verify.evaluation import released_counts
from audit.verify.history import LINKS
from audit.verify.training import reference_statements


def check_reference(chain: Chain, charter: CharterView) -> str:
    """Add the released counts up again; return what to say of them, "" where the charter asks for none.

    Raises:
        FailError: a statement or the sketch is another than it must be.
        GapError: the entry or the counts are not in the file.
    """
    reference = charter.serving.reference
    started, completed = need(chain.started, LINKS), need(chain.completed, LINKS)
    found = [leaf for leaf in chain.leaves(RunReferenced) if leaf.body.run == started.body.run]
    if reference is None:
        if found:
            raise FailError("reference.none", "the charter has no terms of a sketch", found[0].index)
        return ""
    if not found:
        raise GapError("reference.missing", "the charter asks for a sketch, and none is in the file")
    if len(found) > 1:
        raise FailError("reference.twice", "the run's rows were sketched twice", found[1].index)
    leaf = found[0]
    expect(leaf.body.round, charter.releases, code="reference.round", field="round", entry=leaf.index)
    last = chain.rounds[-1]
    asked = [statement.body.site for statement in last.statements]
    if chain.evaluated is not None:  # who did not count for the evaluation is not asked again
        asked = [site for site in asked if site not in chain.evaluated.body.missing]
    wanted = {
        "charter": charter.digest,
        "base_model": completed.body.weights,
        "participants": tuple(asked),
        "previous_round": last.leaf.leaf_hash,
        "event": reference.event,
    }
    released = reference_statements(chain, started.body.run)
    counts = released_counts(chain, leaf, released, asked, wanted, code="reference")
    sites = [site for site in asked if site not in leaf.body.missing]
    _check_sum(charter, reference, counts, sites, leaf)
    chain.sketched = leaf
    if not leaf.body.sketch:
        return "; too few sites released counts for the sketch"
    chain.sketch = tuple(sum(cells) for cells in zip(*counts, strict=True))
    return f"; the sketch of the training rows is the sum of what {len(sites)} sites released, as they attest"


def scorer_of(chain: Chain, charter: CharterView) -> OodScorer:
    """Return the scorer by the run's sketch, which an earlier step proved; else by the bounds."""
    if chain.sketch is None:
        return OodScorer(charter.features)
    return OodScorer(charter.features, reference=charter.serving.reference, counts=chain.sketch)


def _check_sum(
    charter: CharterView,
    reference: Reference,
    counts: list[list[int]],
    sites: list[str],
    leaf: Leaf[RunReferenced],
) -> None:
    digest = ""
    try:
        if len(counts) >= charter.minimum_sites:
            document = sketch_document(
                reference, run=leaf.body.run, charter=charter.digest, sites=sites, counts=counts
            )
            digest = hashlib.sha256(document).hexdigest()
            sketch_counts(document, digest=digest, reference=reference)
    except AuditError as error:
        raise FailError("reference.counts", str(error), leaf.index) from error
    expect(leaf.body.sketch, digest, code="reference.sketch", field="sketch", entry=leaf.index)
