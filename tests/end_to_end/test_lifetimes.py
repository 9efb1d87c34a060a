"""What a population has spent over several runs, whose plans may follow what earlier ones showed."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pandas as pd
import pytest

from audit.entries import VersionRegistered
from audit.epsilon import rdp_epsilon
from audit.principal import LocalOwner, Principal
from audit.service import export_evidence
from audit.verify import verify_evidence
from clients.simulation import run_federation, simulate
from federation.registry import statements
from federation.service import RegisterRequest, register
from federation.trust import federation_policy

CHARTER = """
name: twice
task: binary
features: [{name: x, lower: -3, upper: 3}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 2}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 3,
  sample_rate: RATE}
gates: [{metric: auc, floor: 0}]
"""


def rows(count: int, seed: int) -> pd.DataFrame:
    x = pd.Series(range(count)).sample(frac=1, random_state=seed) / count * 6 - 3
    return pd.DataFrame({"x": x, "y": ["yes" if value > 0 else "no" for value in x]})


@pytest.mark.parametrize(("rate", "by_rdp"), [("0.5", True), ("1", False)])
def test_sampled_releases_over_two_runs_are_counted_by_rdp(tmp_path: Path, rate: str, by_rdp: bool) -> None:
    sites = {name: rows(60, seed) for seed, name in enumerate("abc")}
    run = simulate(CHARTER.replace("RATE", rate), sites, public=rows(40, 9), folder=tmp_path / "f")
    federation, log = run.federation, run.federation.coordinator
    again = run_federation(
        run.charter, federation.homes, log, federation.scientist.key, public_set=federation.public_file
    )
    author = federation.scientist
    principal = Principal(id=author.key.verify_key.fingerprint, role="scientist", key=author.public)
    register(log, principal, LocalOwner(), RegisterRequest(run=again.run))
    ((leaf, registered),) = log.bodies(VersionRegistered)
    claim = registered.epsilons[0]
    events = [s.event for s in statements(log.ledger, site="a")]
    bound = rdp_epsilon(events, 1e-5)
    assert len(events) == 4
    assert (Decimal(claim.lifetime_epsilon) >= Decimal(bound)) is by_rdp
    assert Decimal(claim.run_epsilon) < Decimal(claim.run_epsilon_rdp)

    log.publish()
    policy = federation_policy(
        log.log_key, {n: h.keys().witness_signer(n).vkey for n, h in federation.homes.items()}
    )
    data = export_evidence(log.ledger, log.blobs.find, leaf_index=leaf.leaf_index)
    step = verify_evidence(data, policy_text=policy.format()).step("Epsilon")
    assert step.word == "PROVED", step
    run.close()
