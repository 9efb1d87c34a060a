"""Gates: what a version must show before anybody may approve it, and what it cost each site."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from audit.cost_bodies import UNBOUNDED
from audit.entries import GateResult, SiteEpsilon, SiteStatement
from audit.epsilon import needs_rdp
from audit.metrics import gate_result
from audit.private_evaluation import SOURCE, private_gate
from audit.round_bodies import RunEvaluated
from audit.units import counted_for
from federation.accounting import spent
from federation.charter import Charter
from federation.errors import PublicSetError
from federation.evaluation import PublicData, model_outputs


def judge(
    charter: Charter,
    data: PublicData | None,
    weights: Sequence[float],
    evaluated: RunEvaluated | None = None,
) -> tuple[GateResult, ...]:
    """Return the charter's gates for these weights: on the public set, or by the sites' released counts.

    Raises:
        PublicSetError: a gate counts on the public set, which is not here.
    """
    document = charter.document
    if not document["gates"]:
        return ()
    if all(gate["source"] == SOURCE for gate in document["gates"]):
        return tuple(private_gate(gate, evaluated) for gate in document["gates"])
    if data is None:
        raise PublicSetError(
            "the charter's gates count on its public set, which is not in this home; add the file"
        )
    outputs = model_outputs(charter.layers, weights, data.rows)
    return tuple(
        private_gate(gate, evaluated)
        if gate["source"] == SOURCE
        else gate_result(gate, data.digest, charter.task, document["label"], data.labels, outputs)
        for gate in document["gates"]
    )


def epsilons(charter: Charter, run: str, statements: Sequence[SiteStatement]) -> tuple[SiteEpsilon, ...]:
    """Return what the run, and each population's whole life in this log, cost: PLD, with RDP beside it.

    Where later runs could follow earlier results and rows were sampled, the lifetime is RDP's alone. It is
    counted in the charter's unit: of a site that once released what bounds nothing of a whole site, "none".

    `statements` are all statements of the log, delivered or not.
    """
    delta = charter.privacy.delta
    found = []
    of_population: dict[tuple[str, str], list[SiteStatement]] = {}
    for statement in statements:
        of_population.setdefault((statement.site, statement.population), []).append(statement)
    populations = sorted({(s.site, s.population) for s in statements if s.run == run})
    for site, population in populations:
        lifetime = of_population[site, population]
        in_run = spent([s.event for s in lifetime if s.run == run], float(delta))
        found.append(
            SiteEpsilon(
                site=site,
                population=population,
                events=sum(s.run == run for s in lifetime),
                run_epsilon=in_run.pld_text,
                run_epsilon_rdp=in_run.rdp_text,
                lifetime_epsilon=lifetime_epsilon(lifetime, in_run.unit, delta),
                delta=charter.document["privacy"]["delta"],
                accountant=charter.privacy.accountant,
                relation=in_run.relation,
                unit=in_run.unit,
            )
        )
    return tuple(found)


def lifetime_epsilon(statements: Sequence[SiteStatement], unit: str, delta: Decimal) -> str:
    """Return what all releases of one population cost together, counted for a unit; UNBOUNDED where one of
    them bounds nothing of it.

    Raises:
        AccountingError: they are of units that do not compose, or give no guarantee at this delta.
    """
    events = counted_for([statement.event for statement in statements], unit)
    if events is None:
        return UNBOUNDED
    found = spent(events, float(delta))
    return found.rdp_text if needs_rdp(statements) else found.pld_text


def failed_gates(charter: Charter, gates: Sequence[GateResult], costs: Sequence[SiteEpsilon]) -> list[str]:
    """Return a line for every gate that did not pass; the epsilon gate is always one of them."""
    failed = [
        f"{gate.metric} is {gate.value} on the {gate.source}, trivial baseline {gate.baseline}"
        + (f", floor {gate.floor}" if gate.floor else "")
        for gate in gates
        if gate.passed != 1
    ]
    if not gates:
        failed.append("no gate: the charter names no metric that anybody can recompute")
    failed += [
        f"epsilon of site {cost.site} is {cost.run_epsilon}, the charter allows {charter.privacy.epsilon}"
        for cost in costs
        if Decimal(cost.run_epsilon) > charter.privacy.epsilon
    ]
    return failed
