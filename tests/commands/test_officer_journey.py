"""An officer, a consumer and a site engineer, from `--help` to a verdict, by commands and HTTP alone."""

from __future__ import annotations

import json
import threading
import urllib.parse

import pytest

from audit.entries import RunFailed
from audit.evidence import read_evidence
from audit.keys import SigningKey
from audit.receipts import issue_receipts
from audit.tlog_policy import Policy
from audit.tlog_proof import TlogProof
from tests.commands.conftest import run_command

ROW = {"purpose": "triage", "rows": [{"age": 44.5, "dose": 3.25}]}


@pytest.fixture(scope="module")
def policy(served, tmp_path_factory):
    """What the log proposes, and both sites have cosigned."""
    path = tmp_path_factory.mktemp("policy") / "policy.txt"
    assert run_command("log", "policy", "--url", served.url, "--out", path).code == 0
    witness(served)
    return path


def witness(served):
    served.context.publisher._meeting = None  # a new one now, not in five seconds
    for site in ("alpha", "beta"):
        assert served.own.run("site", "witness", site, "--url", served.url).code == 0


def get(served, role, path, **query):
    from audit.console import call_api

    asked = f"/v1/audit/{path}?{urllib.parse.urlencode(query)}"
    status, data, _ = call_api(served.url, asked, key=served.keys[role])
    return status, data


@pytest.mark.parametrize("given", [(), ("3", "--run", "r"), ("--run", "no-such-run"), ("--version", "x")])
def test_evidence_of_nothing_is_refused_in_one_line(served, tmp_path, given):
    result = served.own.run("evidence", "export", *given, "--out", tmp_path / "e.zip")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert not (tmp_path / "e.zip").exists()


def test_site_status_reads_as_a_person_would_write_it(served):
    shown = served.own.run("site", "status", "alpha").out
    assert "(" not in shown.replace("(in the log:", ""), "no tuple of the language's"
    for word in ("people of alpha", "epsilon 5 at delta 0.00001", "2 releases", "open runs"):
        assert word in shown, shown
    document = served.own.run("site", "status", "alpha", "--json").json
    assert (document["open_runs"], document["operator"]) == ([], "")
    assert len(document["approved_charters"]) == 1
    assert document["approved_charters"][0] in shown


def test_help_of_every_command_explains_every_argument_and_option():
    """A stranger reads nothing else; Click's and Typer's releases may drop what we wrote."""
    import typer

    import affidavit
    from audit.console import show_argument_help

    def walk(command):
        for inner in getattr(command, "commands", {}).values():
            yield from walk(inner)
        yield command

    application = typer.main.get_command(affidavit.build_application())
    show_argument_help(application)
    silent = [
        f"{command.name} {param.name}"
        for command in walk(application)
        for param in command.params
        if not getattr(param, "help", None)
    ]
    assert silent == []


def time_of_approval(served) -> str:
    _, found = served.http("officer", "GET", "/v1/audit/entries?type=version.transition")
    return str(found["entries"][-1]["entry"]["time"])


def verify(path, policy, data):
    path.write_bytes(data)
    return run_command("verify", path, "--policy", policy, "--replay", "--json")


def test_policy_is_the_same_here_and_from_the_server(served, policy):
    here = served.own.run("log", "policy").out
    assert here == policy.read_text()
    found = Policy.parse(here)
    assert [w.name for w in found.witnesses] == ["alpha", "beta"]
    shown = served.own.run("log", "policy", "--address", "beta=https://beta.example/w", "--json").json[
        "policy"
    ]
    assert [w.url for w in Policy.parse(shown).witnesses] == ["", "https://beta.example/w"]
    for wrong in ("gamma=https://x", "beta", "beta=ftp://x", "beta=https://x y"):
        assert served.own.run("log", "policy", "--address", wrong).code == 1, wrong


@pytest.mark.parametrize("by", ["version", "run", "time", "type"])
def test_evidence_of_every_scope_is_downloaded_and_verified_offline(served, policy, tmp_path, by):
    trained = json.loads((served.own.folder / "trained.json").read_text())
    query = {
        "version": {"version": served.own.version},
        "run": {"run": trained["run"]},
        "time": {"since": "2020-01-01T00:00:00Z", "until": time_of_approval(served)},
        "type": {"type": "site.enrolled"},
    }[by]
    status, data = get(served, "officer", "evidence", **query)
    assert status == 200, data
    options = [text for name, value in query.items() for text in (f"--{name}", value)]
    for place in (
        ("--url", served.url, "--key-file", served.key_files["officer"]),
        ("--home", served.own.homes),
    ):
        made = run_command("evidence", "export", *options, "--out", tmp_path / "c.zip", *place)
        assert made.code == 0, made.err
        same = read_evidence((tmp_path / "c.zip").read_bytes())
        assert (same.entries, same.leaf_index) == (
            read_evidence(data).entries,
            read_evidence(data).leaf_index,
        )
    judged = verify(tmp_path / "e.zip", policy, data)
    assert judged.code == 0, judged.out
    entries = read_evidence(data).entries
    if by == "time":
        assert sorted(entries) == list(range(len(entries))), "nothing is missing between them"
    last = max(entries)
    altered = data.replace(entries[last][:60], entries[last][:60].replace(b'"', b"'", 1))
    assert altered != data
    assert verify(tmp_path / "e.zip", policy, altered).code == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_cursor_stays_while_others_append(served, limit):
    """Pages taken one by one while the log grows: every entry once, in order, none skipped."""
    coordinator, stop = served.context.coordinator, threading.Event()
    start = coordinator.ledger.tree_size - 1
    written = []

    def write() -> None:
        while not stop.is_set() and len(written) < 40:
            body = RunFailed(run=f"cursor-{limit}", charter="a" * 64, round=len(written), reason="stopped")
            written.append(coordinator.append(body, "coordinator").leaf_index)

    thread = threading.Thread(target=write)
    thread.start()
    seen, after = [], start
    try:
        while len(seen) < 40:
            status, data = get(served, "officer", "entries", after=after, limit=limit, run=f"cursor-{limit}")
            assert status == 200
            page = [item["leaf_index"] for item in json.loads(data)["entries"]]
            seen += page
            after = page[-1] if page else after
    finally:
        stop.set()
        thread.join()
    assert seen == written
    status, data = get(served, "officer", "count", run=f"cursor-{limit}")
    assert json.loads(data)["entries"] == 40


