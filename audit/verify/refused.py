"""Part of the step on aggregation: updates left out for being longer than an honest one can be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from audit.charter_view import CharterView
from audit.entries import SiteUndelivered, UpdateRefused
from audit.errors import AuditError
from audit.replay import SiteUpdate
from audit.update_bounds import is_too_long, square_norm
from audit.verify.chain import Chain, FailError, GapError, Leaf, Round, expect, need
from audit.verify.history import LINKS
from audit.weights import decode_update


def check_lengths(charter: CharterView, found: Round, updates: Sequence[SiteUpdate]) -> None:
    """No update that counted is longer than the charter's bound.

    Raises:
        FailError: names the statement.
    """
    for update, statement in zip(updates, found.statements, strict=True):
        terms = charter.updates[update.site]
        if is_too_long(terms, update.values):
            raise FailError(
                "replay.norm_bound",
                f"the update of site {update.site} in round {statement.body.round} is longer than "
                f"{terms.norm_bound} grid units and was counted all the same",
                statement.index,
            )


def check_refused_updates(chain: Chain, charter: CharterView) -> int:
    """Every refusal for length holds against the update itself; return how many there are.

    Raises:
        FailError: the charter sets no bound, or an update was refused that is within it.
        GapError: a refused update is not in the file.
    """
    run = need(chain.started, LINKS).body.run
    refused = [leaf for leaf in chain.leaves(UpdateRefused) if leaf.body.run == run]
    for leaf in refused:
        _check_refusal(chain, charter, leaf)
    return len(refused)


def _check_refusal(chain: Chain, charter: CharterView, leaf: Leaf[UpdateRefused]) -> None:
    body, entry = leaf.body, leaf.index
    terms = charter.updates.get(body.site)
    if terms is None or body.reason != "norm_bound" or not charter.aggregation.rule.norm_bound:
        raise FailError(
            "replay.refusal", f"the charter gives no ground to refuse {body.site}'s update", entry
        )
    reported = chain.linked(
        body.statement, SiteUndelivered, "the refused release", entry=entry
    ).body.statement
    for field in ("run", "round", "site", "update"):
        expect(
            getattr(body, field), getattr(reported, field), code="replay.refusal", field=field, entry=entry
        )
    data = chain.evidence.artefacts.get(body.update)
    if data is None:
        what = f"the refused update of site {body.site} ({body.update[:16]}…) is not in the file"
        raise GapError("replay.update_missing", what, entry)
    try:
        values = decode_update(data)
    except AuditError as error:
        raise FailError("replay.refusal", f"site {body.site}: {error}", entry) from error
    found = {"norm": str(math.isqrt(square_norm(values))), "bound": str(terms.norm_bound)}
    for field, value in found.items():
        expect(getattr(body, field), value, code="replay.refusal", field=field, entry=entry)
    if not is_too_long(terms, values):
        raise FailError(
            "replay.refusal", f"the update of site {body.site} is within the bound and was refused", entry
        )
