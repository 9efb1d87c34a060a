"""Part of the step on aggregation: updates left out for their length, and how a round's updates looked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from audit.anomaly import SiteFacts, examine, plain_dot
from audit.canonical import canonical_bytes
from audit.charter_view import CharterView
from audit.entries import SiteUndelivered
from audit.errors import AuditError
from audit.replay import SiteUpdate
from audit.round_bodies import RoundExamined, UpdateRefused
from audit.update_bounds import is_too_long, square_norm
from audit.verify.chain import Chain, FailError, GapError, Leaf, Round, expect, kept_back, need
from audit.verify.history import LINKS
from audit.verify.members import CHARTER
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


def check_examined(chain: Chain, charter: CharterView, found: Round, updates: Sequence[SiteUpdate]) -> None:
    """A logged view of the round's updates is the one that these updates make.

    Raises:
        FailError: another document, or other sites named as standing apart.
        GapError: an update that the view was made from is not in the file.
    """
    run, number = found.leaf.body.run, found.leaf.body.round
    for leaf in chain.leaves(RoundExamined):
        if (leaf.body.run, leaf.body.round) != (run, number):
            continue
        values = {update.site: update.values for update in updates}
        for refused in chain.leaves(UpdateRefused):
            if (refused.body.run, refused.body.round) == (run, number):
                values[refused.body.site] = _refused_values(chain, refused)
        view = _view(charter, number, values)
        digest = hashlib.sha256(canonical_bytes(view)).hexdigest()
        expect(leaf.body.digest, digest, code="replay.examined", field="digest", entry=leaf.index)
        expect(leaf.body.apart, tuple(view["apart"]), code="replay.examined", field="apart", entry=leaf.index)


def _view(charter: CharterView, number: int, values: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    facts, vectors = [], []
    for site in sorted(values):
        terms = charter.updates[site]
        divisor = charter.aggregation.divisor(terms.nominal_rows)
        facts.append(SiteFacts(site=site, bound=terms.norm_bound / divisor, noise=terms.noise_std / divisor))
        vectors.append([float(value) / divisor for value in values[site]])
    return examine(number, facts, vectors, charter.released, plain_dot)


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
    values = _refused_values(chain, leaf)
    found = {"norm": str(math.isqrt(square_norm(values))), "bound": str(terms.norm_bound)}
    for field, value in found.items():
        expect(getattr(body, field), value, code="replay.refusal", field=field, entry=entry)
    if not is_too_long(terms, values):
        raise FailError(
            "replay.refusal", f"the update of site {body.site} is within the bound and was refused", entry
        )


def _refused_values(chain: Chain, leaf: Leaf[UpdateRefused]) -> list[int]:
    body, entry = leaf.body, leaf.index
    data = chain.evidence.artefacts.get(body.update)
    if data is None:
        what = f"the refused update of site {body.site} ({body.update[:16]}…) is not in the file"
        what += kept_back(need(chain.charter, CHARTER).serving.answers)
        raise GapError("replay.update_missing", what, entry)
    try:
        values = decode_update(data)
    except AuditError as error:
        raise FailError("replay.refusal", f"site {body.site}: {error}", entry) from error
    if body.site not in {site.name for site in need(chain.charter, CHARTER).sites}:
        raise FailError("replay.refusal", f"{body.site} is no site of the charter", entry)
    return values
