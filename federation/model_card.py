"""A version's card, written from the log and the registry's files: what was agreed, what happened, what it
cost, who answered for it, and what nobody has shown.

Its headings are those of Annex IV of Regulation (EU) 2024/1689, so that whoever keeps technical documentation
finds the parts that a log can show. Every figure is from the charter's public set or from a release that the
privacy ledger paid for; what nothing shows reads NO EVIDENCE, what somebody merely signed is said to be
attested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from audit.answers import EXACT, AnswerTerms
from audit.entries import CharterSigned, RoundCompleted, RunAccepted, SiteStatement, VersionTransition
from audit.ledger import Ledger
from audit.serving_bodies import AlarmClosed, AlarmRaised
from federation import registry
from federation.card import NO_EVIDENCE, Block, Bullets, Card, Paragraph, Section, Table, told
from federation.card_figures import FindBlob, Measured, fairness_blocks, metric_blocks
from federation.card_privacy import privacy_blocks
from federation.charter import Charter, Feature
from federation.registry import Version

_ABOUT: Final = (
    "Made from what the federation's log and its files held at {} entries; anybody who holds both makes the "
    "same card. The headings are those of Annex IV of Regulation (EU) 2024/1689. It is no legal assessment: "
    "it shows what the log shows, and says NO EVIDENCE where that shows nothing; what somebody merely signed "
    "is ATTESTED. The card is not signed and checks no signature: `affidavit verify` does, on an evidence "
    "file."
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
    measured = Measured.of(charter, version, find_blob)
    evaluated = registry.run_evaluated(ledger, version.registered.run)
    return Card(
        model=version.model,
        version=version.digest,
        title=f"{version.model}, version {version.digest[:12]}",
        about=told(_ABOUT, ledger.tree_size),
        sections=(
            _section("General description", "1", _general(version, charter)),
            _section("Elements and development", "2", _elements(ledger, charter)),
            _section("Data contract", "", _data(charter)),
            _section("Training", "", _training(ledger, version, charter)),
            _section("Privacy", "", privacy_blocks(ledger, version, charter)),
            _section("Monitoring, functioning and control", "3", _control(charter)),
            _section("Metrics", "", metric_blocks(version, charter, measured, evaluated)),
            _section("Fairness by declared groups", "", fairness_blocks(charter, measured)),
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


def _section(heading: str, annex: str, blocks: Iterator[Block]) -> Section:
    return Section(heading=heading, annex=annex, blocks=tuple(blocks))


def _general(version: Version, charter: Charter) -> Iterator[Block]:
    yield _table(
        ("", ""),
        [
            ("version (SHA-256 of the weights file)", told("`{}`", version.digest)),
            ("state", version.state),
            ("registered", f"{version.time}, leaf {version.leaf_index}"),
            ("charter", told("`{}`", charter.digest)),
            ("run", told("`{}`", version.registered.run)),
            ("purposes allowed", ", ".join(charter.purposes)),
            ("sites", ", ".join(charter.site_names)),
        ],
    )
    yield Paragraph(
        told(
            "An answer for any other purpose fails verification once its purpose is opened; the policies "
            "that come with the server refuse and log it. Who provides and deploys the system, and on which "
            "hardware: NO EVIDENCE; the log does not hold it."
        )
    )


def _elements(ledger: Ledger, charter: Charter) -> Iterator[Block]:
    signed = {
        body.site for _, body in registry.bodies(ledger, CharterSigned) if body.digest == charter.digest
    }
    unsigned = [name for name in charter.site_names if name not in signed]
    yield Paragraph(
        told(
            "{}, {} parameters, layers from a closed set; no code travels with a model. Trained across the "
            "sites' own data, which stay there; what leaves a site is {}. The charter fixes data contract, "
            "model, plan, privacy and gates before the first round.",
            charter.model.family,
            charter.dimension,
            _leaves(charter),
        )
    )
    if unsigned:
        yield Paragraph(told("Signature under the charter by {}: NO EVIDENCE.", ", ".join(unsigned)))
    else:
        yield Paragraph("The log holds a signature of every site under the charter.")


def _leaves(charter: Charter) -> str:
    if charter.privacy.by_site:
        return "its whole update, clipped, with its share of the noise and under masks"
    return "a noised sum"


def _data(charter: Charter) -> Iterator[Block]:
    label = charter.label
    kind = f"classes {', '.join(label.classes)}" if label.classes else f"{label.lower} to {label.upper}"
    yield Paragraph(
        told(
            "Predicts **{}** ({}; {}). Bounds are declared, never read from data.",
            label.name,
            charter.task,
            kind,
        )
    )
    yield _table(("feature", "type", "unit", "range", "missing"), [_feature(f) for f in charter.features])
    yield Paragraph(
        told(
            "Where the data came from, how they were collected, labelled and cleaned: NO EVIDENCE in the "
            "log; each site answers for its own."
        )
    )


def _feature(feature: Feature) -> tuple[str, ...]:
    missing = "refused"
    if feature.type == "category":
        allowed, instead = ", ".join(feature.categories or ()), "no category"
    elif feature.type == "boolean":
        allowed, instead = "true, false", "neither"
    else:
        allowed = f"{feature.lower} to {feature.upper}" + (" (log)" if feature.transform == "log" else "")
        instead = "the middle of the range"
    if feature.missing == "midpoint":
        missing = f"counts as {instead}"
    return feature.name, feature.type, "-" if feature.unit in ("", "1") else feature.unit, allowed, missing


def _training(ledger: Ledger, version: Version, charter: Charter) -> Iterator[Block]:
    run = version.registered.run
    rounds = [body for _, body in registry.bodies(ledger, RoundCompleted, run=run)]
    accepted = {body.site for _, body in registry.bodies(ledger, RunAccepted, run=run)}
    given: dict[str, int] = dict.fromkeys(charter.site_names, 0)
    for _, statement in registry.bodies(ledger, SiteStatement, run=run):
        given[statement.site] = given.get(statement.site, 0) + 1
    plan = charter.plan
    first, last = version.registered.averaged_from, version.registered.averaged_to
    yield Paragraph(
        f"{charter.model.family}, {charter.dimension} parameters; {plan.strategy}, {len(rounds)} of "
        f"{plan.rounds} rounds completed, {plan.local_steps} step(s) a round; the version is the "
        + (f"mean of rounds {first} to {last}." if first != last else f"outcome of round {first}.")
    )
    yield _table(
        ("site", "nominal rows (public)", "accepted the run", "statements"),
        [
            (
                s.name,
                "not told" if charter.privacy.by_site else str(s.nominal_rows),
                "yes" if s.name in accepted else told(NO_EVIDENCE),
                str(given[s.name]),
            )
            for s in charter.sites
        ],
    )


def _control(charter: Charter) -> Iterator[Block]:
    yield Bullets(
        (
            "An input outside the data contract is refused, with the field named.",
            f"An answer lets out {_let_out(charter)}.",
            "Every answer is an entry that names version and policies and commits to input and output.",
            "A verifier recomputes an answer from the opened input and the weights.",
            _attributions(charter),
            f"Officers of the charter who approve and retire, by their own keys: {len(charter.officers)}.",
        )
    )


def _let_out(charter: Charter) -> str:
    answers = charter.answers
    if answers is not None and answers.label_only:
        return "the label alone, without any confidence"
    numbers = "values" if charter.task == "regression" else "the label, and probabilities"
    return f"{numbers} of {EXACT if answers is None else answers.decimals} decimals"


def _attributions(charter: Charter) -> str:
    terms = AnswerTerms.of_charter(charter.document)
    if terms.label_only:
        return (
            "Attributions of an answer to single features are refused: the charter lets out labels alone, "
            "and they would tell the score."
        )
    if terms.decimals < EXACT:
        return (
            "Attributions of an answer to single features are refused: the charter rounds its answers, and "
            "they would tell more decimals."
        )
    return (
        "Attributions of an answer to single features are given on request (of a model that is not linear, "
        "where the server has the extra for it) and committed to with the answer."
    )


def _distance(ledger: Ledger, version: Version, charter: Charter) -> Iterator[Block]:
    sketched = registry.run_referenced(ledger, version.registered.run)
    if charter.reference is None or sketched is None or not sketched.sketch:
        yield Paragraph(
            told(
                "NO EVIDENCE of what the training rows were like: {}. Each answer bears a score by the "
                "declared bounds alone.",
                "the charter asks for no sketch of them"
                if charter.reference is None
                else "the log holds no sketch of them, which the charter asks for",
            )
        )
        return
    left_out = f", without {', '.join(sketched.missing)}" if sketched.missing else ""
    yield Paragraph(
        told(
            "Each answer bears a score of how far its input lies from the training rows, by a sketch of {} "
            "bins a number that {} sites released with noise{} (`{}`). A verifier adds it up again; that the "
            "rows were counted as said is ATTESTED.",
            charter.reference.bins,
            len(sketched.statements),
            left_out,
            sketched.sketch,
        )
    )


def _alarms(ledger: Ledger, version: Version) -> Iterator[Block]:
    raised = [body for _, body in registry.bodies(ledger, AlarmRaised, model=version.model)]
    closed = {body.alarm for _, body in registry.bodies(ledger, AlarmClosed, model=version.model)}
    if not raised:
        yield Paragraph(
            told("The log holds no alarm about this model. That somebody watched it: NO EVIDENCE here.")
        )
        return
    rows = []
    for kind in sorted({body.kind for body in raised}):
        of_kind = [body for body in raised if body.kind == kind]
        still = sum(body.alarm not in closed for body in of_kind)
        rows.append((_words(kind), str(len(of_kind)), str(still)))
    yield Paragraph("Of every version of this model:")
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
        told(
            "The charter judges a version by {}, each shown beside a trivial baseline. Why that is "
            "appropriate for the purposes {}: NO EVIDENCE in the log.",
            metrics,
            ", ".join(charter.purposes),
        )
    )


def _risks(charter: Charter) -> Iterator[Block]:
    yield Paragraph(
        told(
            "A risk management system in the sense of Article 9: NO EVIDENCE in the log. What the software "
            "enforces: purposes ({}), gates before approval, a privacy budget at each site, access by policy "
            "with every refusal logged. Who can lie about what, and what answers, is tabled in the threat "
            "model.",
            ", ".join(charter.purposes),
        )
    )


def _changes(ledger: Ledger, version: Version) -> Iterator[Block]:
    others = [other for other in registry.versions(ledger, version.model) if other.digest != version.digest]
    if not others:
        yield Paragraph("The log registers no other version of this model.")
        return
    yield _table(
        ("other version", "state", "registered", "charter"),
        [
            (
                told("`{}`", other.digest[:12]),
                other.state,
                other.time,
                told("`{}`", other.registered.charter[:12]),
            )
            for other in others
        ],
    )


def _approvals(version: Version, charter: Charter, author: str) -> Iterator[Block]:
    officers = {officer.key: officer.name for officer in charter.officers}
    yield Paragraph(
        told("Charter drawn up by `{}`, version registered by `{}`.", author, version.registered.author)
    )
    if not version.transitions:
        yield Paragraph(told("NO EVIDENCE: nobody has approved this version."))
        return

    def row(move: VersionTransition, time: str, index: int) -> tuple[str, ...]:
        who = told("{} `{}`", officers.get(move.officer, "no officer of this charter:"), move.officer)
        share = f" ({move.share} % of the requests)" if move.share else ""
        return time, f"{move.from_state} → {move.to_state}{share}", who, move.reason or "-", str(index)

    yield _table(
        ("time", "from, to", "officer", "reason", "leaf"),
        [row(t.body, t.time, t.leaf_index) for t in version.transitions],
    )


def _standards() -> Iterator[Block]:
    yield Paragraph(
        told(
            "Harmonised standards applied: NO EVIDENCE. Formats that a verifier relies on: RFC 6962 and 9162 "
            "(Merkle trees), RFC 8785 (canonical JSON), C2SP signed notes, checkpoints and cosignatures."
        )
    )


def _declaration() -> Iterator[Block]:
    yield Paragraph(
        told("NO EVIDENCE: a declaration of conformity is the provider's, and is not in the log.")
    )


def _post_market() -> Iterator[Block]:
    yield Paragraph(
        told(
            "A post-market monitoring plan: NO EVIDENCE in the log. What the log keeps for it: every answer "
            "and refusal, the score of every input, alarms and who closed them, reviews, approvals, "
            "roll-backs."
        )
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(tuple(header), tuple(tuple(row) for row in rows))


def _words(name: str) -> str:
    return name.replace("_", " ")
