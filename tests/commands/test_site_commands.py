"""The commands of a site's people, on a site that has trained."""

from __future__ import annotations

import json
import shutil

import pytest

from clients.home import SiteHome


@pytest.fixture
def home(trained, tmp_path):
    """One trained site's home, to write to."""
    shutil.copytree(trained.folder / "homes" / "sites" / "northgate", tmp_path / "sites" / "northgate")
    return tmp_path


def test_a_review_shows_cost_rules_and_code_and_changes_nothing(run, trained, home):
    before = SiteHome.open(home / "sites" / "northgate").config
    result = run("site", "review", trained.folder / "charter.yaml", "--home", home, "--json")
    found = result.json
    assert result.code == 0
    assert found["lifetime_before"] > 0
    assert found["lifetime_after"] > found["lifetime_before"]
    assert len(found["agent_code"]) == 64
    assert "northgate" in found["members"]
    shown = run("site", "review", trained.folder / "charter.yaml", "--home", home).out
    for word in ("lifetime", "purposes", "members", "this agent's code"):
        assert word in shown
    assert SiteHome.open(home / "sites" / "northgate").config == before


@pytest.mark.parametrize("command", ["review", "accept", "refuse"])
def test_what_does_not_wait_is_named_with_what_does(run, home, command):
    result = run("site", command, "run-17", "--home", home, *(["--yes"] if command == "accept" else []))
    assert result.code == 1
    assert "error site.decision" in result.err
    assert "run-17" in result.err


def test_a_charter_is_refused_and_accepted_again(run, trained, home):
    charter = trained.folder / "charter.yaml"
    refused = run("site", "refuse", charter, "--reason", "purpose_not_allowed", "--home", home, "--json")
    assert refused.json["reason"] == "purpose_not_allowed"
    place = home / "sites" / "northgate"
    assert refused.json["charter"] not in SiteHome.open(place).config.rules.approved_charters
    accepted = run("site", "accept", charter, "--yes", "--home", home, "--json")
    assert accepted.json["decision"] == "accepted"
    assert accepted.json["charter"] in SiteHome.open(place).config.rules.approved_charters


def test_a_reason_of_ones_own_is_no_code(run, trained, home):
    result = run("site", "refuse", trained.folder / "charter.yaml", "--reason", "busy", "--home", home)
    assert result.code == 1
    assert "closed list" in result.err


def test_a_bundle_is_approved_by_its_file_and_withdrawn_by_its_digest(run, home, tmp_path):
    bundle = tmp_path / "app.fab"
    bundle.write_bytes(b"PK")
    approved = run("site", "bundle", "approve", bundle, "--home", home, "--json").json
    place = home / "sites" / "northgate"
    assert SiteHome.open(place).config.rules.approved_bundles == (approved["bundle"],)
    run("site", "bundle", "withdraw", approved["bundle"], "--home", home)
    assert SiteHome.open(place).config.rules.approved_bundles == ()
    assert run("site", "bundle", "approve", "no-such-file", "--home", home).code == 1


def test_the_sites_story_of_a_whole_run_agrees_with_the_federations(run, trained, home, tmp_path):
    exported = run("site", "log", "export", tmp_path / "story.db", "--home", home, "--json").json
    assert exported["entries"] > 5
    log = trained.folder / "homes" / "coordinator" / "log.db"
    policy = trained.folder / "policy.txt"
    result = run("verify", log, "--policy", policy, "--site", tmp_path / "story.db", "--json")
    assert (result.code, result.json["verdict"]) == (0, "VALID"), json.dumps(result.json, indent=1)
    assert run("site", "log", "export", tmp_path / "story.db", "--home", home).code == 1


def test_a_launcher_is_written_for_the_sites_own_agent(run, home, tmp_path):
    made = run(
        "site", "launcher", tmp_path / "bin", "--scratch", tmp_path / "scratch", "--home", home, "--json"
    )
    text = (tmp_path / "bin" / "flwr-clientapp").read_text()
    assert made.code == 0
    assert f"unix:{home / 'sites' / 'northgate' / 'run'}" in text


def test_status_says_that_no_agent_runs_and_what_waits(run, home):
    found = run("site", "status", "northgate", "--home", home, "--json").json
    assert (found["agent"], found["waiting"]) == (None, [])


def test_an_agent_of_a_home_in_use_is_refused(run, home):
    from clients.agent import Agent

    agent = Agent.open(home / "sites" / "northgate")
    result = run("site", "agent", "northgate", "--home", home)
    agent.close()
    assert result.code == 1
    assert "stop the other agent first" in result.err


def test_a_site_answers_rows_of_its_own_and_says_that_nobody_vouches_for_it(run, trained, home, tmp_path):
    accepted = trained.run
    (version,) = [path for path in trained.folder.rglob(trained.version) if path.is_file()]
    with (trained.folder / "data" / "northgate.csv").open(encoding="utf-8") as file:
        rows = tmp_path / "rows.csv"
        rows.write_text("".join([next(file) for _ in range(4)]), encoding="utf-8")
    asked = ("site", "predict", rows, "--run", accepted, "--version", version, "--home", home)
    found = run(*asked, "--json").json
    assert found["version"] == trained.version
    assert len(found["answers"]) == 3
    assert {answer["label"] for answer in found["answers"]} <= {"benign", "malignant"}
    assert "local, without a receipt" in run(*asked).out
    refused = run("site", "predict", rows, "--run", "run-9", "--version", version, "--home", home)
    assert (refused.code, "clients.local_prediction" in refused.err) == (1, True)
    missing = run("site", "predict", tmp_path / "no", "--run", accepted, "--version", version, "--home", home)
    assert (missing.code, "site.no_file" in missing.err) == (1, True)
