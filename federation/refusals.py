"""Releases that arrived and were not let into the model: reported as undelivered, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping

from audit.entries import SiteUndelivered, event_hash
from audit.round_bodies import UpdateRefused
from audit.update_bounds import UpdateTerms, square_norm
from federation.coordinator import Coordinator, stable_event_id
from federation.statements import AcceptedUpdate


def record_too_long(
    coordinator: Coordinator, updates: Mapping[str, AcceptedUpdate], terms: Mapping[str, UpdateTerms]
) -> dict[str, int]:
    """Keep and log updates that pass the norm bound; return the leaf of each site's reported release.

    The update itself is kept, so that anybody can measure it again.
    """
    leaves = {}
    for site, update in sorted(updates.items()):
        statement = update.statement
        reported = coordinator.append(
            SiteUndelivered(statement=statement),
            f"site:{site}",
            stable_event_id("site.undelivered", event_hash(statement)),
        )
        leaves[site] = reported.leaf_index
        body = UpdateRefused(
            run=statement.run,
            round=statement.round,
            site=site,
            update=coordinator.blobs.put(update.update),
            statement=reported.leaf_hash.hex(),
            reason="norm_bound",
            norm=str(math.isqrt(square_norm(update.values))),
            bound=str(terms[site].norm_bound),
        )
        coordinator.append(
            body, "coordinator", stable_event_id("update.refused", statement.run, site, str(statement.round))
        )
    return leaves
