"""The demo: everything that a federation does, on this machine, in about a minute.

Nothing is staged: homes, keys, charter, training through Flower's own objects, log, witnesses, approval,
the API in a process of its own, and the verifier in another one with an empty environment. `run_demo` only
calls what the commands call; what happens is told to a `Screen` (`clients.demo_screen`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from audit.console import CommandError, ask_api, call_api
from audit.principal import LocalOwner, Principal
from clients.demo_data import LABEL, demo_charter, write_demo_files
from clients.demo_screen import Screen
from clients.demo_steps import PURPOSE, first_row, make_folder, verdict_of, verify_alone
from clients.home import SiteHome
from clients.identity import Identity
from clients.service import AddSiteRequest, add_site, approve_charter, witness_once
from clients.simulation import Engine, run_federation
from federation.accounting import plan_report
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.progress import RunEvent
from federation.registry import LIVE
from federation.service import ApproveRequest, RegisterRequest, approve, register
from federation.trust import federation_policy

ORIGIN: Final = "demo.invalid/four-hospitals"
WRONG_PURPOSE: Final = "insurance-pricing"
_LIFETIME: Final = ("10", "0.00001")
_START_S: Final = 60.0


@dataclass(slots=True)
class Outcome:
    """What the demo found, for --json and for the tests."""

    folder: str
    rounds: int = 0
    epsilon: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    version: str = ""
    answer: dict[str, Any] = field(default_factory=dict)
    refused_by: list[str] = field(default_factory=list)
    verdict: str = ""
    verdict_altered: str = ""
    seconds: float = 0.0


def run_demo(folder: Path, screen: Screen, *, engine: Engine = "inprocess", rounds: int = 30) -> Outcome:
    """Run the whole chain in `folder`, which is made anew.

    Raises:
        CommandError: the folder holds something else, or a part did not do what it must.
    """
    begun = time.monotonic()
    make_folder(folder)
    homes_folder, outcome = folder / "homes", Outcome(folder=str(folder))

    screen.step("Four hospitals, each with its own patients")
    files = write_demo_files(folder / "data")
    officer = Identity.create(homes_folder / "officers" / "olsen")
    scientist = Identity.create(homes_folder / "scientists" / "curie")
    sites = {
        name: add_site(
            AddSiteRequest(
                home=homes_folder / "sites" / name,
                name=name,
                data=path,
                population=f"patients of {name}",
                lifetime_epsilon=_LIFETIME[0],
                lifetime_delta=_LIFETIME[1],
            )
        )
        for name, path in files.sites.items()
    }
    screen.hospitals(files.sites, LABEL)

    screen.step("The charter: what is agreed before any training, and what it will cost")
    text = demo_charter(
        public=files.public,
        identities={name: home.keys().identity.text for name, home in sites.items()},
        officers={"olsen": officer.public},
        rounds=rounds,
    )
    (folder / "charter.yaml").write_text(text, encoding="utf-8")
    charter = Charter.load(folder / "charter.yaml")
    screen.text(plan_report(charter))
    for name, home in sites.items():
        sites[name] = approve_charter(home, charter.canonical().decode())
    screen.note(f"each hospital read it and signs it with its own key: {', '.join(sites)}")

    screen.step("Training through Flower: rows stay, noised sums leave, every release is a signed entry")
    with Coordinator.create(homes_folder / "coordinator", homes_folder / "signer", ORIGIN) as coordinator:
        _write_policy(folder, coordinator, sites)
        events: list[RunEvent] = []

        def watch(event: RunEvent) -> None:
            events.append(event)
            screen.event(event)

        with screen.training(rounds):
            run = run_federation(
                charter, sites, coordinator, scientist.key,
                public_set=files.public, engine=engine, on_event=watch,
            )  # fmt: skip
        outcome.rounds = max((event.round for event in events if event.kind == "round"), default=0)
        _plot(events, charter, folder / "learning.png", screen)

        screen.step("Gates, then an officer's own signature")
        owner = LocalOwner()
        author = Principal(id="curie", role="scientist", key=scientist.public)
        version = register(coordinator, author, owner, RegisterRequest(run=run.run))
        screen.gates(version.registered)
        outcome.epsilon = max(float(site.run_epsilon) for site in version.registered.costs)
        outcome.metrics = {gate.metric: float(gate.value) for gate in version.registered.gates}
        approver = Principal(id="olsen", role="officer", key=officer.public)
        request = ApproveRequest(version=version.digest, to_state=LIVE, reason="gates passed, charter read")
        approve(coordinator, approver, owner, request, officer.key)
        outcome.version = version.digest
        screen.note(f"version {version.digest[:12]} is live, signed by olsen {officer.public[:20]}…")

    _serve_and_verify(folder, charter, sites, files.public, screen, outcome)
    outcome.seconds = round(time.monotonic() - begun, 1)
    screen.end(folder, outcome.seconds)
    return outcome


def _serve_and_verify(
    folder: Path,
    charter: Charter,
    sites: Mapping[str, SiteHome],
    public: Path,
    screen: Screen,
    outcome: Outcome,
) -> None:
    homes = folder / "homes"
    key = _affidavit("keys", "create", "--role", "consumer", "--home", str(homes), "--json")["key"]
    screen.step("The API answers, and says which policy let it")
    with _api(homes) as url:
        predict = f"/v1/models/{charter.name}/predict"
        row = first_row(public, charter)
        body = {"purpose": PURPOSE, "rows": [row]}
        screen.note(f"POST {url}{predict}  purpose {PURPOSE}, {len(row)} measurements of one patient")
        answer = json.loads(ask_api(url, predict, key=key, method="POST", body=body))
        (folder / "answer.json").write_text(json.dumps(answer, indent=2), encoding="utf-8")
        outcome.answer = answer["answers"][0]
        screen.answer(answer)

        status, data, _ = call_api(
            url, predict, key=key, method="POST", body={**body, "purpose": WRONG_PURPOSE}
        )
        refusal = json.loads(data)
        if status != 403:
            raise CommandError(f"the API answered {status} to a wrong purpose", code="demo.failed")
        outcome.refused_by = refusal["policies"]
        screen.refusal(WRONG_PURPOSE, refusal)

        screen.step("The hospitals check that the log only grew, and cosign it over HTTP")
        _await_checkpoint(url, refusal["entry"]["leaf_index"])
        for name, home in sites.items():
            screen.note(f"{name} cosigned the log of {witness_once(home, url)} entries")

        screen.step("An evidence file, verified offline by a process that knows nothing else")
        index = answer["entry"]["leaf_index"]
        evidence = ask_api(url, f"/v1/audit/evidence/{index}", key=key)
    from audit.service import add_answer

    evidence = add_answer(evidence, receipt=answer["receipt"], opened=answer["opened"])
    (folder / "evidence.zip").write_bytes(evidence)
    report = verify_alone(folder / "evidence.zip", folder / "policy.txt")
    (folder / "report.txt").write_text(report.stdout, encoding="utf-8")
    screen.text(report.stdout)
    outcome.verdict = verdict_of(report.stdout)
    if report.returncode != 0:
        raise CommandError(f"the honest file is {outcome.verdict}: {report.stderr}", code="demo.failed")

    screen.step("One bit of the evidence is flipped")
    altered = bytearray(evidence)
    altered[len(altered) // 2] ^= 1
    (folder / "evidence-altered.zip").write_bytes(bytes(altered))
    caught = verify_alone(folder / "evidence-altered.zip", folder / "policy.txt")
    if caught.returncode == 0:
        raise CommandError("the altered file was not caught", code="demo.failed")
    outcome.verdict_altered = verdict_of(caught.stdout)
    screen.caught(caught.stdout or caught.stderr, caught.returncode)


def _write_policy(folder: Path, coordinator: Coordinator, sites: Mapping[str, SiteHome]) -> None:
    """Write the policy that the verifier is given: not from the evidence, but from those who met."""
    witnesses = {name: home.keys().witness_signer(name).vkey for name, home in sites.items()}
    policy = federation_policy(coordinator.log_key, witnesses)
    (folder / "policy.txt").write_text(policy.format(), encoding="utf-8")


def _plot(events: list[RunEvent], charter: Charter, path: Path, screen: Screen) -> None:
    from federation.plots import save_history

    save_history(events, path, budget=float(charter.privacy.epsilon), title=charter.name)
    screen.note(f"AUC and epsilon by round: {path}")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "affidavit", *arguments]


def _affidavit(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise CommandError(f"affidavit {arguments[0]}: {done.stderr.strip()}", code="demo.failed")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@contextmanager
def _api(homes: Path) -> Iterator[str]:
    """Run `affidavit serve` on a free loopback port; yield its address."""
    environment = {**os.environ, "AFFIDAVIT_PUBLISH_INTERVAL_S": "0.5"}
    with (homes / "api.log").open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            _command("serve", "--port", "0", "--json", "--home", str(homes)),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            assert process.stdout is not None  # noqa: S101 - a pipe was asked for
            url = _listening(process, process.stdout, homes / "api.log")
            _await_health(url)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _listening(process: subprocess.Popen[str], stream: IO[str], log: Path) -> str:
    line = stream.readline()
    if not line:
        process.wait(timeout=10)
        tail = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise CommandError(f"the API did not start: {' '.join(tail)}", code="demo.failed")
    return str(json.loads(line)["url"])


def _await_health(url: str) -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            if call_api(url, "/healthz", key="")[0] == 200:
                return
        except CommandError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def _await_checkpoint(url: str, leaf_index: int) -> None:
    from audit.checkpoints import parse_checkpoint_note

    until = time.monotonic() + _START_S
    while parse_checkpoint_note(ask_api(url, "/v1/audit/checkpoint", key="")).tree_size <= leaf_index:
        if time.monotonic() > until:
            raise CommandError("the API signed no checkpoint", code="demo.failed")
        time.sleep(0.1)
