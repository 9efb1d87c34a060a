"""The command: own data from `init` to an approved version, and one line for everything that goes wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

import affidavit
from audit.evidence import read_evidence
from audit.tlog_proof import TlogProof


def leaf_commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []

    def walk(group, path):
        for name, command in group.commands.items():
            walk(command, (*path, name)) if hasattr(command, "commands") else found.append((*path, name))

    walk(typer.main.get_command(affidavit.build_application()), ())
    return sorted(found)


COMMANDS = leaf_commands()


def test_own_data_trains_registers_and_is_approved_by_commands_alone(own):
    shown = own.run("models", "show", "own", "--json").json["versions"]
    assert [(item["version"], item["state"], item["gates_passed"]) for item in shown] == [
        (own.version, "candidate", True)
    ]
    own.approve()
    listed = own.run("models", "list", "--json").json["models"]
    assert listed == [{"name": "own", "live": own.version, "versions": 1}]
    assert "people of" not in own.run("models", "card", "own").out
    assert own.run("log", "fsck", "--json").json["ok"]


def test_training_spends_the_odometer(own):
    status = own.run("site", "status", "alpha", "--json").json
    assert status["releases"] == 2
    assert 0 < status["lifetime_epsilon"] < 5


def test_training_again_beyond_the_lifetime_budget_is_refused(own, tmp_path):
    again = [
        "train", "--charter", own.folder / "charter.yaml", "--author", own.homes / "scientists" / "curie",
        "--public-set", own.folder / "public.csv",
    ]  # fmt: skip
    sites = []
    for name in ("alpha", "beta"):
        sites += ["--site", f"{name}={_data_of(own.homes / 'sites' / name / 'site.yaml')}"]
    before = own.run("site", "status", "alpha", "--json").json["releases"]
    result = own.run(*again, *sites, "--json")
    assert result.code == 1
    assert result.json["error"]["code"].startswith("federation.")
    assert own.run("site", "status", "alpha", "--json").json["releases"] == before
    assert own.run("log", "fsck").code == 0


@pytest.mark.parametrize("officer", ["scientists/curie", "sites/alpha/keys/identity.pem"])
def test_only_an_officer_of_the_charter_approves(own, officer):
    result = own.run("models", "approve", own.version, "--officer", own.homes / officer, "--json")
    assert (result.code, result.json["error"]["code"]) == (1, "federation.officer")
    assert own.run("models", "show", "own", "--json").json["versions"][0]["state"] == "candidate"


def test_rollback_with_nothing_to_go_back_to_is_refused(own):
    own.approve()
    result = own.run("models", "rollback", "own", "--officer", own.officer, "--json")
    assert (result.code, result.json["error"]["code"]) == (1, "federation.transition")


@pytest.mark.parametrize(
    "arguments",
    [
        ("models", "list"),
        ("models", "show", "own"),
        ("models", "card", "own"),
        ("log", "list"),
        ("log", "list", "--type", "prediction"),
        ("log", "show", "0"),
        ("log", "proof", "0"),
        ("log", "fsck"),
        ("keys", "list"),
        ("keys", "create", "--role", "consumer"),
        ("status",),
        ("doctor",),
        ("site", "status", "alpha"),
    ],
    ids=" ".join,
)
def test_json_is_one_document_and_text_is_not_json(own, arguments):
    as_json = own.run(*arguments, "--json")
    assert as_json.code == 0, as_json.err
    assert isinstance(as_json.json, dict)
    as_text = own.run(*arguments)
    assert as_text.code == 0
    assert as_text.out.strip()
    assert not as_text.out.lstrip().startswith("{")


def missing(name):
    return f"/nonexistent/{name}"


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code", "said"),
    [
        (("no-such-command",), "command.usage", 2, "no-such-command"),
        (("log", "show", "abc"), "command.usage", 2, "INDEX"),
        (("log", "show", "99999"), "audit.entry_not_found", 1, "99999"),
        (("log", "list", "--limit", "0"), "command.usage", 2, "limit"),
        (("log", "proof", "99999"), "audit.entry_not_found", 1, "99999"),
        (("log", "list", "--url", "ftp://x"), "command.usage", 1, "http"),
        (("log", "list", "--url", "http://127.0.0.1:9"), "command.unreachable", 1, "127.0.0.1:9"),
        (("init", "tests.example/own"), "federation.home", 1, "holds a log already"),
        (("init",), "command.usage", 2, "ORIGIN"),
        (("identity", "new", "olsen"), "clients.identity", 1, "olsen"),
        (("identity", "new", "O'Brien"), "identity.name", 1, "lower-case"),
        (("identity", "new", "x", "--role", "king"), "identity.role", 1, "officer or scientist"),
        (("site", "status", "gamma"), "clients.home", 1, "site add"),
        (("site", "witness", "gamma", "--url", "http://x"), "clients.home", 1, "gamma"),
        (("charter", "check", missing("c.yaml")), "federation.charter_file", 1, "c.yaml"),
        (("charter", "new", "--from", missing("a.csv")), "federation.charter_file", 1, "a.csv"),
        (("models", "show", "other"), "models.not_found", 1, "other"),
        (("models", "card", "other"), "models.not_found", 1, "other"),
        (("models", "approve", "0" * 64, "--officer", missing("k")), "audit.key_file", 1, "/nonexistent/k"),
        (("keys", "create", "--role", "emperor"), "keys.bad_request", 1, "operator"),
        (("keys", "create", "--role", "node", "--expires", "soon"), "keys.bad_request", 1, "expires"),
        (("keys", "revoke", "aaaaaaaaaaaaaaaa"), "keys.not_found", 1, "keys list"),
        (("evidence", "export", "99999"), "audit.entry_not_found", 1, "99999"),
        (("backup", missing("b.tar.gz")), "command.file_missing", 1, "nonexistent"),
        (("restore", missing("b.tar.gz")), "backup.unusable", 1, "holds a log"),
        (("demo", "--engine", "abacus", "--folder", missing("demo")), "command.usage", 1, "inprocess"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_with_a_code(own, run, arguments, code, exit_code, said):
    extra = () if arguments[0] in ("no-such-command", "demo", "charter") else ("--home", own.homes)
    result = run(*arguments, *extra, "--json")
    assert result.code == exit_code, result
    assert result.json["error"]["code"] == code
    assert said in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("noise_multiplier: 1.5", "noise_multiplyer: 1.5"), "noise_multiplyer"),
        (("epsilon: 6", "epsilon: -1"), "epsilon"),
        (("family: logistic_regression", "family: oracle"), "oracle"),
        (("upper: 100}", "upper: TODO}"), "TODO"),
        (("task: binary", "task: binary\ntask: binary"), "task"),
    ],
)
def test_bad_charter_names_line_and_key(own, run, change, said):
    path = own.folder / "charter.yaml"
    path.write_text(path.read_text().replace(*change))
    result = run("charter", "check", path)
    assert result.code == 1
    assert said in result.err
    assert "charter.yaml:" in result.err


def test_charter_whose_plan_does_not_fit_exits_one_and_says_what_would(own, run):
    path = own.folder / "charter.yaml"
    path.write_text(path.read_text().replace("epsilon: 6", "epsilon: 1"))
    result = run("charter", "check", path)
    assert result.code == 1
    assert "noise_multiplier:" in result.out


def test_new_charter_reads_the_header_alone(own, run, tmp_path):
    source = tmp_path / "mine.csv"
    source.write_text("age,weight,outcome\n777777,888888,999999\n")
    result = run("charter", "new", "--from", source, "--out", tmp_path / "c.yaml")
    text = (tmp_path / "c.yaml").read_text()
    assert result.code == 0
    assert "weight" in text
    assert not {"777777", "888888", "999999"} & set(text.replace(",", " ").split())
    assert (
        run("charter", "new", "--from", source, "--out", tmp_path / "c.yaml", "--json").json["error"]["code"]
        == "charter.exists"
    )
    assert run("charter", "check", tmp_path / "c.yaml").code == 1


def test_train_wants_consent_and_the_sites_own_file(own, tmp_path):
    common = [
        "--charter", own.folder / "charter.yaml", "--author", own.homes / "scientists" / "curie", "--json",
    ]  # fmt: skip
    result = own.run("train", *common, "--site", f"alpha={tmp_path}/other.csv", "--site", "beta=b.csv")
    assert result.json["error"]["code"] == "train.other_file"
    result = own.run("train", *common, "--site", "alpha=a.csv")
    assert result.json["error"]["code"] == "train.sites"
    result = own.run("train", *common, "--site", "alpha=a.csv", "--site", "alpha=b.csv")
    assert result.json["error"]["code"] == "train.sites"
    text = (own.folder / "charter.yaml").read_text()
    (own.folder / "charter.yaml").write_text(text.replace("learning_rate: 4", "learning_rate: 3"))
    sites = []
    for name in ("alpha", "beta"):
        path = own.homes / "sites" / name / "site.yaml"
        sites += ["--site", f"{name}={_data_of(path)}"]
    result = own.run("train", *common, *sites)
    assert result.json["error"]["code"] == "train.not_agreed"
    assert "charter sign" in result.err


def _data_of(site_yaml):
    return next(line.split(": ", 1)[1] for line in site_yaml.read_text().splitlines() if "data:" in line)


def test_key_written_to_a_file_is_private_and_never_printed(own, tmp_path):
    result = own.run("keys", "create", "--role", "node", "--out", tmp_path / "key")
    text = (tmp_path / "key").read_text().strip()
    assert text.startswith("affidavit_")
    assert text not in result.out + result.err
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    again = own.run("keys", "create", "--role", "node", "--out", tmp_path / "key")
    assert again.code == 1
    assert (tmp_path / "key").read_text().strip() == text


def test_restore_behind_the_signer_is_refused_with_guidance(own, tmp_path):
    assert own.run("backup", tmp_path / "old.tar.gz").code == 0
    own.approve()
    assert own.run("keys", "create", "--role", "node").code == 0
    from federation.coordinator import Coordinator

    with Coordinator.open(own.homes / "coordinator") as coordinator:
        coordinator.publish()
    (own.homes / "coordinator").rename(own.homes / "broken")
    result = own.run("restore", tmp_path / "old.tar.gz", "--json")
    assert (result.code, result.json["error"]["code"]) == (1, "restore.behind_signer")
    assert "new origin" in result.err
    assert not (own.homes / "coordinator").exists()


def test_doctor_finds_a_log_behind_its_signer_and_an_open_key(own, tmp_path):
    own.run("backup", tmp_path / "b.tar.gz")
    key = own.officer / "identity" / "key.pem"
    key.chmod(0o644)
    result = own.run("doctor", "--json")
    assert result.code == 1
    wrong = {check["name"] for check in result.json["checks"] if not check["ok"] and not check["optional"]}
    assert wrong == {"private keys"}


def test_doctor_looks_at_every_extra(own):
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(declared["project"]["optional-dependencies"]) - {"all", "cli", "dev"}
    checks = own.run("doctor", "--json").json["checks"]
    assert {check["name"] for check in checks if check["name"].startswith("extra ")} == {
        f"extra {name}" for name in extras
    }


def test_fsck_names_an_edited_row(own):
    import sqlite3

    path = own.homes / "coordinator" / "log.db"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE leaf SET actor = 'nobody' WHERE idx = 3")
    connection.close()
    result = own.run("log", "fsck", "--json")
    assert result.code == 1
    assert result.json["error"]["code"] == "fsck.columns"
    assert "3" in result.err


def test_proof_and_evidence_files_are_what_their_formats_say(own, tmp_path):
    assert own.run("log", "proof", "1", "--out", tmp_path / "p").code == 0
    assert TlogProof.parse((tmp_path / "p").read_bytes()).leaf_index == 1
    index = own.run("models", "show", "own", "--json").json["versions"][0]["leaf_index"]
    from federation.coordinator import Coordinator

    with Coordinator.open(own.homes / "coordinator") as coordinator:
        coordinator.publish()
    assert own.run("evidence", "export", index, "--out", tmp_path / "e.zip").code == 0
    assert read_evidence((tmp_path / "e.zip").read_bytes()).scope == "version"


def test_verify_reads_the_exported_evidence(own, run, tmp_path):
    own.approve()
    index = own.run("log", "list", "--type", "version.transition", "--json").json["entries"][-1]["leaf_index"]
    from federation.coordinator import Coordinator

    with Coordinator.open(own.homes / "coordinator") as coordinator:
        coordinator.publish()
    own.run("evidence", "export", index, "--out", tmp_path / "e.zip")
    assert run("verify", tmp_path / "e.zip").code == 3
    policy = own.homes / "sites" / "alpha" / "policy.txt"
    assert run("verify", tmp_path / "e.zip", "--policy", policy, "--json").json["verdict"] == "UNWITNESSED"


def test_answer_file_that_is_none_is_refused(own, tmp_path):
    (tmp_path / "a.json").write_text('{"label": "ill"}')
    result = own.run("evidence", "export", "0", "--answer", tmp_path / "a.json", "--json")
    assert "receipt" in result.err


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_its_exit_codes(run, repository, path):
    result = run(*path, "--help")
    assert str(repository) not in result.out
    assert result.code == 0
    assert "Exit codes" in result.out
    if path not in {("serve",), ("site", "serve-witness")}:
        assert "--json" in result.out


def test_manual_names_every_command_and_none_that_is_not_there():
    named = set()
    for line in affidavit.MANUAL.partition("Begin here")[2].partition("Homes are")[0].splitlines():
        if not re.match(r" {2}\S", line):
            continue
        shown = line[2:] if line[24:26].strip() or len(line) < 26 else line[2:24]
        first, *others = (re.findall(r"[a-z-]+(?= |$)", part) for part in shown.split(" --")[0].split(" | "))
        named |= {tuple(first), *((*first[:-1], *other) for other in others)}
    assert named == {*COMMANDS, ("verify",)}


def test_manual_fits_a_terminal_and_its_columns_stand():
    lines = affidavit.MANUAL.splitlines()
    assert max(map(len, lines)) <= 100
    body = lines[lines.index("Begin here") : -3]
    for line, following in pairwise(body):
        if re.match(r" {2}\S", line):
            in_columns = re.fullmatch(r" {2}(?=\S).{22} {2}\S.*", line)
            assert in_columns or re.match(r" {26}\S", following), line


def test_version_is_printed(run):
    assert run("--version").out.startswith("affidavit ")


@pytest.mark.parametrize("name", ["audit", "federation", "clients", "server"])
def test_shadowing_file_is_named(tmp_path, repository, name):
    shadow = tmp_path / f"{name}.py"
    shadow.write_text("raise SystemExit('the wrong one')\n")
    done = subprocess.run(
        [sys.executable, "-c", "import sys, affidavit; sys.exit(affidavit.main(['status']))"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert str(shadow) in done.stderr
    assert "shadow" in done.stderr


def test_notebook_names_are_lazy_and_misspelt_ones_fail():
    assert affidavit.Charter.__module__ == "federation.charter"
    assert callable(affidavit.describe)
    with pytest.raises(AttributeError, match="simulat_"):
        affidavit.simulat_  # noqa: B018


def test_internal_error_is_one_line_and_the_traceback_is_for_who_asks(monkeypatch, own):
    config = own.homes / "coordinator" / "log.db"
    config.unlink()
    config.mkdir()
    result = own.run("log", "list")
    assert result.code == 1
    assert result.err.startswith("error ")
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("damage", "code"), [("signer", "audit.signer_missing"), ("policies", "access.policy_invalid")]
)
def test_server_that_cannot_answer_does_not_start(own, tmp_path, damage, code):
    policies = tmp_path / "own.cedar"
    policies.write_text('@id("typo") permit (principal, action, resource) when { resource.stat == 1 };')
    options = ["--policies", policies] if damage == "policies" else []
    if damage == "signer":
        (own.homes / "signer").rename(own.homes / "elsewhere")
    result = own.run("serve", "--port", "0", *options, "--json")
    assert (result.code, result.json["error"]["code"]) == (1, code)


def shape(command: Any) -> Any:
    inner = {name: shape(found) for name, found in getattr(command, "commands", {}).items()}
    return command.help, [(p.name, p.opts, p.type.name, p.required) for p in command.params], inner


@pytest.mark.parametrize("word", sorted(typer.main.get_command(affidavit.build_application()).commands))
def test_command_that_is_built_for_one_word_is_the_same_as_among_all(word):
    """In a process of its own, where nothing else was registered before, it builds no other."""
    whole = typer.main.get_command(affidavit.build_application())
    part = affidavit._command(word)
    assert list(part.commands) == [word]
    assert shape(part.commands[word]) == shape(whole.commands[word])


def test_first_words_need_no_package_behind_the_one_that_is_noted(repository):
    """What is registered only with a later package would be missing where a word loads fewer."""
    code = (
        "import sys, affidavit, typer; last = sys.argv[1];"
        "found = affidavit._PACKAGES[: affidavit._PACKAGES.index(last) + 1];"
        "words = [w for w, p in affidavit._LAST_PACKAGE_OF.items() if p == last];"
        "part = typer.main.get_group(affidavit.build_application(found)).commands;"
        "names = lambda c: sorted(getattr(c, 'commands', ()));"
        "before = {w: names(part[w]) for w in words};"
        "whole = typer.main.get_command(affidavit.build_application()).commands;"
        "assert before == {w: names(whole[w]) for w in words}, before"
    )
    for package in sorted(set(affidavit._LAST_PACKAGE_OF.values())):
        subprocess.run([sys.executable, "-c", code, package], cwd=repository, check=True)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["modles", "list"], "'models'"),
        (["verfy", "x.zip"], "'verify'"),
        (["models", "rolback", "toy"], "'rollback'"),
        (["rollback", "toy"], "'models rollback'"),
        (["site", "log", "exprot"], "'export'"),
        (["Models"], "'models'"),
    ],
    ids=" ".join,
)
def test_misspelt_command_is_told_what_was_meant_once(capsys, given, meant):
    assert affidavit.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error command.usage: No such command")
    assert f"Did you mean {meant}" in line
    assert line.count("Did you mean") == 1


@pytest.mark.parametrize("given", [["xyzzy"], ["models", "xyzzy"], ["\N{SNOWMAN}"], [""]], ids=repr)
def test_what_looks_like_no_command_is_not_guessed(capsys, given):
    assert affidavit.main(given) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_guess_is_in_the_document_too(capsys):
    assert affidavit.main(["models", "lst", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["message"] == "No such command 'lst'. Did you mean 'list'?"
