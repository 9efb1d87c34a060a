"""A site's own log beside the federation's: what only one has, or tells otherwise, is found and named."""

from __future__ import annotations

import dataclasses
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from audit.entries import (
    CharterSigned,
    RunAccepted,
    SiteRefused,
    SiteStatement,
    columns_of,
    decode_entry,
    encode_entry,
    new_entry,
    parse_body,
)
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.log_file import LogFile
from audit.verify.report import Verdict, Word
from audit.verify.stories import (
    ACCEPTANCES,
    ANCHORS,
    CHARTERS,
    FEDERATION_LOG,
    IDENTITY,
    REFUSALS,
    SITE_LOG,
    STATEMENTS,
    compare_stories,
)
from clients.site_log import SiteLog

SWAPPED = "UPDATE leaf SET body = (SELECT body FROM leaf WHERE idx = 2) WHERE idx = 3"
TIME = "2026-11-24T12:00:00Z"


@pytest.fixture(scope="module")
def told(tmp_path_factory, make_network, request_of):
    """Both logs of an honest first round, as files, and the keys of site alpha."""
    folder = tmp_path_factory.mktemp("stories")
    network = make_network(folder)
    alpha, coordinator = network.agents["alpha"], network.coordinator
    for name, agent in network.agents.items():
        answer, _ = request_of(agent, "charter.sign", network.to_sign())
        coordinator.append(parse_body(CharterSigned, answer["signature"]), f"site:{name}")
        request_of(agent, "hello", {})
    for name, answer in network.propose().items():
        coordinator.append(parse_body(RunAccepted, answer["acceptance"]), f"site:{name}")
    network.play(1)
    network.checkpoint()
    site = folder / "alpha.db"
    alpha.log.export(site)
    statement = alpha.ledger.releases(alpha.population)[0].statement
    unlogged, _ = network.ask("alpha", 2)
    later = folder / "alpha-later.db"
    alpha.log.export(later)
    refused, _ = network.ask("alpha", 1, participants=["alpha", "beta"])
    refusing = folder / "alpha-refusing.db"
    alpha.log.export(refusing)
    federation = folder / "federation.db"
    place = coordinator.ledger.location.path
    with closing(sqlite3.connect(place)) as source, closing(sqlite3.connect(federation)) as copy:
        source.backup(copy)
    yield Told(
        folder=folder,
        federation=federation,
        site=site,
        later=later,
        refusing=refusing,
        policy=alpha.home.policy().format(),
        keys=alpha.home.keys(),
        statement=statement,
        second=parse_body(SiteStatement, unlogged["statement"]),
        refusal=parse_body(SiteRefused, refused["refusal"]),
    )
    network.close()


@dataclasses.dataclass
class Told:
    folder: object
    federation: object
    site: object
    later: object
    refusing: object
    policy: str
    keys: object
    statement: SiteStatement
    second: SiteStatement
    refusal: SiteRefused

    def federation_with(self, tmp_path, *bodies):
        """The federation's log with more entries after its cosigned checkpoint."""
        return with_entries(self.federation, tmp_path / "federation.db", bodies)


def with_entries(log, target, bodies):
    shutil.copy(log, target)
    with Ledger.open(target) as ledger:
        for body in bodies:
            data = encode_entry(new_entry(body, actor="coordinator", time=TIME))
            event_id = new_entry(body, actor="x", time=TIME).event_id
            ledger.append_wait(data, event_id=event_id, index_columns=columns_of(data))
    return target


def compare(told, federation=None, site=None, policy=True):
    return compare_stories(
        federation or told.federation, site or told.site, policy_text=told.policy if policy else None
    )


def test_one_story_told_twice_is_valid(told):
    report = compare(told)
    assert report.verdict is Verdict.VALID, report.text()
    assert {step.word for step in report.steps} == {Word.PROVED}
    assert report.step(STATEMENTS).detail.startswith("1,")


def test_without_a_policy_nothing_says_whose_logs_these_are(told):
    assert compare(told, policy=False).verdict is Verdict.SELF_CONSISTENT_ONLY


def test_a_statement_that_was_never_logged_is_named(told):
    report = compare(told, site=told.later)
    step = report.step(STATEMENTS)
    assert (step.word, step.code) == (Word.NO_EVIDENCE, "story.unlogged_statement")
    assert "run run-1 round 2 (release 2)" in step.detail
    assert report.verdict is Verdict.INCOMPLETE


def test_a_statement_that_was_altered_on_its_way_into_the_log_is_named(told, tmp_path):
    altered = dataclasses.replace(told.second, update="0" * 64)
    report = compare(told, told.federation_with(tmp_path, altered), told.later)
    step = report.step(STATEMENTS)
    assert (step.word, step.code) == (Word.FAIL, "story.statement_differs")
    assert "round 2" in step.detail
    assert "not the site's own" in step.detail


