"""A coordinator that dies at a chosen write, and sites that answer a round once."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest

from audit.entries import (
    RoundCompleted,
    RunCompleted,
    SiteStatement,
    parse_body,
)
from audit.service import export_evidence
from audit.verify import verify_evidence
from federation import service
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.exchange import Exchange
from federation.grid import InProcessGrid
from federation.resume import RunPast
from federation.server_app import carry_out
from tests.federation.conftest import FakeSite

ALL = ("north", "south", "west")
HOLD_S = 5.0


class CrashError(BaseException):
    """The coordinator's end; nothing in the product catches it."""


class StrictSite(FakeSite):
    """Answers a round once; the same question again gets the same bytes, another one a refusal."""

    def round(self, request: Any, blobs: Any) -> Any:
        asked = [request["participants"], hashlib.sha256(blobs["base_model"]).hexdigest()]
        for name in ("previous_round", "own_statement"):
            shown = request[name]
            asked.append(None if shown is None else base64.b64decode(shown["entry"]))
        questions = self.__dict__.setdefault("questions", {})
        key = (request["run"], request["round"])
        if questions.setdefault(key, asked) != asked:
            refusal = self.refusal(request["run"], request["charter"], request["round"], "already_released")
            return refusal, {}
        return super().round(request, blobs)

    def answer(self, kind: str, request: Any, blobs: Any) -> Any:
        """Report every release of other runs, as an agent does that never saw one of them in the log."""
        if kind == "run.propose":
            run = request["run_started"]["run"]
            told = [answer["statement"] for (of, _), (answer, _) in self.answered.items() if of != run]
            self.undelivered = [parse_body(SiteStatement, document) for document in told]
        return super().answer(kind, request, blobs)


class Dying:
    """A coordinator's home that ends before its n-th write (an entry, a file, a cosigned checkpoint), or
    before the first one after the log has come to where `until` says.
    """

    def __init__(self, coordinator: Coordinator, steps: int, until: Any = None) -> None:
        self._coordinator, self.left, self._until = coordinator, steps, until
        self.blobs = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coordinator, name)

    def _step(self) -> None:
        if self.left == 0 or (self._until is not None and self._until()):
            raise CrashError
        self.left -= 1

    def append(self, *arguments: Any) -> Any:
        self._step()
        return self._coordinator.append(*arguments)

    def append_all(self, entries: Any) -> Any:
        """They share commits, and the last of them may be lost: a step for each."""
        return [self.append(*entry) for entry in entries]

    def put_all(self, files: Any, digests: Any = None) -> Any:
        self._step()
        return self._coordinator.blobs.put_all(files, digests)

    def cosign_round(self, collect: Any) -> Any:
        self._step()
        return self._coordinator.cosign_round(collect)

    def put(self, data: bytes) -> str:
        self._step()
        return self._coordinator.blobs.put(data)

    def get(self, digest: str) -> bytes:
        return self._coordinator.blobs.get(digest)

    def find(self, digest: str) -> bytes | None:
        return self._coordinator.blobs.find(digest)


def make_strict(federation):
    """Give the federation sites that answer once, each with values of its own."""
    federation.sites = {
        name: StrictSite(name, identity=site.identity) for name, site in federation.sites.items()
    }
    for index, site in enumerate(federation.sites.values()):
        site.values = lambda dimension, k=index: [(k + 1) * (i - 3) << 17 for i in range(dimension)]
    return federation


def prepared(federation, charter=None):
    request = service.TrainRequest(charter=charter or federation.charter)
    return service.start_run(
        federation.coordinator, federation.principal, federation.owner, request, federation.author
    )


def go(
    federation, run, *, steps=10_000, until=None, connected=ALL, fault=None, principal="dr-who", hold_s=HOLD_S
):
    """Carry the run out, or go on with it, for so many durable steps; return how many were left."""
    ledger = federation.coordinator.ledger
    here = None if until is None else lambda: until(RunPast.read(ledger, run))
    home = Dying(federation.coordinator, steps, here)
    nodes, waited = {name: {} for name in connected}, federation.waited
    with InProcessGrid(federation.client_app(), nodes, fault=fault, workers=0) as grid:
        exchange = Exchange(grid, poll_s=0.01, discovery_s=5.0, monotonic=waited, sleep=waited.forward)
        carry_out(grid, home, run, exchange=exchange, hold_s=hold_s, principal=principal)
    return home.left


def crash(federation, run, steps=10_000, **options):
    with pytest.raises(CrashError):
        go(federation, run, steps=steps, **options)


def logged(number, *names):
    """The point at which exactly these sites' releases of a round, which is not over, are in the log."""
    return lambda past: past.next_round == number and tuple(past.release_of(past.next_round)) == names


def judged(federation):
    log = federation.coordinator
    sites = federation.sites.values()
    lines = [f"log {log.log_key}", *[f"witness {site.name} {site.cosigner().vkey}" for site in sites]]
    policy = "\n".join([*lines, f"group sites 2 {' '.join(ALL)}", "quorum sites", ""])
    index = max(stored.leaf_index for stored, _ in log.bodies(RunCompleted))
    data = export_evidence(log.ledger, log.blobs.find, leaf_index=index)
    return verify_evidence(data, policy_text=policy, replay=True)


def assert_whole(federation, run, *, rounds):
    """One debit a release, gap-free odometers, every round rebuilt by a stranger."""
    statements = federation.bodies(SiteStatement)
    for name, site in federation.sites.items():
        own = [body for body in statements if body.site == name]
        assert [body.sequence for body in own] == list(range(1, site.sequence + 1))
        assert len({(body.run, body.round) for body in own}) == len(own)
    assert [body.round for body in federation.bodies(RoundCompleted)] == list(range(1, rounds + 1))
    assert len(federation.bodies(RunCompleted)) == 1
    report = judged(federation)
    for title in ("The training run", "The rounds and their statements", "The aggregation", "The odometers"):
        assert report.step(title).code == "ok", report.step(title)
    return report


def charter_of(charter_text, *, rounds=2, plan="", extra=""):
    text = charter_text.replace("rounds: 3", f"rounds: {rounds}")
    text = text.replace(", minimum_sites: 2", plan if "minimum" in plan else f", minimum_sites: 2{plan}")
    return Charter.parse(text + extra)


def measured(tmp_path_factory, charter_text, keys):
    """Return (charter, durable steps of an undisturbed run, digest of its weights), each found once."""
    from tests.federation.conftest import make_federation

    found: dict[tuple[str, str], tuple[Charter, int, str]] = {}

    def of(plan: str = "", extra: str = "") -> tuple[Charter, int, str]:
        if (plan, extra) not in found:
            charter = charter_of(charter_text, plan=plan, extra=extra)
            made = make_federation(tmp_path_factory.mktemp("whole"), charter_text, keys)
            for index, site in enumerate(made.sites.values()):
                site.values = lambda dimension, k=index: [(k + 1) * (i - 3) << 17 for i in range(dimension)]
            left = go(made, prepared(made, charter))
            (completed,) = made.bodies(RunCompleted)
            made.coordinator.close()
            found[plan, extra] = (charter, 10_000 - left, completed.weights)
        return found[plan, extra]

    return of


PLANS = {
    "fedavg": ("", ""),
    "fedadam, last two averaged": (", strategy: fedadam, average_last: 2", ""),
    "fedyogi": (", strategy: fedyogi", ""),
    "median, bounded": (", minimum_sites: 3", "aggregation: {rule: median, byzantine: 1}\n"),
}
