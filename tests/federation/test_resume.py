"""A coordinator that dies at any durable step of a run, and the one that goes on: nothing lost or twice."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import threading
from typing import Any

import pytest

from audit.entries import (
    RoundCompleted,
    RunAccepted,
    RunCompleted,
    RunFailed,
    RunStarted,
    SiteStatement,
    SiteUndelivered,
    decode_entry,
    parse_body,
)
from audit.ledger import Ledger
from audit.principal import AccessDeniedError, Decision
from audit.round_bodies import RoundExamined, RunResumed, UpdateRefused
from audit.service import export_evidence
from audit.verify import verify_evidence
from federation import service
from federation.charter import Charter
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import ResumeError, ResumeLaterError, RunFailedError, RunHeldError
from federation.exchange import Exchange
from federation.grid import InProcessGrid
from federation.resume import RunPast, prepared_run
from federation.run_hold import RunHold, is_held
from federation.runs import find_run
from federation.server_app import carry_out
from tests.federation.conftest import FakeSite

ALL = ("north", "south", "west")
HOLD_S = 0.4


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

    def put_all(self, files: Any) -> Any:
        self._step()
        return self._coordinator.blobs.put_all(files)

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


@pytest.fixture
def strict(federation):
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
    with InProcessGrid(federation.client_app(), {name: {} for name in connected}, fault=fault) as grid:
        exchange = Exchange(grid, poll_s=0.001, discovery_s=0.5)
        carry_out(grid, home, run, exchange=exchange, hold_s=hold_s, principal=principal)
    return home.left


def crash(federation, run, steps=10_000, **options):
    with pytest.raises(CrashError):
        go(federation, run, steps=steps, **options)


def logged(number, *names):
    """The point at which exactly these sites' releases of a round, which is not over, are in the log."""
    return lambda past: past.next_round == number and tuple(past.open_releases()) == names


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


@pytest.fixture(scope="session")
def steps_and_weights(tmp_path_factory, charter_text, keys):
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


@pytest.mark.parametrize("share", range(4))
def test_after_a_crash_at_any_durable_step_the_run_ends_with_the_same_weights(
    strict, steps_and_weights, share
):
    """Each step in turn is the last; a fourth of the steps a test, all in one log, one run after another."""
    charter, steps, weights = steps_and_weights()
    assert steps > 30
    for at in range(share, steps, 4):
        run = prepared(strict, charter)
        try:
            go(strict, run, steps=at)
        except CrashError:
            go(strict, run)
        ended = [body for body in strict.bodies(RunCompleted) if body.run == run]
        assert [body.weights for body in ended] == [weights], f"died before step {at}"
        own = [body for body in strict.bodies(SiteStatement) if body.run == run]
        assert sorted((body.round, body.site) for body in own) == [(r, s) for r in (1, 2) for s in ALL]
        rounds = [body for body in strict.bodies(RoundCompleted) if body.run == run]
        assert [(body.round, body.missing) for body in rounds] == [(1, ()), (2, ())]
    for name, site in strict.sites.items():
        sequences = [body.sequence for body in strict.bodies(SiteStatement) if body.site == name]
        assert sequences == list(range(1, site.sequence + 1))
    report = judged(strict)
    assert (report.step("The odometers").code, report.step("The aggregation").code) == ("ok", "ok")


