"""The network demo: four hospitals on machines of their own join a coordinator, train, and prove it.

Everything is done by the commands that people would type, each at its own machine: TLS, authentication,
invitations, agents behind sockets, Flower's real SuperLink and SuperNodes. At the end a stranger's process
verifies the evidence, and every statement of every round is traced to the key of a site that joined.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from audit.console import CommandError, ask_api
from audit.epsilon import epsilon_text
from clients.demo_commands import Call, Started, call_all, last_line, preload, start
from clients.demo_data import demo_charter, write_demo_files
from clients.demo_namespaces import Machines, machines
from clients.demo_screen import Screen
from clients.demo_steps import PURPOSE, first_row, make_folder, verdict_of, verify_alone
from federation.charter import Charter

ORIGIN: Final = "demo.invalid/network"
PORTS: Final = {"--port": 28443, "--superlink-port": 28444, "--api-port": 28445}
START_S: Final = 120.0
ROUNDS: Final = 4
SECURE: Final = (
    "\nsecure_aggregation: {tolerated: 1}   # updates are masked: the coordinator reads sums alone\n"
)


@dataclass(slots=True)
class NetworkOutcome:
    """What the demo found, for --json and for tests."""

    folder: str
    separate_machines: bool = False
    rounds: int = 0
    epsilon: str = ""
    version: str = ""
    statements: int = 0  # of rounds, each traced to the statement key of a site that joined
    verdict: str = ""
    seconds: float = 0.0
    cpu_s: float = 0.0  # of this process and all that it waited for
    timings: dict[str, float] = field(default_factory=dict)


class _Demo:
    def __init__(self, folder: Path, screen: Screen, place: Machines, rounds: int) -> None:
        self.folder, self.screen, self.place, self.rounds = folder, screen, place, rounds
        self.central = folder / "coordinator"
        self.files = write_demo_files(folder / "data")
        self.sites = tuple(sorted(self.files.sites))

    def home(self, site: str) -> Path:
        return self.folder / "hospitals" / site

    def at_centre(self, *arguments: str) -> dict[str, Any]:
        return self.call_centre(*arguments).result()

    def call_centre(self, *arguments: str) -> Call:
        return Call([*arguments, "--home", str(self.central), "--json"], lambda: None)

    def call_site(self, site: str, *arguments: str) -> Call:
        return Call([*arguments, "--home", str(self.home(site)), "--json"], lambda: self.place.enter(site))

    @contextmanager
    def up(self, log: Path, *arguments: str, site: str = "") -> Iterator[Started]:
        """Run a command that stays up for the time of the block; its output goes to `log`."""
        with log.open("wb") as output:
            started = start([*arguments, "--json"], lambda: self.place.enter(site), output, output)
        try:
            yield started
        finally:
            started.stop()


def run_network_demo(
    folder: Path, screen: Screen, *, rounds: int = ROUNDS, namespaces: bool = True
) -> NetworkOutcome:
    """Run the whole chain in `folder`, which is made anew.

    Raises:
        CommandError: the folder holds something else, or a part did not do what it must.
    """
    begun = time.monotonic()
    make_folder(folder)
    outcome = NetworkOutcome(folder=str(folder), rounds=rounds)
    with ExitStack() as stack:
        names = [path.stem for path in write_demo_files(folder / "data").sites.values()]
        place = stack.enter_context(machines(sorted(names), namespaces=namespaces))
        demo = _Demo(folder, screen, place, rounds)
        outcome.separate_machines = place.separate
        lap = time.monotonic()

        def took(step: str) -> None:
            nonlocal lap
            outcome.timings[step], lap = round(time.monotonic() - lap, 1), time.monotonic()

        preload()
        took("imports")
        _coordinator(demo, stack)
        took("coordinator up")
        joining = _join_all(demo, stack)
        took("four sites joined")
        charter = _agree(demo)
        took("charter signed")
        for site in demo.sites:
            _await_ready(demo.folder / f"{site}.log", {"supernode", "agent", "watch"}, joining[site])
        took("agents up")
        run = _train(demo)
        outcome.version, outcome.epsilon = run["version"], run["epsilon"]
        took("trained")
        _prove(demo, charter, outcome)
        took("proved")
    outcome.seconds = round(time.monotonic() - begun, 1)
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    outcome.cpu_s = round(sum(usage.ru_utime + usage.ru_stime for usage in spent), 1)
    return outcome


def _coordinator(demo: _Demo, stack: ExitStack) -> None:
    where = "in network namespaces of their own" if demo.place.separate else "as processes on loopback"
    demo.screen.step(f"A coordinator: log, CA, SuperLink behind a gateway (machines {where})")
    ports = [text for name, port in PORTS.items() for text in (name, str(port))]
    made = demo.at_centre("coordinator", "init", ORIGIN, "--host", demo.place.host, *ports)
    demo.screen.note(f"gateway {made['address']}, CA {made['ca_fingerprint'][:16]}…")
    log = demo.folder / "coordinator.log"
    started = stack.enter_context(demo.up(log, "coordinator", "up", "--home", str(demo.central)))
    _await_ready(log, {"gateway"}, started)


def _join_all(demo: _Demo, stack: ExitStack) -> dict[str, Started]:
    demo.screen.step("Each hospital is invited, makes its keys, asks to join; the operator approves")
    joining = {}
    for site in demo.sites:
        invited = demo.at_centre("site", "invite", site)
        command = demo.up(
            demo.folder / f"{site}.log",
            *("site", "join", invited["invitation"], "--data", str(demo.files.sites[site])),
            *("--population", f"patients of {site}", "--lifetime-epsilon", "10"),
            *("--home", str(demo.home(site))),
            site=site,
        )
        joining[site] = stack.enter_context(command)
    until = time.monotonic() + START_S
    waiting = set(demo.sites)
    while waiting:
        listed = demo.at_centre("site", "list")["sites"]
        for item in listed:
            if item["state"] == "requested" and item["site"] in waiting:
                demo.at_centre("site", "approve", item["site"])
                demo.screen.note(f"{item['site']} approved: identity {item['identity_key'][:24]}…")
                waiting.discard(item["site"])
        if time.monotonic() > until:
            raise CommandError(f"{', '.join(sorted(waiting))} did not ask to join", code="demo.failed")
        time.sleep(0.2)
    return joining


def _agree(demo: _Demo) -> Charter:
    demo.screen.step("The charter names the identities that joined; each hospital reads and signs it")
    people = call_all(
        {
            "olsen": demo.call_centre("identity", "new", "olsen"),
            "curie": demo.call_centre("identity", "new", "curie", "--role", "scientist"),
            "sites": demo.call_centre("site", "list"),
        }
    )
    text = demo_charter(
        public=demo.files.public,
        identities={item["site"]: item["identity_key"] for item in people["sites"]["sites"]},
        officers={"olsen": people["olsen"]["key"]},
        rounds=demo.rounds,
    ).replace("round_timeout_s: 20", "round_timeout_s: 120")
    text += SECURE
    path = demo.folder / "charter.yaml"
    path.write_text(text, encoding="utf-8")
    # each site by itself: what it waits for is its own people, not the other sites
    call_all(
        {
            site: demo.call_site(site, "site", "bundle", "approve", "own", "--site", site)
            for site in demo.sites
        }
    )
    signed = call_all(
        {site: demo.call_site(site, "charter", "sign", str(path), "--site", site) for site in demo.sites}
    )
    for site in demo.sites:
        demo.screen.note(f"{site} agrees: epsilon {epsilon_text(signed[site]['epsilon'], 3)} of 10 for life")
    return Charter.load(path)


def _train(demo: _Demo) -> dict[str, Any]:
    demo.screen.step("Training over the network: a signed release a site a round, witnessed before the next")
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as events, (demo.folder / "run.log").open("wb") as errors:
        with os.fdopen(writing, "wb") as output:
            started = start(
                [
                    *("runs", "start", str(demo.folder / "charter.yaml")),
                    *("--author", str(demo.central / "scientists" / "curie")),
                    *("--public-set", str(demo.files.public), "--home", str(demo.central), "--json"),
                ],
                lambda: None,
                output,
                errors,
            )
        last: dict[str, Any] = {}
        try:
            for line in events:
                last = json.loads(line)
                if last.get("kind") == "round":
                    demo.screen.note(
                        f"round {last['round']:>2}: {len(last['sites'])} sites, "
                        f"auc {last['metrics']['auc']:.3f}, epsilon {epsilon_text(last['epsilon'], 3)}, "
                        f"{last['witnesses']} witnesses, {last['elapsed_s']:.0f} s"
                    )
            code = started.wait(START_S)
        finally:
            started.stop()
    if code != 0 or "version" not in last:
        said = last_line(demo.folder / "run.log")
        raise CommandError(
            f"the run failed: {said}; see {demo.central}/coordinator/network/logs", code="demo.failed"
        )
    demo.screen.note(f"run {last['run']}, epsilon {last['epsilon']}, gates passed: {last['gates_passed']}")
    return last


def _prove(demo: _Demo, charter: Charter, outcome: NetworkOutcome) -> None:
    demo.screen.step("An officer approves, the API answers, the hospitals witness, a stranger verifies")
    officer = ("--officer", str(demo.central / "officers" / "olsen"))
    demo.at_centre("models", "approve", outcome.version, "--live", "--reason", "gates passed", *officer)
    key = demo.at_centre("keys", "create", "--role", "consumer")["key"]
    url = f"http://127.0.0.1:{PORTS['--api-port']}"
    body = {"purpose": PURPOSE, "rows": [first_row(demo.files.public, charter)]}
    answer = json.loads(ask_api(url, f"/v1/models/{charter.name}/predict", key=key, method="POST", body=body))
    index = answer["entry"]["leaf_index"]
    _await_witnesses(url, index, need=3)
    from audit.service import add_answer

    evidence = ask_api(url, f"/v1/audit/evidence/{index}", key=key)
    file = demo.folder / "evidence.zip"
    file.write_bytes(add_answer(evidence, receipt=answer["receipt"], opened=answer["opened"]))
    policy = demo.folder / "policy.txt"
    policy.write_bytes((demo.home(demo.sites[0]) / "sites" / demo.sites[0] / "policy.txt").read_bytes())
    report = verify_alone(file, policy)
    (demo.folder / "report.txt").write_text(report.stdout, encoding="utf-8")
    outcome.verdict = verdict_of(report.stdout)
    demo.screen.text(report.stdout)
    if report.returncode != 0:
        raise CommandError(f"the honest file is {outcome.verdict}: {report.stderr}", code="demo.failed")
    outcome.statements = trace_statements(demo.central / "coordinator")
    demo.screen.note(f"{outcome.statements} statements of the rounds, each by the key of a site that joined")


def trace_statements(home: Path) -> int:
    """Trace every statement that a round counts to a site that was invited, asked and was approved.

    Raises:
        CommandError: one was not signed by the key that such a site's identity had delegated by then.
        StatementError: an enrolment under such an identity is not signed by it.
    """
    from audit.entries import RoundCompleted, SiteEnrolled, SiteStatement, body_document, decode_entry
    from audit.ledger import Ledger
    from audit.location import log_location
    from federation.errors import StatementError
    from federation.network.roster import Roster
    from federation.statements import verify_enrolment, verify_signature

    with Ledger.open(log_location(home)) as ledger:
        origin = ledger.origin
        joined = {member.identity_key for member in Roster(ledger).refresh().approved()}
        rows = [
            (ledger.stored_entry(index).leaf_hash, decode_entry(ledger.entry(index)).body)
            for index in range(ledger.tree_size)
        ]
    keys: dict[str, str] = {}
    said: dict[str, tuple[SiteStatement, str]] = {}
    for leaf, body in rows:
        if isinstance(body, SiteEnrolled) and body.identity_key in joined:
            proved = verify_enrolment(body.site, body.identity_key, origin, body_document(body))
            keys[body.site] = proved.statement_key
        elif isinstance(body, SiteStatement):
            said[leaf.hex()] = body, keys.get(body.site, "")
    count = 0
    for _, body in rows:
        for named in body.leaves if isinstance(body, RoundCompleted) else ():
            statement, key = said[named]
            try:
                verify_signature(statement.site, statement, key)
            except StatementError as error:
                raise CommandError(f"round {statement.round}: {error}", code="demo.failed") from error
            count += 1
    return count


def _await_witnesses(url: str, index: int, *, need: int) -> None:
    from audit.checkpoints import parse_checkpoint_note
    from audit.notes import parse_note

    until = time.monotonic() + START_S
    while True:
        note = ask_api(url, "/v1/audit/checkpoint", key="")
        if parse_checkpoint_note(note).tree_size > index and len(parse_note(note).signatures) > need:
            return
        if time.monotonic() > until:
            raise CommandError("the hospitals cosigned no checkpoint with the answer", code="demo.failed")
        time.sleep(0.3)


def _await_ready(log: Path, names: set[str], process: Started) -> None:
    until = time.monotonic() + START_S
    while True:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        events = [json.loads(line) for line in lines]
        if names <= {event["name"] for event in events if event.get("kind") == "ready"}:
            return
        if process.poll() is not None or time.monotonic() > until:
            raise CommandError(f"{log.name}: not ready: {last_line(log)}", code="demo.failed")
        time.sleep(0.1)
