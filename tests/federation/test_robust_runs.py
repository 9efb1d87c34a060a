"""Runs under a robust rule: who is refused or stands apart, and that the verifier rebuilds it all."""

from __future__ import annotations

import json

import pytest

from audit.entries import (
    RoundCompleted,
    RunCompleted,
    SiteStatement,
    SiteUndelivered,
)
from audit.round_bodies import RoundExamined, UpdateRefused
from audit.service import export_evidence
from audit.verify import verify_evidence
from federation.anomaly import view_lines, views_of_run
from federation.charter import Charter
from federation.errors import NotFoundError, RunFailedError
from federation.plots import png_of, updates_figure

TOO_LONG = 1 << 40
AGGREGATION = "The aggregation"


def robust(charter_text, rule="{rule: median}", sites=2, rounds=1):
    text = charter_text.replace("minimum_sites: 2", f"minimum_sites: {sites}")
    text = text.replace("rounds: 3", f"rounds: {rounds}")
    return Charter.parse(text + f"aggregation: {rule}\n")


def policy_of(federation):
    sites = federation.sites.values()
    lines = [f"log {federation.coordinator.log_key}"]
    lines += [f"witness {site.name} {site.cosigner().vkey}" for site in sites]
    return "\n".join([*lines, f"group sites 2 {' '.join(site.name for site in sites)}", "quorum sites", ""])


def evidence_of(federation):
    log = federation.coordinator
    index = max(stored.leaf_index for stored, _ in log.bodies(RunCompleted))
    return export_evidence(log.ledger, log.blobs.find, leaf_index=index)


def judged(federation):
    return verify_evidence(evidence_of(federation), policy_text=policy_of(federation), replay=True)


@pytest.mark.parametrize(
    "rule", ["{rule: median, byzantine: 1}", "{rule: trimmed_mean, byzantine: 1}", "{rule: krum}", "{}"]
)
def test_a_run_under_each_rule_is_rebuilt_bit_for_bit(federation, charter_text, rule):
    for index, site in enumerate(federation.sites.values()):
        site.values = lambda dimension, k=index: [(k + 1) * (i - 3) << 18 for i in range(dimension)]
    federation.train(charter=robust(charter_text, rule, sites=3, rounds=2))
    step = judged(federation).step(AGGREGATION)
    assert step.code == "ok"
    assert "2 rounds replayed" in step.detail
    assert [body.round for body in federation.bodies(RoundExamined)] == [1, 2]


def test_an_update_no_honest_site_sends_is_refused_and_the_run_goes_on(federation, charter_text):
    federation.sites["west"].values = lambda dimension: [TOO_LONG] * dimension
    run = federation.train(charter=robust(charter_text, rounds=2)).run
    (refused,) = federation.bodies(UpdateRefused)
    assert (refused.site, refused.round, refused.reason) == ("west", 1, "norm_bound")
    assert int(refused.norm) > int(refused.bound)
    assert [body.statement.site for body in federation.bodies(SiteUndelivered)] == ["west"]
    assert [body.missing for body in federation.bodies(RoundCompleted)] == [("west",), ()]
    assert {body.site for body in federation.bodies(SiteStatement)} == {"north", "south"}
    report = judged(federation)
    assert "1 were and are left out" in report.step(AGGREGATION).detail
    assert report.step("The odometers").code == "ok"
    first = next(views_of_run(federation.coordinator, run))
    assert dict(zip(first["sites"], map(float, first["length"]), strict=True))["west"] > 1


def test_too_many_refused_updates_end_the_run_and_name_why(federation, charter_text):
    for name in ("west", "south"):
        federation.sites[name].values = lambda dimension: [-TOO_LONG] * dimension
    with pytest.raises(RunFailedError, match="longer than"):
        federation.train(charter=robust(charter_text))
    assert sorted(body.site for body in federation.bodies(UpdateRefused)) == ["south", "west"]
    reported = [body.statement.site for body in federation.bodies(SiteUndelivered)]
    assert sorted(reported) == ["north", "south", "west"]


def test_without_the_key_a_long_update_counts_as_before_and_nothing_is_examined(federation):
    federation.sites["west"].values = lambda dimension: [TOO_LONG] * dimension
    federation.train()
    assert federation.bodies(UpdateRefused) == []
    assert federation.bodies(RoundExamined) == []
    assert judged(federation).step(AGGREGATION).code == "ok"


def test_the_view_shows_each_round_as_text_and_as_a_picture(federation, charter_text):
    run = federation.train(charter=robust(charter_text)).run
    views = list(views_of_run(federation.coordinator, run))
    lines = view_lines(views)
    assert len(lines) == 2 + 1 + 2 + 3
    assert json.loads(json.dumps(views)) == views
    assert png_of(updates_figure(views)).startswith(b"\x89PNG")


def test_a_view_of_an_unknown_run_or_of_updates_that_are_gone_is_refused(federation, charter_text):
    with pytest.raises(NotFoundError):
        list(views_of_run(federation.coordinator, "no-such-run"))
    run = federation.train(charter=robust(charter_text)).run
    digest = federation.bodies(SiteStatement)[0].update
    (found,) = [path for path in federation.home.rglob("*") if path.name.startswith(digest)]
    found.unlink()
    with pytest.raises(NotFoundError, match=digest[:8]):
        list(views_of_run(federation.coordinator, run))
