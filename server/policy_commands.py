"""Commands about rules and decisions: `policy show | check | test | apply`, `review show | record`.

With --url they ask a running server; else they work on the coordinator's home. An officer's own key signs
changes and reviews on the officer's machine, and never leaves it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.console import CommandError, ask_api, base_home, emit, guarded, read_key, table

if TYPE_CHECKING:
    from audit.keys import SigningKey
    from audit.principal import Principal
    from federation.coordinator import Coordinator
    from server.dry_run import DryRun
    from server.journal import Journal
    from server.rules import RulesInForce

policy = typer.Typer(name="policy", help="The rules that decide, and their changes.", no_args_is_help=True)
review = typer.Typer(name="review", help="Decisions that a person must review.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Url = Annotated[str | None, typer.Option("--url", help="Ask the server at this address instead.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", help="File with an officer's API key [AFFIDAVIT_API_KEY].")
]
Officer = Annotated[
    Path,
    typer.Option("--officer", help="Your identity: its home, or its key.pem. It never leaves this machine."),
]
RulesFile = Annotated[Path, typer.Argument(help="A Cedar file; its tests are beside it, in NAME.tests.yaml.")]
Reason = Annotated[str, typer.Option(help="Why; it goes into the log, so it must name nobody.")]


def register(application: typer.Typer) -> None:
    """Add these commands to the front door."""
    application.add_typer(policy)
    application.add_typer(review)


@policy.command("show")
@guarded
def show(
    tests: Annotated[
        bool,
        typer.Option("--tests", help="Print the tests of this release's own rules instead, to start from."),
    ] = False,
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the rules in force to the byte; who put them there goes to the console, not into the file.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """
    if tests:
        text = files("server").joinpath("policies", "access.tests.yaml").read_text(encoding="utf-8")
        emit({"tests": text}, text.removesuffix("\n"), as_json=as_json)
        return
    document = _rules_in_force(home, url, key_file)
    change = document["change"]
    who = "the server's own, as it was started" if change is None else f"entry {change['leaf_index']}"
    if not as_json:
        typer.echo(f"{document['policy_set']}: {who}", err=True)
    emit(document, document["text"].removesuffix("\n"), as_json=as_json)