def test_a_site_that_signed_two_statements_for_one_release_is_named_as_the_liar(told, tmp_path):
    other = told.keys.signed(dataclasses.replace(told.second, update="0" * 64, signature=""))
    step = compare(told, told.federation_with(tmp_path, other), told.later).step(STATEMENTS)
    assert (step.word, step.code) == (Word.FAIL, "story.statement_differs")
    assert "the site's own key signed both" in step.detail


def test_a_release_that_the_sites_log_lacks_is_named(told, tmp_path):
    """The site put an old copy of its log back, or its key is used elsewhere."""
    step = compare(told, told.federation_with(tmp_path, told.second)).step(STATEMENTS)
    assert (step.word, step.code) == (Word.FAIL, "story.statement_unknown")
    assert "though the site's key signed it" in step.detail


def test_a_release_that_nobody_signed_is_named(told, tmp_path):
    forged = dataclasses.replace(told.second, signature=told.statement.signature)
    step = compare(told, told.federation_with(tmp_path, forged)).step(STATEMENTS)
    assert (step.word, step.code) == (Word.FAIL, "story.statement_unknown")
    assert "did not sign" in step.detail


def test_a_refusal_that_was_hushed_up_is_named(told, tmp_path):
    federation = told.federation_with(tmp_path, told.second)
    report = compare(told, federation, told.refusing)
    step = report.step(REFUSALS)
    assert (step.word, step.code) == (Word.NO_EVIDENCE, "story.unlogged_refusal")
    assert "run run-1 round 1: already_released" in step.detail


def test_a_refusal_that_was_made_up_is_named(told, tmp_path):
    invented = dataclasses.replace(told.refusal, reason="budget_exhausted")
    step = compare(told, told.federation_with(tmp_path, invented)).step(REFUSALS)
    assert (step.word, step.code) == (Word.FAIL, "story.refusal_signature")


def test_a_charter_signed_for_a_second_author_is_named(told, tmp_path):
    with Ledger.open(told.federation) as ledger:
        digest = told.statement.charter
        assert ledger.count(type="charter.signed") == 3
    second = told.keys.signed(
        CharterSigned(digest=digest, author=SigningKey.generate().text, site="alpha", signature="")
    )
    step = compare(told, told.federation_with(tmp_path, second)).step(CHARTERS)
    assert (step.word, step.code) == (Word.FAIL, "story.charter_differs")


def test_an_acceptance_of_a_run_the_site_knows_nothing_of_is_named(told, tmp_path):
    with Ledger.open(told.federation) as ledger:
        stored = [decode_entry(row.body).body for row in ledger.search(type="run.accepted", site="alpha")]
    accepted = dataclasses.replace(stored[0], run="run-x")
    step = compare(told, told.federation_with(tmp_path, accepted)).step(ACCEPTANCES)
    assert (step.word, step.code) == (Word.FAIL, "story.acceptance_unknown")


def test_another_identity_under_the_sites_name_is_named(told, tmp_path):
    from clients.identity import SiteKeys

    impostor = SiteKeys.create(tmp_path / "keys").enrolment(
        "alpha", told.statement.population, "log.example/small"
    )
    step = compare(told, told.federation_with(tmp_path, impostor)).step(IDENTITY)
    assert (step.word, step.code) == (Word.FAIL, "story.other_identity")


def rewritten(path, target, change):
    shutil.copy(path, target)
    with closing(sqlite3.connect(target)) as connection:
        connection.execute(change)
        connection.commit()
    return target


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("DELETE FROM leaf WHERE idx = 3", "log.unreadable"),
        ("DELETE FROM leaf WHERE idx >= 3", "story.site_rewritten"),
        (
            "UPDATE leaf SET body = (SELECT body FROM leaf WHERE idx = 2) WHERE idx = 3",
            "story.site_rewritten",
        ),
        ("UPDATE leaf SET body = x'00' WHERE idx = 1", "log.unreadable"),
        ("DELETE FROM checkpoint", "story.site_unsigned"),
        ("DROP TABLE leaf", "log.unreadable"),
        ("UPDATE head SET origin = 'site.beta'", "story.no_site_log"),
    ],
)
def test_a_sites_log_that_was_tampered_with_is_not_compared(told, tmp_path, change, code):
    report = compare(told, site=rewritten(told.site, tmp_path / "site.db", change))
    assert report.step(SITE_LOG).code == code
    assert report.verdict is Verdict.INVALID


def test_a_federation_log_that_is_not_what_was_signed_fails(told, tmp_path):
    report = compare(told, rewritten(told.federation, tmp_path / "f.db", SWAPPED))
    assert report.step(FEDERATION_LOG).code == "log.root"


def test_the_federations_log_is_no_sites_log(told):
    assert compare(told, site=told.federation).step(SITE_LOG).code == "story.no_site_log"


def test_files_that_are_nothing_give_a_report(told, tmp_path):
    junk = tmp_path / "junk.db"
    junk.write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    for report in (compare(told, junk), compare(told, site=junk)):
        assert report.verdict is Verdict.INVALID
    junk.write_bytes(b"PK" + b"\x00" * 100)
    assert compare(told, junk).step(FEDERATION_LOG).code == "story.evidence"


