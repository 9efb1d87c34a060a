"""A site that exchanged its keys between two runs: its past stays its own, its future is the new key's."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from audit.entries import RunCompleted, SiteEnrolled, SiteStatement, VersionRegistered
from audit.principal import LocalOwner, Principal
from audit.service import export_evidence
from audit.verify import verify_evidence
from clients.identity import PAST_STATEMENT_KEYS, SiteKeys
from clients.simulation import run_federation, simulate
from federation.service import RegisterRequest, register
from federation.trust import federation_policy

CHARTER = """
name: twice
task: binary
features: [{name: x, lower: -3, upper: 3}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 2}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 3}
gates: [{metric: auc, floor: 0}]
"""


def rows(count: int, seed: int) -> pd.DataFrame:
    x = pd.Series(range(count)).sample(frac=1, random_state=seed) / count * 6 - 3
    return pd.DataFrame({"x": x, "y": ["yes" if value > 0 else "no" for value in x]})


def test_statements_of_the_old_key_and_of_the_new_one_prove_one_lifetime(tmp_path: Path) -> None:
    sites = {name: rows(60, seed) for seed, name in enumerate("abc")}
    run = simulate(CHARTER, sites, public=rows(40, 9), folder=tmp_path / "f")
    federation, log = run.federation, run.federation.coordinator
    home = federation.homes["a"]
    before = home.keys()
    after = SiteKeys.rotate(home.path / "keys")
    assert (after.identity.text, after.witness.text) == (before.identity.text, before.witness.text)
    assert after.statement.text != before.statement.text
    assert [key.text for key in after.past_statements] == [before.statement.verify_key.text]

    again = run_federation(
        run.charter, federation.homes, log, federation.scientist.key, public_set=federation.public_file
    )
    assert [body.run for _, body in log.bodies(RunCompleted)][-1] == again.run
    keys = [body.statement_key for _, body in log.bodies(SiteEnrolled) if body.site == "a"]
    assert keys == [before.statement.text, after.statement.text]
    author = federation.scientist
    principal = Principal(id=author.key.verify_key.fingerprint, role="scientist", key=author.public)
    register(log, principal, LocalOwner(), RegisterRequest(run=again.run))
    ((leaf, registered),) = log.bodies(VersionRegistered)
    assert registered.gates
    log.publish()
    policy = federation_policy(
        log.log_key, {n: h.keys().witness_signer(n).vkey for n, h in federation.homes.items()}
    )
    data = export_evidence(log.ledger, log.blobs.find, leaf_index=leaf.leaf_index)
    report = verify_evidence(data, policy_text=policy.format())
    for step in ("The sites and their keys", "The rounds and their statements", "Epsilon"):
        assert report.step(step).word == "PROVED", report.text()
    assert len([1 for _, body in log.bodies(SiteStatement) if body.site == "a"]) == 4
    run.close()


def test_an_exchange_that_was_cut_short_is_finished_and_loses_no_key(tmp_path: Path) -> None:
    first = SiteKeys.create(tmp_path / "keys")
    from audit.keys import SigningKey

    SigningKey.generate().save(tmp_path / "keys" / "statement.pem.next", None)  # killed before the second
    second = SiteKeys.rotate(tmp_path / "keys")
    (tmp_path / "keys" / "agreement.pem").rename(tmp_path / "keys" / "agreement.pem.next")
    (tmp_path / "keys" / "agreement.pem").write_bytes((tmp_path / "keys" / "agreement.pem.next").read_bytes())
    third = SiteKeys.rotate(tmp_path / "keys")  # killed between the two: the statement key is new already
    assert third.statement.text == second.statement.text != first.statement.text
    assert (tmp_path / "keys" / PAST_STATEMENT_KEYS).read_text().split() == [first.statement.text]
    assert not list((tmp_path / "keys").glob("*.next"))
