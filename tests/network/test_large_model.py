"""Ten million parameters over the whole network, in pieces through real SuperNodes."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest

from audit.entries import RoundCompleted, RunCompleted, SiteStatement
from federation import registry
from federation.flat import initial_vector, model_bytes, model_vector, update_vector
from federation.pieces import PIECE_BYTES
from tests.network.fleet import Fleet, rows_of, wide_charter

SITES = ("north", "south")


@pytest.mark.soak
def test_ten_million_parameters_go_through_real_supernodes() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="aff") as folder,
        Fleet(Path(folder), SITES, lambda name: rows_of(name, 40), charter=wide_charter(3160)) as fleet,
    ):
        run = fleet.start()
        fleet.until(lambda: fleet.end(run) is not None, wait_s=1500)
        ended = fleet.end(run)
        assert isinstance(ended, RunCompleted), ended
        layers, blobs = fleet.charter.layers, fleet.coordinator.blobs
        assert fleet.charter.dimension > 10_000_000
        said = {
            (body.round, body.site): body for _, body in registry.bodies(fleet.ledger, SiteStatement, run=run)
        }
        assert set(said) == {(number, site) for number in (1, 2) for site in SITES}
        weights = initial_vector(layers, fleet.charter.digest)
        for _, body in registry.bodies(fleet.ledger, RoundCompleted, run=run):
            assert body.base_model == hashlib.sha256(model_bytes(layers, weights)).hexdigest()
            updates = [blobs.get(said[body.round, site].update) for site in SITES]
            assert all(len(update) > 15 * PIECE_BYTES for update in updates)
            assert updates[0] != updates[1]
            after = model_vector(layers, blobs.get(body.output_model))
            moved = np.count_nonzero(after != weights)
            assert moved > 9_900_000  # every coordinate has noise of its own
            assert all(np.count_nonzero(update_vector(update)) > 9_900_000 for update in updates)
            weights = after