@pytest.mark.parametrize("name", [name for name in PLANS if name != "fedavg"])
def test_moments_averages_and_robust_rules_come_back_from_the_log(strict, steps_and_weights, name):
    charter, steps, weights = steps_and_weights(*PLANS[name])
    run = prepared(strict, charter)
    for lived in (steps * 2 // 3, 3):  # dies in round 2, and again at once
        crash(strict, run, lived)
    go(strict, run)
    assert strict.bodies(RunCompleted)[0].weights == weights
    assert_whole(strict, run, rounds=2)


def test_a_resumed_run_says_who_resumed_it_and_where_and_the_verifier_says_so(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8, principal="first")
    go(strict, run, principal="dr-lee")
    (resumed,) = strict.bodies(RunResumed)
    assert (resumed.run, resumed.round, resumed.principal) == (run, 2, "dr-lee")
    (first, _) = strict.coordinator.bodies(RoundCompleted)
    assert resumed.previous_round == first[0].leaf_hash.hex()
    assert resumed.base_model == first[1].output_model
    assert (
        "taken up again 1 times, at round 2"
        in assert_whole(strict, run, rounds=2).step("The rounds and their statements").detail
    )


def test_a_run_that_ended_is_not_carried_out_again(strict, steps_and_weights):
    charter, _, weights = steps_and_weights()
    run = prepared(strict, charter)
    go(strict, run)
    size = strict.coordinator.ledger.tree_size
    asked = len(strict.sites["north"].asked)
    go(strict, run)
    assert strict.coordinator.ledger.tree_size == size
    assert strict.sites["north"].asked[asked:] == ["hello", "cosign", "run.finished"]
    assert strict.bodies(RunCompleted)[0].weights == weights


def test_a_run_that_failed_stays_failed_and_its_sites_are_told(strict, charter_text):
    run = prepared(strict, charter_of(charter_text.replace("round_timeout_s: 4", "round_timeout_s: 1")))

    def silence(site, message):
        return None if message.metadata.group_id == "1" and site != "north" else 0.0

    with pytest.raises(RunFailedError, match="not_enough_sites"):
        go(strict, run, fault=silence)
    asked = len(strict.sites["west"].asked)
    with pytest.raises(RunFailedError, match="had ended before"):
        go(strict, run)
    assert "run.finished" in strict.sites["west"].asked[asked:]
    assert len(strict.bodies(RunFailed)) == 1


def test_sites_that_are_not_back_yet_do_not_end_the_run(strict, steps_and_weights):
    charter, steps, weights = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    with pytest.raises(ResumeLaterError, match="not connected") as caught:
        go(strict, run, connected=("north",))
    assert caught.value.code == "federation.resume_later"
    assert not strict.bodies(RunFailed)
    assert not strict.bodies(RunResumed)
    go(strict, run)
    assert strict.bodies(RunCompleted)[0].weights == weights


def test_a_release_in_the_log_counts_though_its_site_is_gone(strict, steps_and_weights):
    """Dies when two of three statements of round 2 are logged; one of those two never comes back."""
    charter, _, weights = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, until=logged(2, "north", "south"))
    go(strict, run, connected=("south", "west"))
    ended = [body for body in strict.bodies(RunCompleted) if body.run == run]
    assert ended[0].weights == weights
    rounds = [body for body in strict.bodies(RoundCompleted) if body.run == run]
    assert [body.missing for body in rounds] == [(), ()]


def test_who_did_not_accept_in_time_does_not_join_a_round_that_may_have_been_asked(strict, steps_and_weights):
    """The round's question names its participants; another set of names would be another question."""
    charter, _, _ = steps_and_weights()
    go(strict, prepared(strict, charter))  # so that all have signed
    run = prepared(strict, charter)

    crash(strict, run, until=lambda past: past.participants(2), connected=("north", "south"))
    assert not RunPast.read(strict.coordinator.ledger, run).statements
    go(strict, run, connected=ALL)
    ours = [body for body in strict.bodies(SiteStatement) if body.run == run]
    assert {body.participants for body in ours} == {("north", "south")}


def test_a_release_written_off_in_another_run_stays_out_and_stays_debited(strict, steps_and_weights):
    """The first run dies with a release that no entry holds; the next run's start has it reported."""
    charter, _, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, until=logged(2, "north", "south"))
    go(strict, prepared(strict, charter))
    assert find_run(strict.coordinator.ledger, run).undelivered == {"west": 1}
    go(strict, run)
    last = [body for body in strict.bodies(RoundCompleted) if body.run == run][-1]
    assert last.missing == ("west",)
    assert judged(strict).step("The odometers").code == "ok"
    assert judged(strict).step("The rounds and their statements").code == "ok"


