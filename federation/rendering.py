"""Charters and versions as small HTML tables, for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from audit.cost_bodies import UNBOUNDED, SiteEpsilon

if TYPE_CHECKING:
    from federation.charter import Charter
    from federation.registry import Version


def table(title: str, rows: list[tuple[str, str]]) -> str:
    """Return a two-column table; every cell is escaped."""
    row = "<tr><th align='left'>{}</th><td align='left'>{}</td></tr>"
    cells = "".join(row.format(escape(name), escape(value)) for name, value in rows)
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"


def charter_html(charter: Charter) -> str:
    """Return what matters of a charter at a glance."""
    privacy, plan = charter.privacy, charter.plan
    return table(
        f"Charter {charter.name}",
        [
            ("digest", charter.digest),
            ("task", f"{charter.task}: {charter.label.name} from {len(charter.features)} features"),
            ("model", f"{charter.model.family}, {charter.dimension} parameters"),
            ("plan", f"{plan.strategy}, {_rounds(charter)}, the last {charter.average_last} averaged"),
            (
                "privacy",
                f"epsilon {privacy.epsilon}, delta {privacy.delta}, one {privacy.unit}, {privacy.relation}",
            ),
            ("sites", ", ".join(charter.site_names)),
            ("gates", ", ".join(gate.metric for gate in charter.gates) or "none"),
            ("purposes", ", ".join(charter.purposes)),
            ("use", _use(charter)),
        ],
    )


def _rounds(charter: Charter) -> str:
    plan = charter.plan
    return f"{plan.rounds} rounds" + (f" and {plan.spare_rounds} spare" if plan.spare_rounds else "")


def _use(charter: Charter) -> str:
    days = charter.max_age_days
    said = (
        "a person reviews each decision" if charter.decisions == "legal_effect" else "",
        "every request says its legal basis" if charter.legal_basis else "",
        f"from {', '.join(charter.regions)} alone" if charter.regions else "",
        f"for {days} days after registration" if days else "",
    )
    return "; ".join(part for part in said if part) or "no terms beyond the purposes"


def _ever(cost: SiteEpsilon) -> str:
    return "no bound" if cost.lifetime_epsilon == UNBOUNDED else cost.lifetime_epsilon


def version_html(version: Version) -> str:
    """Return a version's state, gates and epsilon at a glance."""
    registered = version.registered
    gates = [
        f"{gate.metric} {gate.value} (baseline {gate.baseline}) {'passed' if gate.passed == 1 else 'FAILED'}"
        for gate in registered.gates
    ]
    costs = [
        f"{cost.site} {cost.run_epsilon} ({_ever(cost)} for all its releases until registration)"
        for cost in registered.costs
    ]
    return table(
        f"Version {version.digest[:12]} of {version.model}",
        [
            ("digest", version.digest),
            ("state", version.state),
            ("run", registered.run),
            ("gates", "; ".join(gates) or "none"),
            ("epsilon", "; ".join(costs)),
        ],
    )
