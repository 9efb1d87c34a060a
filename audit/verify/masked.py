"""Part of the step on aggregation: the sum of a masked round, opened again from its transcript."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from audit.charter_view import CharterView
from audit.errors import AuditError
from audit.replay import SiteUpdate
from audit.secure_bodies import RoundOpened
from audit.secure_round import RoundName, SecureRoundError, SecureTerms, Transcript, open_sum
from audit.update_bounds import longest_sum, square_norm
from audit.verify.chain import Chain, FailError, GapError, Leaf, Round, expect, kept_back
from audit.weights import encode_update


def check_rosters(secure: SecureTerms | None, found: Round) -> None:
    """All updates of a masked round carry the masks of one roster; without masks none names any.

    Raises:
        FailError: names the statement.
    """
    first = found.statements[0].body.roster
    for statement in found.statements:
        expect(
            bool(statement.body.roster),
            secure is not None,
            code="statement.roster",
            field="whether the update is masked",
            entry=statement.index,
        )
        expect(statement.body.roster, first, code="statement.roster", field="roster", entry=statement.index)


def opened_update(
    chain: Chain, charter: CharterView, secure: SecureTerms, found: Round, updates: Sequence[SiteUpdate]
) -> SiteUpdate:
    """Return the sum of a round's masked updates as one update of all its sites' rows.

    Raises:
        GapError: the transcript is not in the file.
        FailError: the transcript does not open this sum.
    """
    body = found.leaf.body
    leaf = _entry(chain, found)
    sites = tuple(update.site for update in updates)
    wanted = {"survivors": sites, "roster": found.statements[0].body.roster}
    for field, value in wanted.items():
        expect(getattr(leaf.body, field), value, code="replay.opened", field=field, entry=leaf.index)
    data = chain.evidence.artefacts.get(leaf.body.transcript)
    if data is None:
        what = f"the transcript of round {body.round} ({leaf.body.transcript[:16]}…) is not in the file"
        what += kept_back(charter.serving.answers)
        raise GapError("replay.transcript_missing", what, leaf.index)
    name = RoundName(
        run=body.run,
        round=body.round,
        charter=charter.digest,
        participants=found.statements[0].body.participants,
    )
    try:
        transcript = Transcript.decode(data)
        expect(transcript.roster, wanted["roster"], code="secure.keys", field="roster", entry=leaf.index)
        total = open_sum(
            name,
            transcript,
            {update.site: update.values for update in updates},
            {statement.body.site: statement.body.update for statement in found.statements},
            lambda site: chain.enrolment_at(site, leaf.index).body.statement_key,
            least=secure.least,
        )
        digest = hashlib.sha256(encode_update(total)).hexdigest()
    except (FailError, GapError):
        raise
    except SecureRoundError as error:
        raise FailError(error.code, f"round {body.round}: {error}", leaf.index) from error
    except AuditError as error:
        raise FailError("replay.opened", f"round {body.round}: {error}", leaf.index) from error
    expect(leaf.body.total, digest, code="replay.opened", field="total", entry=leaf.index)
    _check_length(charter, found, total, leaf.index)
    rows = sum(update.nominal_rows for update in updates)
    return SiteUpdate(site="sum", nominal_rows=rows, weight=float(rows), values=total)


def _check_length(charter: CharterView, found: Round, total: Sequence[int], entry: int) -> None:
    """Where the unit is the site, a sum is no longer than its sites' clipped updates and their noise.

    Raises:
        FailError: it is; which site sent what was not clipped, nobody can tell.
    """
    if charter.privacy.unit != "site":
        return
    most = longest_sum(
        grid_bits=charter.privacy.grid_bits,
        precision=charter.privacy.precision,
        dimension=charter.dimension,
        shares=[statement.body.event.share_grid for statement in found.statements],
    )
    if square_norm(total) > most**2:
        raise FailError(
            "secure.sum_too_long",
            f"the sum of round {found.leaf.body.round} is longer than {len(found.statements)} clipped "
            "updates and their noise: a site sent what was not clipped, and nobody can tell which",
            entry,
        )


def _entry(chain: Chain, found: Round) -> Leaf[RoundOpened]:
    """Return the one entry that says that the round was opened, after its statements and before its end."""
    body, at = found.leaf.body, found.leaf.index
    leaves = [
        leaf
        for leaf in chain.leaves(RoundOpened)
        if (leaf.body.run, leaf.body.round) == (body.run, body.round)
    ]
    if not leaves:
        raise GapError("replay.not_opened", f"nothing in the file opens round {body.round}'s masked sum", at)
    if len(leaves) > 1:
        raise FailError("replay.opened", f"round {body.round} was opened twice", leaves[1].index)
    if not max(statement.index for statement in found.statements) < leaves[0].index < at:
        raise FailError("verify.order", f"round {body.round} was opened out of order", leaves[0].index)
    return leaves[0]