def test_receipt_is_checked_against_the_server_and_a_broken_one_convicts(served, policy, tmp_path):
    _, answered = served.http("consumer", "POST", "/v1/models/own/predict", ROW)
    answer, out = tmp_path / "answer.json", tmp_path / "fork.json"
    answer.write_text(json.dumps(answered))
    ask = ("log", "prove-fork", "--receipt", answer, "--url", served.url, "-o", out, "--key-file")
    kept = run_command(*ask, served.key_files["consumer"])
    assert (kept.code, "audit.no_misbehaviour" in kept.err) == (1, True)
    coordinator = served.context.coordinator
    index = answered["receipt"]["leaf_index"]
    times = {"time": "2026-01-02T03:04:05Z", "merge_deadline": "2026-01-02T03:05:05Z"}

    def promised(key, leaf):
        (made,) = issue_receipts(key, coordinator.origin, [(leaf, b"x" * 32)], **times)
        answer.write_text(json.dumps(made.to_json()))

    promised(coordinator.signer.key, index)
    assert run_command(*ask, served.key_files["consumer"], "--json").json["conclusive"]
    assert run_command("verify", out, "--policy", policy).code == 0
    promised(SigningKey.generate(), index)
    assert run_command(*ask, served.key_files["consumer"]).code == 0
    assert run_command("verify", out, "--policy", policy).code == 1, "nobody's promise but the log's"
    promised(coordinator.signer.key, index - 1)
    hidden = run_command(*ask, served.key_files["consumer"])
    assert (hidden.code, "log.not_shown" in hidden.err) == (1, True)
    promised(coordinator.signer.key, 10_000)
    coordinator.append(RunFailed(run="r", charter="a" * 64, round=1, reason="stopped"), "coordinator")
    coordinator.publish()
    served.context.publisher._meeting = None
    assert run_command(*ask, served.key_files["consumer"]).code == 0
    assert run_command("verify", out, "--policy", policy).code == 6, "judged by the witnesses' clocks"
    witness(served)
    assert run_command(*ask, served.key_files["consumer"]).code == 0
    assert run_command("verify", out, "--policy", policy).code == 0
    nobody = run_command(*ask[:4], "--url", "http://127.0.0.1:9", "-o", out)
    assert (nobody.code, "command.unreachable" in nobody.err) == (1, True)


def test_site_goes_on_witnessing_after_the_log_changed_its_key(served, policy, tmp_path):
    """Last in this file: the log keeps the new key."""
    run, site = served.own.run, ("site", "witness", "alpha", "--url", served.url)
    assert run(*site).code == 0
    served.context.coordinator.rotate_log_key(0)
    served.context.coordinator.publish()
    served.context.publisher._meeting = None
    refused = run(*site)
    assert (refused.code, "witness_signature" in refused.err) == (1, True), "it knows only the old key"
    fresh = tmp_path / "policy.txt"
    assert run("log", "policy", "--out", fresh).code == 0
    assert run("site", "follow", "alpha", "--policy", fresh, "--json").json["keys"] == [
        log.verifier.vkey for log in Policy.parse(fresh.read_text()).logs
    ]
    assert run(*site).code == 0
    assert run("site", "follow", "beta", "--policy", fresh).code == 0
    assert run("site", "witness", "beta", "--url", served.url).code == 0
    status, data = get(served, "officer", "entries/0/proof.tlog-proof", wait="witnessed")
    assert status == 200
    assert len(
        Policy.parse(fresh.read_text()).open(TlogProof.parse(data).checkpoint_note, now=2**40).witnesses
    )
    text = fresh.read_text()
    new = f"log {served.context.coordinator.log_key}"
    stranger = tmp_path / "stranger.txt"
    stranger.write_text("\n".join(line for line in text.split("\n") if not line.startswith("log ")))
    from audit.notes import NoteSigner

    key = NoteSigner(served.context.coordinator.origin, SigningKey.generate()).vkey
    stranger.write_text(f"log {key}\n{stranger.read_text()}")
    refused = run("site", "follow", "alpha", "--policy", stranger)
    assert (refused.code, "--new-key" in refused.err) == (1, True)
    assert new in (served.own.homes / "sites" / "alpha" / "policy.txt").read_text()
    assert run("site", "follow", "alpha", "--policy", stranger, "--new-key").code == 0