def test_an_update_refused_for_its_length_is_refused_again(strict, charter_text):
    charter = charter_of(charter_text, extra="aggregation: {rule: median}\n")
    strict.sites["west"].values = lambda dimension: [1 << 40] * dimension
    run = prepared(strict, charter)
    crash(strict, run, until=lambda past: past.refused and not past.rounds)
    go(strict, run)
    assert len([body for body in strict.bodies(UpdateRefused) if body.run == run]) == 1
    assert [b.missing for b in strict.bodies(RoundCompleted) if b.run == run] == [("west",), ()]
    assert [b.round for b in strict.bodies(RoundExamined) if b.run == run] == [1, 2]
    assert judged(strict).step("The aggregation").code == "ok"


# what cannot go on


def test_two_coordinators_resume_and_exactly_one_goes_on(strict, steps_and_weights):
    charter, steps, weights = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    with Coordinator.open(strict.coordinator.home, strict.coordinator.signer_home) as other:
        pair = [strict, dataclasses.replace(strict, coordinator=other)]
        outcomes: list[Any] = []
        together = threading.Barrier(2)

        def resume(federation):
            together.wait()
            try:
                outcomes.append(go(federation, run, hold_s=4))  # a busy machine starves no holder
            except RunHeldError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=resume, args=(federation,)) for federation in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    refused = [outcome for outcome in outcomes if isinstance(outcome, RunHeldError)]
    assert len(outcomes) == 2
    assert len(refused) <= 1  # the second may come when the first is done: it finds the run complete
    assert len(strict.bodies(RunResumed)) == 1
    assert strict.bodies(RunCompleted)[0].weights == weights
    assert_whole(strict, run, rounds=2)


def test_a_living_holder_is_not_disturbed(strict):
    run = prepared(strict)
    with RunHold(strict.coordinator.ledger, run, ttl_s=HOLD_S):
        assert is_held(strict.coordinator.ledger, run)
        with pytest.raises(RunHeldError, match="another process carries it out") as caught:
            go(strict, run)
        assert caught.value.code == "federation.run_held"
    assert not is_held(strict.coordinator.ledger, run)
    go(strict, run)


def test_a_holder_that_slept_is_told_that_another_went_on(strict):
    run = prepared(strict)
    asleep = RunHold(strict.coordinator.ledger, run, ttl_s=HOLD_S)
    asleep._take()  # and no thread prolongs it, as in a process that does not run
    with (
        RunHold(strict.coordinator.ledger, run, ttl_s=HOLD_S),
        pytest.raises(RunHeldError, match="took it over"),
    ):
        asleep.check()


def test_a_missing_or_altered_update_is_named(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    update = strict.bodies(SiteStatement)[0].update
    path = strict.coordinator.blobs.folder / update[:2] / update
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ResumeError, match=r"update of round 1 cannot be read.*restore"):
        go(strict, run)
    path.unlink()
    with pytest.raises(ResumeError, match="no file with digest"):
        go(strict, run)
    assert not strict.bodies(RunResumed)
    path.write_bytes(kept)
    go(strict, run)


def test_a_log_whose_round_came_out_otherwise_is_not_gone_on_with(strict, steps_and_weights):
    charter, _, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, until=logged(1, *ALL))
    past = RunPast.read(strict.coordinator.ledger, run)
    statements = past.open_releases()
    lie = RoundCompleted(
        run=run, round=1, base_model=past.started.initial_model,
        statements=tuple(release.leaf_hash for release in statements.values()),
        missing=(), output_model="ab" * 32, metrics=(),
    )  # fmt: skip
    strict.coordinator.append(lie, "coordinator", stable_event_id("round.completed", run, "1"))
    with pytest.raises(ResumeError, match="round 1 gives other weights than the log says"):
        go(strict, run)


