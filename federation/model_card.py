"""A version's card, written from the log and the registry's files: what was agreed, what happened, what it
cost, who answered for it, and what nobody has shown.

Its headings are those of Annex IV of Regulation (EU) 2024/1689, so that whoever keeps technical documentation
finds the parts that a log can show. Every figure is from the charter's public set or from a release that the
privacy ledger paid for; what nothing shows reads NO EVIDENCE, what somebody merely signed is said to be
attested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Final

from audit.answers import EXACT
from audit.entries import RoundCompleted, RunAccepted, SiteStatement, VersionTransition
from audit.epsilon import epsilon_text
from audit.errors import AuditError
from audit.ledger import Ledger
from audit.models import weights_of_file
from audit.round_bodies import RunEvaluated
from audit.serving_bodies import AlarmClosed, AlarmRaised
from federation import registry
from federation.accounting import plan_cost
from federation.card import NO_EVIDENCE, Block, Bullets, Card, Paragraph, Section, Table
from federation.card_metrics import FEW_ROWS, FeatureFairness, GroupRates, Interval, fairness, intervals
from federation.charter import Charter, Feature
from federation.errors import FederationError
from federation.evaluation import PublicData, model_outputs
from federation.registry import Version

FindBlob = Callable[[str], bytes | None]

_ABOUT: Final = (
    "Made from the federation's log; anybody who holds the log makes the same card. The headings are those "
    "of Annex IV of Regulation (EU) 2024/1689. The card is no legal assessment: it shows what the log shows, "
    "and says NO EVIDENCE where it shows nothing."
)


def model_card(ledger: Ledger, digest: str, find_blob: FindBlob | None = None) -> str:
    """Return the card of the version whose digest begins with `digest`, as Markdown; errors as `card_of`."""
    return card_of(ledger, digest, find_blob).markdown()


def card_of(ledger: Ledger, digest: str, find_blob: FindBlob | None = None) -> Card:
    """Return the card of the version whose digest begins with `digest`.

    Args:
        find_blob: the registry's files, for the weights and the public set; without it the figures are
            those of the gates alone.

    Raises:
        NotFoundError: the log has no such version, or not what it came from.
    """
    version = registry.find_version(ledger, digest)
    text, author = registry.charter_text(ledger, version.registered.charter)
    charter = Charter.from_canonical(text)
    measured = _Measured(charter, version, find_blob)
    evaluated = registry.run_evaluated(ledger, version.registered.run)
    return Card(
        model=version.model,
        version=version.digest,
        title=f"{version.model}, version {version.digest[:12]}",
        about=_ABOUT,
        sections=(
            _section("General description", "1", _general(version, charter)),
            _section("Elements and development", "2", _elements(charter)),
            _section("Data contract", "", _data(charter)),
            _section("Training", "", _training(ledger, version, charter)),
            _section("Privacy", "", _privacy(version, charter)),
            _section("Monitoring, functioning and control", "3", _control(charter)),
            _section("Metrics", "", _metrics(version, charter, measured, evaluated)),
            _section("Fairness by declared groups", "", _fairness(charter, measured)),
            _section("Distance of an input", "", _distance(ledger, version, charter)),
            _section("Alarms", "", _alarms(ledger, version)),
            _section("Limits", "", _limits(charter)),
            _section("Whether the metrics are appropriate", "4", _appropriate(version, charter)),
            _section("Risk management", "5", _risks(charter)),
            _section("Changes over the lifecycle", "6", _changes(ledger, version)),
            _section("Approvals", "", _approvals(version, charter, author)),
            _section("Standards", "7", _standards()),
            _section("EU declaration of conformity", "8", _declaration()),
            _section("Post-market monitoring", "9", _post_market()),
        ),
    )


class _Measured:
    """The version's outputs on the charter's public set, or why there are none."""

    def __init__(self, charter: Charter, version: Version, find_blob: FindBlob | None) -> None:
        self.data: PublicData | None = None
        self.outputs: list[list[float]] = []
        self.missing = "the charter declares no public set"
        if charter.public_set is None:
            return
        self.missing = "the public set or the weights are not at hand where this card was made"
        public = None if find_blob is None else find_blob(charter.public_set.digest)
        weights = None if find_blob is None else find_blob(version.digest)
        if public is None or weights is None:
            return
        try:
            self.data = PublicData.read(charter, public)
            flat = weights_of_file(charter.layers, weights)
            self.outputs = model_outputs(charter.layers, flat, self.data.rows)
        except (AuditError, FederationError) as error:
            self.data, self.missing = None, f"they cannot be used ({error})"


def _section(heading: str, annex: str, blocks: Iterator[Block]) -> Section:
    return Section(heading=heading, annex=annex, blocks=tuple(blocks))


def _general(version: Version, charter: Charter) -> Iterator[Block]:
    yield _table(
        ("", ""),
        [
            ("version (SHA-256 of the weights file)", f"`{version.digest}`"),
            ("state", version.state),
            ("registered", f"{version.time}, leaf {version.leaf_index}"),
            ("charter", f"`{charter.digest}`"),
            ("run", f"`{version.registered.run}`"),
            ("purposes allowed", ", ".join(charter.purposes)),
            ("sites", ", ".join(charter.site_names)),
        ],
    )
    yield Paragraph(
        "Any other purpose is refused by policy and logged. Who provides and deploys the system, and on "
        f"which hardware: {NO_EVIDENCE}; the log does not hold it."
    )


def _elements(charter: Charter) -> Iterator[Block]:
    yield Paragraph(
        f"{charter.model.family}, {charter.dimension} parameters, layers from a closed "
        "set; no code travels with a model. Trained across the sites' own data, which stay there; what "
        f"leaves a site is {_leaves(charter)}. The charter fixes data contract, model, plan, privacy and "
        "gates before the first round, and every site signed it."
    )


def _leaves(charter: Charter) -> str:
    if charter.privacy.by_site:
        return "its whole update, clipped, with its share of the noise and under masks"
    return "a noised sum"


def _data(charter: Charter) -> Iterator[Block]:
    label = charter.label
    kind = f"classes {', '.join(label.classes)}" if label.classes else f"{label.lower} to {label.upper}"
    yield Paragraph(
        f"Predicts **{label.name}** ({charter.task}; {kind}). Bounds are declared, never read from data."
    )
    yield _table(("feature", "type", "unit", "range", "missing"), [_feature(f) for f in charter.features])
    yield Paragraph(
        f"Where the data came from, how they were collected, labelled and cleaned: {NO_EVIDENCE} in the log; "
        "each site answers for its own."
    )


def _feature(feature: Feature) -> tuple[str, ...]:
    if feature.type == "category":
        allowed = ", ".join(feature.categories or ())
    elif feature.type == "boolean":
        allowed = "true, false"
    else:
        allowed = f"{feature.lower} to {feature.upper}" + (" (log)" if feature.transform == "log" else "")
    return feature.name, feature.type, feature.unit or "", allowed, feature.missing


def _training(ledger: Ledger, version: Version, charter: Charter) -> Iterator[Block]:
    run = version.registered.run
    rounds = [body for _, body in registry.bodies(ledger, RoundCompleted, run=run)]
    accepted = {body.site for _, body in registry.bodies(ledger, RunAccepted, run=run)}
    given: dict[str, int] = dict.fromkeys(charter.site_names, 0)
    for _, statement in registry.bodies(ledger, SiteStatement, run=run):
        given[statement.site] = given.get(statement.site, 0) + 1
    plan = charter.plan
    yield Paragraph(
        f"{charter.model.family}, {charter.dimension} parameters; {plan.strategy}, {len(rounds)} of "
        f"{plan.rounds} rounds completed, {plan.local_steps} step(s) a round; the version is the mean "
        f"of rounds {version.registered.averaged_from} to {version.registered.averaged_to}."
    )
    yield _table(
        ("site", "nominal rows (public)", "accepted the run", "statements"),
        [
            (
                s.name,
                "not told" if charter.privacy.by_site else str(s.nominal_rows),
                "yes" if s.name in accepted else NO_EVIDENCE,
                str(given[s.name]),
            )
            for s in charter.sites
        ],
    )


def _privacy(version: Version, charter: Charter) -> Iterator[Block]:
    privacy = charter.privacy
    yield Paragraph(
        f"Epsilon for one **{privacy.unit}**, relation {privacy.relation}, delta {privacy.delta}; "
        f"the charter allows {privacy.epsilon}. Recomputed from events that the sites attested; that noise "
        "was drawn is attested, not proved."
    )
    yield _table(
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
            for c in version.registered.costs
        ],
    )
    yield Paragraph(
        "The last figure composes every run as if all had been fixed ahead; each site's own hard stop is a "
        "filter that needs no such assumption."
    )
    if privacy.by_site:
        neighbour = "any others" if privacy.relation == "replace_one" else "nothing"
        row = epsilon_text(plan_cost(charter).row or 0)
        yield Paragraph(
            f"The unit is a whole site, all its rows replaced by {neighbour}; every round counts in full, "
            "since the log shows who took part. Nothing is clipped or noised for a row: **a row has its "
            f"site's protection and none of its own**, epsilon {row} for a run, relation replace_one."
        )
    secure = charter.secure
    if secure is not None:
        yield Paragraph(
            f"Updates were masked, and the sites shared the noise: it is whole while {secure.sharers} of "
            f"those in a round are honest. Of {secure.sites} sites {secure.tolerated} may drop out or "
            f"collude; a round ends with {secure.least} or more."
        )
    if charter.site_level is not None:
        whole = plan_cost(charter).whole_site
        yield Paragraph(
            f"A whole site, all its rows replaced by nothing: epsilon {epsilon_text(whole or 0)} "
            f"for a run, delta {privacy.delta}; the charter allows {charter.site_level.epsilon}."
        )
    over = [c.site for c in version.registered.costs if Decimal(c.run_epsilon) > privacy.epsilon]
    if over:
        yield Paragraph(f"**Above the charter's epsilon: {', '.join(over)}.**")


def _control(charter: Charter) -> Iterator[Block]:
    answers = charter.answers
    given = "six decimals"
    if answers is not None and answers.label_only:
        given = "the label alone, without any confidence"
    elif answers is not None and answers.decimals != EXACT:
        given = f"{answers.decimals} decimals"
    yield Bullets(
        (
            "An input outside the data contract is refused, with the field named.",
            f"An answer lets out {given}.",
            "Every answer is an entry that names version and policies and commits to input and output.",
            "A verifier recomputes an answer from the opened input and the weights.",
            "Attributions to single features are given on request and committed to with the answer.",
            f"Officers of the charter who approve and retire, by their own keys: {len(charter.officers)}.",
        )
    )


def _metrics(
    version: Version, charter: Charter, measured: _Measured, evaluated: RunEvaluated | None
) -> Iterator[Block]:
    if not version.registered.gates:
        yield Paragraph("NO EVIDENCE: the charter names no metric that anybody can recompute.")
    else:
        rows = charter.public_set.rows if charter.public_set else 0
        yield Paragraph(f"On the charter's public set of {rows} rows, which a verifier recomputes.")
        yield _table(
            ("metric", "value", "trivial baseline", "needed", "source", "gate"),
            [
                (
                    g.metric,
                    g.value,
                    g.baseline,
                    g.floor or "-",
                    g.source,
                    "passed" if g.passed == 1 else "FAILED",
                )
                for g in version.registered.gates
            ],
        )
    if measured.data is None:
        yield Paragraph(f"Confidence intervals: {NO_EVIDENCE}; {measured.missing}.")
    else:
        found = intervals(charter, measured.data, measured.outputs, seed=version.digest)
        yield Paragraph(
            "With 95 % confidence, by chance of the public set's rows alone (Wilson's interval of a share; "
            "percentile bootstrap, seeded by the version, of the others):"
        )
        yield _table(
            ("metric", "value", "from", "to", "rows", "method"),
            [
                (i.name, _number(i.value), _number(i.lower), _number(i.upper), str(i.rows), i.method)
                for i in found
            ],
        )
    if evaluated is not None and evaluated.metrics:
        value, spread = evaluated.metrics[0].value, float(evaluated.spread)
        low, high = float(value) - 1.96 * spread, float(value) + 1.96 * spread
        yield Paragraph(
            f"On rows that stayed at the sites: {evaluated.metrics[0].name} {value}, between {_number(low)} "
            f"and {_number(high)} by the noise that the sites added (95 %; chance of the rows comes on top). "
            "Counted as the sites attest, paid for on each odometer."
        )


def _fairness(charter: Charter, measured: _Measured) -> Iterator[Block]:
    if charter.fairness is None:
        yield Paragraph(f"{NO_EVIDENCE}: the charter declares no groups.")
        return
    if measured.data is None:
        yield Paragraph(f"{NO_EVIDENCE} for {', '.join(charter.fairness.groups)}: {measured.missing}.")
        return
    try:
        found = fairness(charter, measured.data, measured.outputs)
    except ImportError:
        yield Paragraph(f"{NO_EVIDENCE}: this installation cannot tell groups apart; it needs fairlearn.")
        return
    yield Paragraph(
        "On the public set; what holds there need not hold for the people of a site. A share stands with its "
        f"95 % interval. Groups of fewer than {FEW_ROWS} rows are marked: their figures say little."
    )
    for feature in found:
        yield _table(*_group_table(charter, feature))
        if feature.differences:
            told = ", ".join(
                f"{_words(name)} {_number(v)}" for name, v in sorted(feature.differences.items())
            )
            yield Paragraph(f"Largest difference between groups of **{feature.feature}**: {told}.")


def _group_table(charter: Charter, feature: FeatureFairness) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    if charter.task == "regression":
        header: tuple[str, ...] = (feature.feature, "rows", "mean absolute error")
        return header, [(_group(g), str(g.rows), _number(g.error)) for g in feature.groups]
    header = (feature.feature, "rows", "accuracy")
    rows: list[tuple[str, ...]] = []
    if charter.task == "binary":
        called = (charter.label.classes or ("", ""))[1]
        header = (*header, f"called {called}", "true positive rate", "false positive rate")
    for group in feature.groups:
        cells = [_group(group), str(group.rows), _interval(group.accuracy)]
        if charter.task == "binary":
            rates = (group.selection_rate, group.true_positive_rate, group.false_positive_rate)
            cells += [_number(rate) for rate in rates]
        rows.append(tuple(cells))
    return header, rows


def _group(group: GroupRates) -> str:
    return f"{group.group} (few rows)" if group.rows < FEW_ROWS else group.group


def _distance(ledger: Ledger, version: Version, charter: Charter) -> Iterator[Block]:
    sketched = registry.run_referenced(ledger, version.registered.run)
    if charter.reference is None or sketched is None or not sketched.sketch:
        yield Paragraph(
            f"{NO_EVIDENCE} of what the training rows were like: no sketch of them was paid for. Each answer "
            "bears a score by the declared bounds alone."
        )
        return
    yield Paragraph(
        f"Each answer bears a score of how far its input lies from the training rows, by a sketch of "
        f"{charter.reference.bins} bins a number that {len(sketched.statements)} sites released with noise "
        f"(`{sketched.sketch}`). The sum is proved, the counts are ATTESTED."
    )


def _alarms(ledger: Ledger, version: Version) -> Iterator[Block]:
    raised = [body for _, body in registry.bodies(ledger, AlarmRaised, model=version.model)]
    closed = {body.alarm for _, body in registry.bodies(ledger, AlarmClosed, model=version.model)}
    if not raised:
        yield Paragraph("The log holds no alarm about this model.")
        return
    kinds = sorted({body.kind for body in raised})
    rows = []
    for kind in kinds:
        of_kind = [body for body in raised if body.kind == kind]
        still = sum(body.alarm not in closed for body in of_kind)
        rows.append((_words(kind), str(len(of_kind)), str(still)))
    yield _table(("about", "raised", "still open"), rows)


_UNITS: Final = {
    "row": "The unit is one row; a person with several rows, or at several sites, has less protection.",
    "subject": "The unit is one subject at one site; a person at several sites has less protection.",
    "site": "The unit is one site; that it takes part is public, and a person at several sites has less "
    "protection.",
}


def _limits(charter: Charter) -> Iterator[Block]:
    items = [
        _UNITS[charter.privacy.unit],
        "What a site's data are, and that its code ran as named, is attested by that site alone.",
        "How long an answer took is not covered by epsilon.",
        "Values beyond the declared ranges are clamped in training and refused in use.",
    ]
    if charter.model.site_intercept:
        items.append("Each site has an intercept of its own, with noise; without a site the mean is used.")
    yield Bullets(tuple(items))


def _appropriate(version: Version, charter: Charter) -> Iterator[Block]:
    metrics = ", ".join(sorted({gate.metric for gate in version.registered.gates})) or "no metric"
    yield Paragraph(
        f"The charter that all sites signed judges a version by {metrics}, each against a trivial baseline. "
        f"Why that is appropriate for the purposes {', '.join(charter.purposes)}: {NO_EVIDENCE} in the log."
    )


def _risks(charter: Charter) -> Iterator[Block]:
    yield Paragraph(
        f"A risk management system in the sense of Article 9: {NO_EVIDENCE} in the log. What is enforced: "
        f"purposes ({', '.join(charter.purposes)}), gates before approval, a privacy budget at each site, "
        "access by policy with every refusal logged. Who can lie about what, and what answers, is tabled in "
        "the threat model."
    )


def _changes(ledger: Ledger, version: Version) -> Iterator[Block]:
    others = [other for other in registry.versions(ledger, version.model) if other.digest != version.digest]
    if not others:
        yield Paragraph("The log registers no other version of this model.")
        return
    yield _table(
        ("other version", "state", "registered", "charter"),
        [
            (f"`{other.digest[:12]}`", other.state, other.time, f"`{other.registered.charter[:12]}`")
            for other in others
        ],
    )


def _approvals(version: Version, charter: Charter, author: str) -> Iterator[Block]:
    officers = {officer.key: officer.name for officer in charter.officers}
    yield Paragraph(f"Charter drawn up by `{author}`, run started by `{version.registered.author}`.")
    if not version.transitions:
        yield Paragraph("NO EVIDENCE: nobody has approved this version.")
        return

    def row(move: VersionTransition, time: str, index: int) -> tuple[str, ...]:
        who = officers.get(move.officer, "unknown officer")
        moved = f"{move.from_state} → {move.to_state}"
        return time, moved, f"{who} `{move.officer}`", move.reason or "-", str(index)

    yield _table(
        ("time", "from, to", "officer", "reason", "leaf"),
        [row(t.body, t.time, t.leaf_index) for t in version.transitions],
    )


def _standards() -> Iterator[Block]:
    yield Paragraph(
        f"Harmonised standards applied: {NO_EVIDENCE}. Formats that a verifier relies on: RFC 6962 and 9162 "
        "(Merkle trees), RFC 8785 (canonical JSON), C2SP signed notes, checkpoints and cosignatures."
    )


def _declaration() -> Iterator[Block]:
    yield Paragraph(f"{NO_EVIDENCE}: a declaration of conformity is the provider's, and is not in the log.")


def _post_market() -> Iterator[Block]:
    yield Paragraph(
        f"A post-market monitoring plan: {NO_EVIDENCE} in the log. What the log keeps for it: every answer "
        "and refusal, the score of every input, alarms and who closed them, reviews, approvals, roll-backs."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(tuple(header), tuple(tuple(row) for row in rows))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}".rstrip("0").rstrip(".")


def _interval(found: Interval | None) -> str:
    if found is None:
        return "-"
    return f"{_number(found.value)} ({_number(found.lower)} to {_number(found.upper)})"


def _words(name: str) -> str:
    return name.replace("_", " ")
