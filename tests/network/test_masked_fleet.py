"""A masked run among real processes: SuperLink, SuperNodes, relays and agents, over TLS."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from audit.entries import RunCompleted
from audit.secure_bodies import RoundOpened
from audit.service import NoCheckpointError, export_evidence
from audit.verify import Word, verify_evidence
from federation import registry
from tests.network.fleet import Fleet, kills_charter, rows_of

SITES = ("north", "south", "west")


def of_sites(identities: dict[str, str], officer: str) -> str:
    """The charter where a whole site is the unit."""
    text = kills_charter(identities, officer)
    for old, new in (
        ("unit: row", "unit: site"),
        ("relation: add_remove", "relation: replace_one"),
        ("max_grad_norm: 1", "max_update_norm: 1"),
        ("nominal_rows: 100", "nominal_rows: 1"),
        ("learning_rate: 1,", "learning_rate: 1, local_steps: 4, local_learning_rate: 0.5,"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.mark.soak
@pytest.mark.parametrize(
    ("charter", "unit"), [(kills_charter, "row"), (of_sites, "site")], ids=["rows", "sites"]
)
def test_a_masked_run_over_the_whole_network_is_verified(
    charter: Callable[[dict[str, str], str], str], unit: str
) -> None:
    more = "secure_aggregation: {tolerated: 1}\n"
    with (
        tempfile.TemporaryDirectory(prefix="aff") as folder,
        Fleet(Path(folder), SITES, rows_of, charter=charter, more=more) as fleet,
    ):
        run = fleet.start()
        fleet.until(lambda: fleet.end(run) is not None, wait_s=400)
        ended = fleet.end(run)
        assert isinstance(ended, RunCompleted), ended
        log = fleet.coordinator
        assert [body.round for _, body in registry.bodies(log.ledger, RoundOpened, run=run)] == [1, 2, 3]
        ((stored, _),) = log.entries(run=run, type="run.completed")

        def exported() -> bytes:
            try:
                return export_evidence(log.ledger, log.blobs.find, leaf_index=stored.leaf_index)
            except NoCheckpointError:  # the end is published a moment after it is written
                time.sleep(1)
                return b""

        data = fleet.until(exported)
        policy = next(iter(fleet.homes.values())).policy().format()
        report = verify_evidence(data, policy_text=policy)
        assert report.step("The aggregation").word is Word.PROVED, report.text()
        assert report.step("Epsilon").word is Word.PROVED, report.text()
        assert f"one {unit}" in report.step("Epsilon").detail
