"""Steps on the arithmetic: every round rebuilt from the sites' updates, the version from the last rounds."""

from __future__ import annotations

import hashlib
from typing import Final

from audit.errors import AuditError
from audit.models import initial_weights, model_file, weights_of_file
from audit.replay import Aggregator, SiteUpdate, average
from audit.robust import MEAN
from audit.verify.chain import Chain, FailError, GapError, Outcome, Round, expect, kept_back, need
from audit.verify.history import LINKS
from audit.verify.masked import opened_update
from audit.verify.members import CHARTER
from audit.verify.refused import check_examined, check_lengths, check_refused_updates
from audit.verify.report import Word
from audit.verify.training import ROUNDS
from audit.weights import decode_update

REPLAY, WEIGHTS = "The aggregation", "The model's weights"
CHEAP_ADDITIONS: Final = 20_000_000
CHEAP_WORK: Final = 500_000_000  # multiplications that take about half a minute in plain Python


def check_aggregation(chain: Chain) -> Outcome:
    """Replay each round in float64 and compare the digest of what comes out."""
    charter = need(chain.charter, CHARTER)
    if not chain.rounds:
        need(None, ROUNDS)
    passes = 1 if charter.secure is None else 2 + charter.secure.tolerated  # masks to make and to take off
    additions = sum(len(found.statements) for found in chain.rounds) * charter.dimension * passes
    if chain.replay is False or (chain.replay is None and additions > CHEAP_ADDITIONS):
        why = "as you asked" if chain.replay is False else f"{additions:,} additions"
        why += "; run again with --replay"
        raise GapError("aggregation.not_replayed", f"the rounds were not replayed ({why})")
    refused = check_refused_updates(chain, charter)
    aggregator = Aggregator(charter.aggregation)
    weights = initial_weights(charter.layers, charter.digest)
    outputs: list[list[float]] = []
    for number, found in enumerate(chain.rounds, start=1):
        updates = [_update(chain, found, position) for position in range(len(found.statements))]
        if charter.aggregation.rule.norm_bound:
            check_lengths(charter, found, updates)
        summed: list[SiteUpdate] = updates
        if charter.secure is not None:
            summed = [opened_update(chain, charter, charter.secure, found, updates)]
        try:
            weights = aggregator.step(number, weights, summed)
            digest = hashlib.sha256(model_file(charter.layers, weights)).hexdigest()
        except AuditError as error:
            raise FailError("replay.refused", str(error), found.leaf.index) from error
        check_examined(chain, charter, found, updates)
        expect(
            found.leaf.body.output_model,
            digest,
            code="replay.output_model",
            field=f"output_model of round {found.leaf.body.round}",
            entry=found.leaf.index,
        )
        outputs.append(weights)
    chain.outputs = tuple(outputs)
    rule = charter.aggregation.rule
    said = "" if rule == MEAN else f" under {rule.name}, of {rule.byzantine} lying sites"
    if rule.norm_bound:
        said += f"; no update is longer than an honest one can be, {refused} were and are left out"
    if charter.secure is not None:
        said += ", whose masks come off in the sum alone: each round's keys, survivors and shares are signed"
    if charter.privacy.unit == "site":
        said += "; no sum is longer than clipped updates and their noise can make it"
    return Outcome(
        word=Word.PROVED,
        detail=f"{len(outputs)} rounds replayed from the sites' updates{said}; every output model is rebuilt "
        f"bit for bit",
    )


def check_weights(chain: Chain) -> Outcome:
    """The run's weights are the average of its last rounds, and the file of that digest."""
    charter, completed = need(chain.charter, CHARTER), need(chain.completed, LINKS)
    if not chain.rounds:
        need(None, ROUNDS)
    last = charter.aggregation.average_last
    registered = chain.registered
    if registered is not None:
        bounds = {"averaged_from": charter.rounds - last + 1, "averaged_to": charter.rounds}
        for field, value in bounds.items():
            expect(
                getattr(registered.body, field),
                value,
                code="version.average",
                field=field,
                entry=registered.index,
            )
    digest = completed.body.weights
    if chain.outputs:
        rebuilt = average(chain.outputs[-last:])
        found = hashlib.sha256(model_file(charter.layers, rebuilt)).hexdigest()
        expect(digest, found, code="version.weights", field="weights", entry=completed.index)
        chain.weights = rebuilt
        return Outcome(
            word=Word.PROVED,
            detail=f"{digest[:16]}… is the average of the last {last} rounds, {charter.dimension} parameters",
        )
    data = chain.evidence.artefacts.get(digest)
    if data is None:
        raise GapError(
            "version.weights_missing",
            f"model file {digest[:16]}… is not in the file{kept_back(charter.serving.answers)}",
            completed.index,
        )
    try:
        chain.weights = weights_of_file(charter.layers, data)
    except AuditError as error:
        raise FailError("version.weights", str(error), completed.index) from error
    raise GapError(
        "aggregation.not_replayed",
        f"that {digest[:16]}… is the average of the last {last} rounds is shown by replaying them alone",
        completed.index,
    )


def _update(chain: Chain, found: Round, position: int) -> SiteUpdate:
    charter = need(chain.charter, CHARTER)
    leaf = found.statements[position]
    body = leaf.body
    site = charter.site(body.site)
    data = chain.evidence.artefacts.get(body.update)
    if site is None or data is None:
        what = f"the update of site {body.site} for round {body.round} ({body.update[:16]}…)"
        what += f" is not in the file{kept_back(charter.serving.answers)}"
        raise GapError("replay.update_missing", what, leaf.index)
    try:
        values = decode_update(data)
    except AuditError as error:
        raise FailError("replay.update", f"site {body.site}: {error}", leaf.index) from error
    expect(
        len(values), charter.released, code="replay.update", field="length of the update", entry=leaf.index
    )
    return SiteUpdate(site=site.name, nominal_rows=site.nominal_rows, weight=site.weight, values=values)
