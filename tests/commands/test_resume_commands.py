"""`runs resume`, `runs list` and `runs show` for a run whose process died, in a home of one machine."""

from __future__ import annotations

import json
import re

import pytest

from audit.keys import SigningKey
from audit.principal import LocalOwner, Principal
from audit.round_bodies import RunResumed
from clients.home import SiteHome
from clients.simulated_launch import inprocess_launch
from clients.simulation import _open_agents, join_all
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.registry import charter_text, run_started
from federation.service import TrainRequest, run_config, start_run


class Power(BaseException):
    """The end of the process."""


@pytest.fixture
def broken_off(own):
    """Return (own, run): a second run of the same charter that died when round 2 had been asked."""
    from contextlib import ExitStack

    person = Principal(id="curie", role="scientist")
    with Coordinator.open(own.homes / "coordinator") as log:
        first = json.loads((own.folder / "trained.json").read_text())["run"]
        text, _ = charter_text(log.ledger, run_started(log.ledger, first).charter)
        charter = Charter.from_canonical(text)
        for name in charter.site_names:  # for two runs of the same epsilon
            settings = own.homes / "sites" / name / "site.yaml"
            settings.write_text(re.sub(r"(epsilon: ['\"]?)5\b", r"\g<1>50", settings.read_text()))
        homes = {name: SiteHome.open(own.homes / "sites" / name) for name in charter.site_names}
        join_all(homes, log)
        author = SigningKey.generate()
        run = start_run(log, person, LocalOwner(), TrainRequest(charter=charter), author)

        def die(site, message):
            if message.metadata.group_id == "2" and not message.metadata.reply_to_message_id:
                raise Power
            return 0.0

        config = {**run_config(log, run, person), "hold-s": "0"}
        with ExitStack() as stack:
            launch = inprocess_launch(_open_agents(homes, log, stack), fault=die)
            with pytest.raises(Power):
                launch(config)
    return own, run


def test_a_run_that_was_broken_off_is_shown_resumed_and_registered(broken_off):
    own, run = broken_off
    listed = own.run("runs", "list", "--json").json["runs"]
    assert [(item["state"], item["resumable"]) for item in listed] == [
        ("completed", False),
        ("running", True),
    ]
    shown = own.run("runs", "show", run[:12]).out
    assert "broken off, resumable" in shown
    assert "round 2: at least 2 of the sites alpha, beta" in shown
    followed = own.run("runs", "follow", run[:12], "--json")
    assert followed.code == 1
    resumed = own.run("runs", "resume", run[:12])
    assert resumed.code == 0, resumed.err
    assert f"run {run} is complete" in resumed.out
    assert "\nround   2/2  2 sites  " in resumed.out
    assert "round round" not in resumed.out
    again = own.run("runs", "resume", run[:12], "--json")
    assert again.code == 0, again.err
    last = json.loads(again.out.splitlines()[-1])
    assert last["run"] == run
    view = own.run("runs", "show", run[:12], "--json").json
    assert (view["state"], view["resumed"], view["undelivered"]) == ("completed", 1, {})
    with Coordinator.open(own.homes / "coordinator") as log:
        ((_, body),) = log.bodies(RunResumed)
    assert (body.round, body.principal) == (2, "operator")
    assert "2" in own.run("site", "status", "alpha", "--json").out


def test_a_run_nobody_prepared_or_several_runs_are_not_guessed(own):
    missing = own.run("runs", "resume", "ffffffff")
    assert missing.code == 1
    assert "runs.not_found" in missing.err
    assert "was never prepared in this home" in missing.err


def test_a_site_whose_home_is_gone_is_named_and_nothing_ends(broken_off):
    own, run = broken_off
    (own.homes / "sites" / "beta" / "site.yaml").rename(own.folder / "away.yaml")
    refused = own.run("runs", "resume", run[:12])
    assert refused.code == 1
    assert "beta" in refused.err
    (own.folder / "away.yaml").rename(own.homes / "sites" / "beta" / "site.yaml")
    view = own.run("runs", "show", run[:12], "--json").json
    assert (view["state"], view["resumable"]) == ("running", True)
