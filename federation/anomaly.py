"""The officer's view of a run's updates: made again from log and kept updates, and logged by digest.

`round_view` makes one round's document while the run goes on, `views_of_run` all of them afterwards. Under
secure aggregation there is no update of one site, and so no view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from audit.anomaly import SiteFacts, examine
from audit.canonical import canonical_bytes
from audit.entries import RoundCompleted, SiteStatement
from audit.replay import AggregationPlan
from audit.round_bodies import RoundExamined, UpdateRefused
from audit.update_bounds import UpdateTerms
from audit.weights import decode_update
from federation import registry
from federation.charter import Charter
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import MaskedRunError, NotFoundError
from federation.robust_rules import left_to_right

Vector: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
RoundView: TypeAlias = dict[str, Any]


def round_view(charter: Charter, server_round: int, updates: Mapping[str, Sequence[int]]) -> RoundView:
    """Return `audit.anomaly`'s document for the updates of one round, refused ones included.

    Raises:
        AnomalyError: there is none.
    """
    plan = AggregationPlan.of_charter(charter.document)
    facts, vectors = [], []
    for site in sorted(updates):
        terms = UpdateTerms.of_charter(
            charter.document, site, dimension=charter.dimension, released=charter.released
        )
        divisor = plan.divisor(terms.nominal_rows)
        facts.append(SiteFacts(site=site, bound=terms.norm_bound / divisor, noise=terms.noise_std / divisor))
        vectors.append(np.array(updates[site], dtype=np.int64).astype(np.float64) / divisor)
    return examine(server_round, facts, vectors, charter.released, _dot)


def record_view(
    coordinator: Coordinator,
    charter: Charter,
    completed: RoundCompleted,
    updates: Mapping[str, Sequence[int]],
) -> RoundView:
    """Keep a round's document by digest and name it in the log."""
    view = round_view(charter, completed.round, updates)
    body = RoundExamined(
        run=completed.run,
        round=completed.round,
        digest=coordinator.blobs.put(canonical_bytes(view)),
        apart=tuple(view["apart"]),
    )
    coordinator.append(
        body, "coordinator", stable_event_id("round.examined", completed.run, str(completed.round))
    )
    return view


def views_of_run(coordinator: Coordinator, run: str) -> Iterator[RoundView]:
    """Yield one document a completed round of `run`, in order, made again from the kept updates.

    Raises:
        NotFoundError: the run, or one of its updates, is not here.
        MaskedRunError: they are masked.
    """
    log = coordinator.ledger
    started = registry.run_started(log, run)
    charter = Charter.from_canonical(registry.charter_text(log, started.charter)[0])
    if charter.secure is not None:
        raise MaskedRunError(run)
    refused = [body for _, body in registry.bodies(log, UpdateRefused, run=run)]
    digests: dict[int, dict[str, str]] = {}
    for _, statement in registry.bodies(log, SiteStatement, run=run):
        digests.setdefault(statement.round, {})[statement.site] = statement.update
    for body in refused:
        digests.setdefault(body.round, {})[body.site] = body.update
    for _, completed in registry.bodies(log, RoundCompleted, run=run):
        updates = {}
        for site, digest in digests.get(completed.round, {}).items():
            data = coordinator.blobs.find(digest)
            if data is None:
                raise NotFoundError("update", digest)
            updates[site] = decode_update(data)
        yield round_view(charter, completed.round, updates)


def view_lines(views: Sequence[RoundView]) -> list[str]:
    """Return the views as text: a line a round, then the cosine map of the last one."""
    if not views:
        return ["no completed round"]
    sites = sorted({site for view in views for site in view["sites"]})
    lines = [
        "distance of each site's update from the others', in multiples of what noise makes (* apart)",
        "round  " + "  ".join(f"{site[:12]:>12}" for site in sites),
    ]
    for view in views:
        cells = dict(zip(view["sites"], view["distance"], strict=True))
        shown = [
            f"{float(cells[site]):.2f}{'*' if site in view['apart'] else ' '}" if site in cells else "- "
            for site in sites
        ]
        lines.append(f"{view['round']:>5}  " + "  ".join(f"{cell:>12}" for cell in shown))
    last = views[-1]
    lines += ["", f"cosines of round {last['round']}"]
    for site, row in zip(last["sites"], last["cosines"], strict=True):
        lines.append(f"{site[:12]:>12}  " + "  ".join(f"{float(value):>6.2f}" for value in row))
    return lines


def _dot(a: Vector, b: Vector) -> float:
    return left_to_right(a * b)
