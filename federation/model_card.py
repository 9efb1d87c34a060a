"""A version's card, written from the log alone: what was agreed, what happened, what it cost, who answered
for it.

What nothing in the log shows reads NO EVIDENCE; what somebody merely signed is said to be attested.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal

from audit.entries import RoundCompleted, RunAccepted, SiteStatement, VersionTransition
from audit.ledger import Ledger
from federation import registry
from federation.charter import Charter, Feature
from federation.registry import Version


def model_card(ledger: Ledger, digest: str) -> str:
    """Return the card of the version whose digest begins with `digest`, as Markdown.

    Raises:
        NotFoundError: the log has no such version, or not what it came from.
    """
    version = registry.find_version(ledger, digest)
    text, author = registry.charter_text(ledger, version.registered.charter)
    charter = Charter.from_canonical(text)
    sections = (
        _head(version, charter),
        _data(charter),
        _training(ledger, version, charter),
        _privacy(version, charter),
        _metrics(version, charter),
        _approvals(version, charter, author),
        _limits(charter),
    )
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _head(version: Version, charter: Charter) -> Iterator[str]:
    yield f"# {version.model}, version {version.digest[:12]}"
    yield ""
    yield from _table(
        ("", ""),
        [
            ("version (SHA-256 of the weights file)", f"`{version.digest}`"),
            ("state", version.state),
            ("registered", f"{version.time}, leaf {version.leaf_index}"),
            ("charter", f"`{charter.digest}`"),
            ("run", f"`{version.registered.run}`"),
            ("purposes allowed", ", ".join(charter.purposes)),
        ],
    )


def _data(charter: Charter) -> Iterator[str]:
    yield "## Data contract"
    yield ""
    label = charter.label
    kind = f"classes {', '.join(label.classes)}" if label.classes else f"{label.lower} to {label.upper}"
    yield f"Predicts **{label.name}** ({charter.task}; {kind}). Bounds are declared, never read from data."
    yield ""
    yield from _table(
        ("feature", "type", "unit", "range", "missing"), [_feature(f) for f in charter.features]
    )


def _feature(feature: Feature) -> tuple[str, ...]:
    if feature.type == "category":
        allowed = ", ".join(feature.categories or ())
    elif feature.type == "boolean":
        allowed = "true, false"
    else:
        allowed = f"{feature.lower} to {feature.upper}" + (" (log)" if feature.transform == "log" else "")
    return feature.name, feature.type, feature.unit or "", allowed, feature.missing


def _training(ledger: Ledger, version: Version, charter: Charter) -> Iterator[str]:
    run = version.registered.run
    rounds = [body for _, body in registry.bodies(ledger, RoundCompleted, run=run)]
    accepted = {body.site for _, body in registry.bodies(ledger, RunAccepted, run=run)}
    given: dict[str, int] = dict.fromkeys(charter.site_names, 0)
    for _, statement in registry.bodies(ledger, SiteStatement, run=run):
        given[statement.site] = given.get(statement.site, 0) + 1
    plan = charter.plan
    yield "## Training"
    yield ""
    yield (
        f"{charter.model.family}, {charter.dimension} parameters; {plan.strategy}, {len(rounds)} of "
        f"{plan.rounds} rounds completed, {plan.local_steps} step(s) a round; the version is the mean "
        f"of rounds {version.registered.averaged_from} to {version.registered.averaged_to}."
    )
    yield ""
    yield from _table(
        ("site", "nominal rows (public)", "accepted the run", "statements"),
        [
            (s.name, str(s.nominal_rows), "yes" if s.name in accepted else "NO EVIDENCE", str(given[s.name]))
            for s in charter.sites
        ],
    )


def _privacy(version: Version, charter: Charter) -> Iterator[str]:
    privacy = charter.privacy
    yield "## Privacy"
    yield ""
    yield (
        f"Epsilon for one **{privacy.unit}**, relation {privacy.relation}, delta {privacy.delta}; "
        f"the charter allows {privacy.epsilon}. Recomputed from events that the sites attested; that noise "
        "was drawn is attested, not proved."
    )
    yield ""
    yield from _table(
        (
            "site",
            "events",
            "epsilon of this run (PLD)",
            "beside it (RDP)",
            "epsilon over its life in this log",
            "delta",
        ),
        [
            (c.site, str(c.events), c.run_epsilon, c.run_epsilon_rdp, c.lifetime_epsilon, c.delta)
            for c in version.registered.epsilons
        ],
    )
    yield ""
    yield (
        "The last figure composes every run as if all had been fixed ahead; each site's own hard stop is a "
        "filter that needs no such assumption."
    )
    over = [c.site for c in version.registered.epsilons if Decimal(c.run_epsilon) > privacy.epsilon]
    if over:
        yield ""
        yield f"**Above the charter's epsilon: {', '.join(over)}.**"


def _metrics(version: Version, charter: Charter) -> Iterator[str]:
    yield "## Metrics"
    yield ""
    if not version.registered.gates:
        yield "NO EVIDENCE: the charter names no metric that anybody can recompute."
        return
    rows = charter.public_set.rows if charter.public_set else 0
    yield f"On the charter's public set of {rows} rows, which a verifier recomputes."
    yield ""
    yield from _table(
        ("metric", "value", "trivial baseline", "needed", "source", "gate"),
        [
            (g.metric, g.value, g.baseline, g.floor or "-", g.source, "passed" if g.passed == 1 else "FAILED")
            for g in version.registered.gates
        ],
    )


def _approvals(version: Version, charter: Charter, author: str) -> Iterator[str]:
    officers = {officer.key: officer.name for officer in charter.officers}
    yield "## Approvals"
    yield ""
    yield f"Charter drawn up by `{author}`, run started by `{version.registered.author}`."
    yield ""
    if not version.transitions:
        yield "NO EVIDENCE: nobody has approved this version."
        return

    def row(move: VersionTransition, time: str, index: int) -> tuple[str, ...]:
        who = officers.get(move.officer, "unknown officer")
        return (
            time,
            f"{move.from_state} → {move.to_state}",
            f"{who} `{move.officer}`",
            move.reason or "-",
            str(index),
        )

    yield from _table(
        ("time", "from, to", "officer", "reason", "leaf"),
        [row(t.body, t.time, t.leaf_index) for t in version.transitions],
    )


def _limits(charter: Charter) -> Iterator[str]:
    yield "## Limits"
    yield ""
    if charter.privacy.unit == "row":
        yield "- The unit is one row; a person with several rows, or at several sites, has less protection."
    else:
        yield "- The unit is one subject at one site; a person at several sites has less protection."
    yield "- What a site's data are, and that its code ran as named, is attested by that site alone."
    yield "- How long an answer took is not covered by epsilon."
    yield "- Values beyond the declared ranges are clamped; the model never saw what lies beyond."
    if charter.model.site_intercept:
        yield "- Each site has an intercept of its own, with noise; without a site the mean is used."


def _table(header: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    cells = list(header)
    yield "| " + " | ".join(cells) + " |"
    yield "|" + " --- |" * len(cells)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