def test_comparing_needs_the_standard_library_and_cryptography_alone(told, repository):
    code = (
        "import sys; from audit.verify.cli import main; status = main(sys.argv[1:]);"
        "assert not {'sqlalchemy', 'sqlmodel', 'numpy', 'torch', 'pydantic'} & set(sys.modules);"
        "sys.exit(status)"
    )
    policy = told.folder / "policy.txt"
    policy.write_text(told.policy)
    done = subprocess.run(
        [sys.executable, "-c", code, str(told.federation), "--policy", str(policy), "--site", str(told.site)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "VALID" in done.stdout


def test_an_export_is_one_new_file(told):
    from clients.errors import HomeError

    log = SiteLog.open(told.folder / "sites" / "alpha", "alpha")
    with pytest.raises(HomeError, match="is there already"):
        log.export(told.site)
    log.release()
    assert not told.site.with_name("alpha.db-wal").exists()


# a site that tells its own story anew


def written_anew(told, folder, change):
    """The site's whole log again, under its own keys, as `change` makes of each body; None leaves it out."""
    folder.mkdir()
    log = SiteLog.create(folder, "alpha", told.statement.population, told.keys)
    for item in list(LogFile(told.site).entries())[2:]:
        body = change(item.entry.body)
        if body is not None:
            log.append(body)
    log.export(folder / "export.db")
    log.close()
    return folder / "export.db"


def test_a_site_that_writes_its_log_anew_after_it_was_anchored_is_found(told, tmp_path):
    """Everything in it is signed and agrees with the federation's log; but it is not what there was."""
    site = written_anew(told, tmp_path / "alpha", lambda body: body)
    report = compare(told, site=site)
    assert {step.word for step in report.steps[:-1]} == {Word.PROVED}, report.text()
    step = report.step(ANCHORS)
    assert (step.word, step.code) == (Word.FAIL, "story.site_rewritten")
    assert "on which the site accepted run run-1" in step.detail
    assert report.verdict is Verdict.INVALID


def test_what_came_before_an_anchor_is_not_left_out(told, tmp_path):
    def without_what_was_not_shared(body):
        return body if isinstance(body, (CharterSigned, RunAccepted, SiteStatement)) else None

    site = written_anew(told, tmp_path / "alpha", without_what_was_not_shared)
    assert compare(told, site=site).step(ANCHORS).word is Word.FAIL


def test_a_log_that_ends_before_its_anchor_is_named(told, tmp_path):
    site = written_anew(told, tmp_path / "alpha", lambda body: None)
    step = compare(told, site=site).step(ANCHORS)
    assert (step.word, step.code) == (Word.FAIL, "story.site_truncated")


def test_an_anchor_that_the_site_did_not_sign_binds_nobody(told, tmp_path):
    with Ledger.open(told.federation) as ledger:
        (row,) = ledger.search(type="run.accepted", site="alpha")
    accepted = decode_entry(row.body).body
    assert accepted.site_log_size > 2
    forged = dataclasses.replace(accepted, run="run-x", site_log_root="ab" * 32)
    report = compare(told, told.federation_with(tmp_path, forged))
    assert report.step(ACCEPTANCES).code == "story.acceptance_unknown"  # it was made up, and that is said
    assert report.step(ANCHORS).word is Word.PROVED


def test_a_site_that_signed_an_anchor_to_another_log_is_found(told, tmp_path):
    with Ledger.open(told.federation) as ledger:
        (row,) = ledger.search(type="run.accepted", site="alpha")
    accepted = decode_entry(row.body).body
    forged = told.keys.signed(dataclasses.replace(accepted, run="run-x", site_log_root="ab" * 32))
    step = compare(told, told.federation_with(tmp_path, forged)).step(ANCHORS)
    assert (step.word, step.code) == (Word.FAIL, "story.site_rewritten")


def test_without_any_anchor_nothing_is_said_of_the_sites_log(told, tmp_path):
    """As sites of an older release accepted."""

    def bare(body):
        if not isinstance(body, RunAccepted):
            return body
        return told.keys.signed(dataclasses.replace(body, site_log_size=0, site_log_root=""))

    with Ledger.open(told.federation) as ledger:
        bodies = [decode_entry(row.body).body for row in ledger.search(limit=1000)]
    target = tmp_path / "federation.db"
    mine = [bare(body) if getattr(body, "site", "") == "alpha" else body for body in bodies]
    Ledger.create(target, "log.example/small").close()
    for body in mine:
        with_more(target, body)
    site = written_anew(told, tmp_path / "alpha", bare)
    step = compare(told, target, site=site).step(ANCHORS)
    assert (step.word, step.code) == (Word.NO_EVIDENCE, "story.not_anchored")


def with_more(target, body):
    with Ledger.open(target) as ledger:
        entry = new_entry(body, actor="coordinator", time=TIME)
        data = encode_entry(entry)
        ledger.append_wait(data, event_id=entry.event_id, index_columns=columns_of(data))