def test_a_run_prepared_otherwise_than_it_was_started_is_refused(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    kept = strict.coordinator.kept_run(run)
    kept["run_started"]["initial_model"] = "ab" * 32
    strict.coordinator.keep_run(run, kept)
    assert prepared_run(strict.coordinator, run).started == strict.bodies(RunStarted)[0]
    go(strict, run)


@pytest.mark.parametrize("field", ["round", "previous_round", "base_model", "charter"])
def test_a_resume_that_goes_on_from_something_else_fails_the_verifier(strict, steps_and_weights, field):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    past = RunPast.read(strict.coordinator.ledger, run)
    honest = RunResumed(
        run=run, charter=charter.digest, round=2, previous_round=past.last_leaf_hash,
        base_model=past.rounds[0].completed.output_model, principal="mallory",
    )  # fmt: skip
    forged = dataclasses.replace(honest, **{field: 1 if field == "round" else "cd" * 32})
    strict.coordinator.append(forged, "coordinator")
    go(strict, run)
    step = judged(strict).step("The rounds and their statements")
    assert (step.word, step.code) == ("FAIL", "run.resumed")
    assert field in step.detail


def test_a_round_told_twice_fails_the_verifier_and_is_not_resumed(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    past = RunPast.read(strict.coordinator.ledger, run)
    second = dataclasses.replace(past.rounds[0].completed, output_model="ef" * 32)
    before = strict.coordinator.append(second, "coordinator")  # a second history of round 1
    with pytest.raises(ResumeError, match="two stories"):
        go(strict, run)
    with pytest.raises(ResumeError, match="two stories"):
        go(strict, run)
    assert strict.coordinator.ledger.tree_size == before.leaf_index + 1


def test_the_log_takes_no_second_end_of_a_round(strict, steps_and_weights):
    """What two coordinators would write about one round has one event id, and the first one stands."""
    from audit.errors import EventIdConflictError

    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    first = strict.bodies(RoundCompleted)[0]
    other = dataclasses.replace(first, output_model="ef" * 32)
    with pytest.raises(EventIdConflictError):
        strict.coordinator.append(other, "coordinator", stable_event_id("round.completed", run, "1"))


def test_runs_say_that_they_can_be_resumed_and_what_it_takes(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    view = find_run(strict.coordinator.ledger, run[:10])
    assert (view.state, view.resumable, view.resumed) == ("running", True, 0)
    assert view.needs.startswith("round 2: at least 2 of the sites north, south, west")
    assert f"affidavit runs resume {run[:12]}" in view.needs
    with RunHold(strict.coordinator.ledger, run, ttl_s=HOLD_S):
        assert not find_run(strict.coordinator.ledger, run).resumable
    go(strict, run)
    view = find_run(strict.coordinator.ledger, run)
    assert (view.state, view.resumable, view.resumed, view.needs) == ("completed", False, 1, "")


def test_resuming_asks_the_authoriser_and_registers_once(strict, steps_and_weights):
    charter, steps, weights = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)

    class Nobody:
        def decide(self, *_):
            return Decision(allowed=False, policies=("nobody",), policy_set="0" * 64)

    def launch(config):
        strict.serve({**config, "hold-s": HOLD_S})

    request = service.ResumeRequest(run=run)
    arguments = (strict.coordinator, strict.principal)
    with pytest.raises(AccessDeniedError):
        service.resume(*arguments, Nobody(), request, launch)
    trained = service.resume(*arguments, strict.owner, request, launch)
    assert trained.weights == weights
    first = service.register(*arguments, strict.owner, service.RegisterRequest(run=run))
    assert service.register(*arguments, strict.owner, service.RegisterRequest(run=run)) == first


def test_no_entry_is_lost_or_written_twice(strict, steps_and_weights):
    charter, steps, _ = steps_and_weights()
    run = prepared(strict, charter)
    crash(strict, run, steps - 8)
    ledger: Ledger = strict.coordinator.ledger
    before = list(ledger.entries(0, ledger.tree_size))
    go(strict, run)
    after = list(ledger.entries(0, ledger.tree_size))
    assert after[: len(before)] == before
    kinds = [type(decode_entry(leaf).body) for leaf in after]
    assert kinds.count(RunAccepted) == 3
    assert kinds.count(SiteUndelivered) == 0
    assert isinstance(decode_entry(after[-1]).body, RunCompleted)