@policy.command("check")
@guarded
def check(
    file: RulesFile,
    last: Annotated[
        int, typer.Option(min=0, max=100_000, help="Ask the last N decisions of the log again; 0: none.")
    ] = 1_000,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Check that rules hold together, run their tests, and show which of the last decisions they would
    change.

    Exit codes: 0 they hold together (whatever they would change), 1 they do not, or a test fails, 2 wrong
    usage.
    """
    from server.access import authorizer_of, locked_out
    from server.policy_tests import read_cases, run_cases, tests_beside

    authorizer = authorizer_of(file)
    beside = tests_beside(file)
    report = run_cases(authorizer, read_cases(beside)) if beside.exists() else None
    found = _dry_run(home, authorizer, last) if last and _has_log(home) else None
    document: dict[str, Any] = {
        "policy_set": authorizer.policy_set,
        "policies": sorted(authorizer.names),
        "locked_out": locked_out(authorizer),
        "tests": None if report is None else asdict(report),
        "dry_run": None if found is None else {**asdict(found), "reversed": found.reversed},
    }
    lines = [f"{file}: {len(authorizer.names)} policies hold together ({authorizer.policy_set[:16]}…)"]
    if document["locked_out"]:
        lines.append(
            f"warning: an officer may not do {' and '.join(document['locked_out'])} under these; apply wants "
            "--lock-out, and only `policy apply --home` puts others in force afterwards"
        )
    lines.append(_tests_line(report) if report else f"no tests: {beside} is not there")
    lines += _dry_run_lines(found) if found is not None else ["no dry run"]
    emit(document, lines, as_json=as_json)
    if report is not None and report.failed:
        raise typer.Exit(1)


@policy.command("test")
@guarded
def run_tests(file: RulesFile, as_json: AsJson = False) -> None:
    """Run the tests beside the rules.

    Exit codes: 0 all pass, 1 one fails, or a file is not in order, 2 wrong usage.
    """
    from server.access import authorizer_of
    from server.policy_tests import read_cases, run_cases, tests_beside

    report = run_cases(authorizer_of(file), read_cases(tests_beside(file)))
    emit(asdict(report), _tests_line(report), as_json=as_json)
    if report.failed:
        raise typer.Exit(1)


@policy.command("apply")
@guarded
def apply(
    file: RulesFile,
    officer: Officer,
    reason: Reason = "",
    untested: Annotated[bool, typer.Option("--untested", help="Apply rules that have no tests.")] = False,
    lock_out: Annotated[
        bool,
        typer.Option("--lock-out", help="Apply rules under which no officer may read or change the rules."),
    ] = False,
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign rules with your own key and put them in force. You must be an officer of every charter in use.

    The entry holds the whole text. Rules whose tests fail are not signed; every worker follows within
    seconds.

    Exit codes: 0 done, 1 they do not hold together, a test fails, you may not, or failed, 2 wrong usage.
    """
    from federation.commands import read_identity
    from server.access import authorizer_of
    from server.policy_service import apply_change, check_lock_out, signed_change
    from server.policy_tests import read_cases, run_cases, tests_beside

    authorizer = authorizer_of(file)
    text, beside = authorizer.text, tests_beside(file)
    if not lock_out:
        check_lock_out(authorizer)
    if beside.exists() or not untested:
        report = run_cases(authorizer, read_cases(beside))
        if report.failed:
            raise CommandError(_tests_line(report), code="access.policy_tests")
    key = read_identity(officer)
    if url:
        previous = _rules_in_force(home, url, key_file)["previous_change"]
        body = asdict(signed_change(text.policies, previous, key, reason))
        if lock_out:
            body["lock_out"] = True
        answer = ask_api(url, "/v1/policy", key=read_key(None, key_file), method="POST", body=body)
        document: dict[str, Any] = json.loads(answer)
    else:
        from audit.entries import ZERO_DIGEST
        from audit.principal import LocalOwner

        with _parts(home) as parts:
            parts.rules.refresh()
            before = parts.rules.change
            previous = ZERO_DIGEST if before is None else before.leaf_hash
            body_now = signed_change(text.policies, previous, key, reason)
            change = apply_change(
                parts.rules, parts.journal, _person(key), LocalOwner(), body_now, lock_out=lock_out
            )
        document = {
            "policy_set": change.body.policy_set,
            "entry": {"leaf_index": change.leaf_index, "leaf_hash": change.leaf_hash},
        }
    index = document["entry"]["leaf_index"]
    emit(document, f"rules {document['policy_set'][:16]}… are in force by entry {index}", as_json=as_json)


@review.command("show")
@guarded
def show_review(
    decision: Annotated[str, typer.Argument(help="The answer's `review.id`.")],
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a decision is final.

    Exit codes: 0 done (look at what it says), 1 there is no such decision, refused or failed, 2 wrong usage.
    """
    document = _shown_review(decision, home, url, key_file)
    word = "final" if document["final"] else "not final: a person must review it"
    if document["review"] is not None:
        word = f"{document['review']['outcome']} by entry {document['review']['leaf_index']}"
    emit(document, f"decision {decision} of {document['model']}: {word}", as_json=as_json)


@review.command("record")
@guarded
def record(
    decision: Annotated[str, typer.Argument(help="The answer's `review.id`.")],
    outcome: Annotated[str, typer.Option(help="confirmed or overturned.")],
    officer: Officer,
    reason: Reason = "",
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign your word on a decision with your own key. It is the last: a second one is refused.

    Exit codes: 0 done, 1 there is nothing to review, you may not, or failed, 2 wrong usage.
    """
    from audit.entries import signing_payload
    from audit.principal import LocalOwner, Principal
    from audit.serving_bodies import PredictionReviewed
    from federation.commands import read_identity
    from server.review_service import record_review

    key = read_identity(officer)
    found = _shown_review(decision, home, url, key_file)
    who = found.get("reviewer", {"principal": _person(key).id, "role": "officer"})
    person = Principal(id=who["principal"], role=who["role"], key=key.text)
    body = PredictionReviewed(
        decision=decision, prediction=found["entry"]["leaf_hash"], model=found["model"],
        version=found["version"], outcome=outcome, reason=reason, principal=person.id, role=person.role,
        officer=key.text, signature="",
    )  # fmt: skip
    body = replace(body, signature=base64.b64encode(key.sign(*signing_payload(body))).decode())
    told = {"outcome": outcome, "reason": reason, "officer": body.officer, "signature": body.signature}
    if url:
        path = f"/v1/reviews/{decision}"
        document = json.loads(ask_api(url, path, key=read_key(None, key_file), method="POST", body=told))
    else:
        from server.live import LiveModels

        with _parts(home) as parts:
            ledger = parts.coordinator.ledger
            done = record_review(
                ledger, parts.journal, LiveModels(ledger), person, LocalOwner(), decision, **told
            )
            document = done.to_json()
    emit(document, f"decision {decision} is {outcome}", as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Parts:
    coordinator: Coordinator
    journal: Journal
    rules: RulesInForce


@contextmanager
def _parts(home: Path | None) -> Iterator[_Parts]:
    from federation.coordinator import Coordinator
    from server.journal import Journal, utc_now
    from server.monitoring import Monitoring
    from server.rules import RulesInForce

    with Coordinator.open(base_home(home) / "coordinator") as coordinator:
        ledger = coordinator.ledger
        yield _Parts(coordinator, Journal(ledger, utc_now, Monitoring(), timeout_s=30), RulesInForce(ledger))


def _has_log(home: Path | None) -> bool:
    from audit.location import log_location

    place = log_location(base_home(home) / "coordinator")
    return place.path is None or place.path.is_file()


def _dry_run(home: Path | None, authorizer: Any, last: int) -> DryRun:
    from audit.vault_home import open_vault
    from server.access import CedarAuthorizer, read_policies, shipped_policies, with_shipped_schema
    from server.dry_run import dry_run
    from server.journal import utc_now
    from server.keys import KeyStore
    from server.settings import load_settings

    folder = base_home(home) / "coordinator"
    with _parts(home) as parts, closing(KeyStore(folder, utc_now)) as keys:
        parts.rules.refresh()
        own = load_settings(base=home).settings.policies
        text = read_policies(own) if own is not None else shipped_policies()
        if parts.rules.change is not None:
            text = with_shipped_schema(parts.rules.change.body.text)
        with open_vault(folder, parts.coordinator.origin) as vault:
            return dry_run(
                parts.coordinator.ledger, keys, vault, authorizer, CedarAuthorizer(text), last=last
            )


def _rules_in_force(home: Path | None, url: str | None, key_file: Path | None) -> dict[str, Any]:
    if url:
        found: dict[str, Any] = json.loads(ask_api(url, "/v1/policy", key=read_key(None, key_file)))
        return found
    from audit.principal import LocalOwner, Principal
    from server.access import read_policies, shipped_policies
    from server.policy_service import rules_document
    from server.settings import load_settings

    own = load_settings(base=home).settings.policies
    first = read_policies(own) if own is not None else shipped_policies()
    with _parts(home) as parts:
        return rules_document(parts.rules, Principal(id="owner", role="operator"), LocalOwner(), first)


def _shown_review(decision: str, home: Path | None, url: str | None, key_file: Path | None) -> dict[str, Any]:
    if url:
        answer = ask_api(url, f"/v1/reviews/{decision}", key=read_key(None, key_file))
        document: dict[str, Any] = json.loads(answer)
        return document
    from audit.principal import LocalOwner, Principal
    from server.live import LiveModels
    from server.review_service import read_review

    owner = Principal(id="owner", role="operator")
    with _parts(home) as parts:
        ledger = parts.coordinator.ledger
        return read_review(ledger, LiveModels(ledger), owner, LocalOwner(), decision).to_json()


def _person(key: SigningKey) -> Principal:
    from audit.principal import Principal

    return Principal(id=key.verify_key.fingerprint, role="officer", key=key.text)


def _tests_line(report: Any) -> str:
    lines = [f"{report.cases} tests, {len(report.failed)} failed"]
    lines += [f"  {case.name}: expected {case.expected}, found {case.found}" for case in report.failed]
    if report.untested:
        lines.append(f"  no test decides by: {', '.join(report.untested)}")
    return "\n".join(lines)


def _dry_run_lines(found: DryRun) -> list[str]:
    told = f"of {found.asked} logged decisions {len(found.changed)} would differ, {found.reversed} of them "
    told += f"the other way round; {found.same} stay, {found.inexact} could not be rebuilt exactly, "
    lines = [f"{told}{found.skipped} not at all"]
    if found.changed:
        columns = ("entry", "time", "role", "action", "model", "was", "would be")
        rows = [
            [row.leaf_index, row.time, row.role, row.action, row.model, row.before, row.after]
            for row in found.changed[:100]
        ]
        lines.append(table("", columns, rows))
        if len(found.changed) > len(rows):
            lines.append(f"and {len(found.changed) - len(rows)} more; --json has all")
    return lines
