"""The operator's and the engineer's commands, each in its own home, without a network."""

from __future__ import annotations

import json
import os

import pytest

import affidavit
from clients.home import SiteHome
from clients.network.joining import needs_rotation
from clients.network.membership import NetworkFolder, SiteMembership


@pytest.fixture
def home(tmp_path):
    return tmp_path / "homes"


def run(capsys, *arguments: str) -> tuple[int, dict]:
    code = affidavit.main([*arguments, "--json"])
    out = capsys.readouterr().out.strip().splitlines()
    return code, json.loads(out[-1]) if out else {}


@pytest.fixture
def coordinator(home, capsys):
    code, made = run(
        capsys, "coordinator", "init", "log.example.org/x", "--host", "localhost", "--home", str(home)
    )
    assert code == 0
    return made


def test_init_says_what_a_site_must_be_told(coordinator):
    assert coordinator["address"] == "localhost:8443"
    assert len(coordinator["ca_fingerprint"]) == 64


def test_secrets_are_their_owners_alone(coordinator, home):
    network = home / "coordinator" / "network"
    for name in ("superexec.secret", "tls/ca.key", "tls/server.key", "tls/inner.key"):
        assert os.stat(network / name).st_mode & 0o077 == 0


def test_init_twice_changes_nothing(coordinator, home, capsys):
    before = (home / "coordinator/network/tls/ca.pem").read_bytes()
    code, said = run(
        capsys, "coordinator", "init", "log.example.org/x", "--host", "other", "--home", str(home)
    )
    assert (code, said["error"]["code"]) == (1, "network.error")
    assert (home / "coordinator/network/tls/ca.pem").read_bytes() == before


def test_invite_list_and_revoke(coordinator, home, capsys):
    code, made = run(capsys, "site", "invite", "St Mary", "--home", str(home))
    assert (code, made["site"]) == (0, "st-mary")
    _, listed = run(capsys, "site", "list", "--home", str(home))
    assert [(item["site"], item["state"]) for item in listed["sites"]] == [("st-mary", "invited")]
    assert made["invitation"] not in json.dumps(listed)
    assert run(capsys, "site", "revoke", "st-mary", "--home", str(home))[0] == 0
    code, said = run(capsys, "site", "approve", "st-mary", "--home", str(home))
    assert (code, said["error"]["code"]) == (1, "network.membership")


def test_status_and_doctor_count_the_days(coordinator, home, capsys):
    _, status = run(capsys, "coordinator", "status", "--home", str(home))
    days = {row["name"]: row["days_left"] for row in status["certificates"]}
    assert days["ca"] > 3640
    assert 88 <= days["server"] <= 90
    _, found = run(capsys, "doctor", "--home", str(home))
    assert {"certificate ca", "certificate server"} <= {check["name"] for check in found["checks"]}


@pytest.mark.parametrize("line", ["", "hello", "affidavit-invitation.AAAA.00000000"])
def test_join_refuses_what_is_no_invitation(home, capsys, line):
    code, said = run(capsys, "site", "join", line, "--home", str(home))
    assert (code, said["error"]["code"]) == (1, "network.invitation")


def test_join_decides_nothing_for_the_site(coordinator, home, capsys, tmp_path):
    _, made = run(capsys, "site", "invite", "St Mary", "--home", str(home))
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    code, said = run(
        capsys, "site", "join", made["invitation"], "--data", str(tmp_path / "data.csv"), "--home", str(home)
    )
    assert code == 1
    assert "--lifetime-epsilon" in said["error"]["message"]
    assert not (home / "sites").exists()


@pytest.mark.parametrize("command", ["up", "standing", "leave", "rotate-keys"])
def test_a_site_that_belongs_nowhere_is_told_so(home, capsys, tmp_path, command):
    SiteHome.create(
        home / "sites" / "st-mary", name="st-mary", data=tmp_path / "data.csv", population="p",
        lifetime_epsilon="1", lifetime_delta="0.00001", auto_approve=False,
    )  # fmt: skip
    code, said = run(capsys, "site", command, "st-mary", "--home", str(home))
    assert (code, said["error"]["code"]) == (1, "site.not_joined")


def test_runs_of_an_empty_log(coordinator, home, capsys):
    assert run(capsys, "runs", "list", "--home", str(home)) == (0, {"runs": []})
    code, _ = run(capsys, "runs", "show", "abc", "--home", str(home))
    assert code == 1


def test_node_keys_are_exchanged_in_their_last_month(tmp_path, office):
    folder = NetworkFolder(tmp_path / "network")
    folder.write(
        SiteMembership(
            address="x:1", log=office.log_key, invitation="0" * 64, label="x",
            node_expires="2027-01-24T08:00:00Z", approved=True,
        )
    )  # fmt: skip
    assert not needs_rotation(folder, clock=office.clock)
    office.clock.turn(days=32)
    assert needs_rotation(folder, clock=office.clock)
