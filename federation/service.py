"""Use cases of the federation: start and carry out a run, register, approve, roll back.

Each takes the principal, a typed request and an authoriser, asks before it does anything, and writes
entries. Routes, commands and notebooks only call these. Private keys are arguments: they belong to people,
never to this process.
"""

from __future__ import annotations

import base64
import dataclasses
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audit.charter_view import read_charter
from audit.cost_bodies import pack_costs
from audit.entries import (
    RunCompleted,
    RunStarted,
    VersionRegistered,
    VersionTransition,
    body_document,
    signing_payload,
)
from audit.keys import SigningKey
from audit.principal import Authorizer, Principal, Question, require
from federation import registry
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import (
    GateNotPassedError,
    OfficerError,
    RunFailedError,
    TransitionError,
)
from federation.progress import Listener, listening
from federation.registry import APPROVED, CANARY, CANDIDATE, LIVE, RETIRED, SHADOW, Version

if TYPE_CHECKING:
    from federation.charter import Charter
    from federation.evaluation import PublicData

# What a roll-back does without is imported where it is used: it must not wait for numpy, Flower or pydantic.

RunConfig = Mapping[str, str]
Launch = Callable[[RunConfig], None]
"""Runs the ServerApp with this run config over some grid, and returns when it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """Train one model under one charter. `model` is the registry's name for it, by default the charter's."""

    charter: Charter
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest:
    """Go on with a run whose coordinator died."""

    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterRequest:
    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ApproveRequest:
    """Move a version to `to_state`: approved, or live (which retires the one that was)."""

    version: str
    to_state: str = APPROVED
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """Try an approved version beside the live one; `to_state` approved ends the trial."""

    version: str
    to_state: str  # canary (answers a share), shadow (is asked, and answers nobody), approved
    share: int = 0  # of a canary: percent of the requests, 1 to 99
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackRequest:
    """Make an earlier live version live again; without `version`, the one before the present one."""

    model: str
    version: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """A completed run in the log."""

    run: str
    charter: str
    model: str
    weights: str


def start_run(
    coordinator: Coordinator,
    principal: Principal,
    authorizer: Authorizer,
    request: TrainRequest,
    author: SigningKey,
) -> str:
    """Prepare a run, signed by its author; return its id. `train` does this and carries it out.

    Raises:
        AccessDeniedError: the authoriser said no.
        PlanDoesNotFitError: the plan costs more than the charter's epsilon; nothing was spent.
    """
    from federation.accounting import check_fits
    from federation.code_digest import aggregation_code
    from federation.flat import initial_vector, model_pieces

    charter, model = request.charter, request.model or request.charter.name
    require(authorizer, principal, Question(action="runs.start", resource=model))
    check_fits(charter)
    run = secrets.token_hex(16)
    weights = initial_vector(charter.layers, charter.digest)
    initial = coordinator.blobs.put_stream(model_pieces(charter.layers, weights))
    body = RunStarted(
        run=run,
        charter=charter.digest,
        model=model,
        author=author.text,
        sites=charter.site_names,
        rounds=charter.plan.rounds,
        initial_model=initial,
        code=aggregation_code(),
        signature="",
    )
    body = dataclasses.replace(body, signature=_sign(author, body))
    coordinator.keep_run(
        run,
        {
            "charter": charter.canonical().decode(),
            "charter_author": author.text,
            "run_started": body_document(body),
        },
    )
    return run


def train(
    coordinator: Coordinator,
    principal: Principal,
    authorizer: Authorizer,
    request: TrainRequest,
    author: SigningKey,
    launch: Launch,
    *,
    on_event: Listener | None = None,
) -> TrainedRun:
    """Start a run and carry it out through `launch`, which executes `federation.server_app.app` on a grid.

    Raises:
        AccessDeniedError: the authoriser said no.
        PlanDoesNotFitError: the plan costs more than the charter's epsilon; nothing was spent.
        RunFailedError: the run stopped; the log says why.
    """
    run = start_run(coordinator, principal, authorizer, request, author)
    with listening(run, on_event):
        launch(run_config(coordinator, run, principal))
    return trained_run(coordinator, run)


def resume(
    coordinator: Coordinator,
    principal: Principal,
    authorizer: Authorizer,
    request: ResumeRequest,
    launch: Launch,
    *,
    on_event: Listener | None = None,
) -> TrainedRun:
    """Go on with a run that was begun, from its last completed round; of a run that ended, tell the sites.

    Raises:
        AccessDeniedError: the authoriser said no.
        HomeError: no such run was prepared in this home.
        RunHeldError: another process carries it out.
        ResumeError: it cannot go on; `ResumeLaterError`: not with the sites that are there now.
        RunFailedError: the run stopped; the log says why.
    """
    from federation.resume import prepared_run

    prepared = prepared_run(coordinator, request.run)
    require(authorizer, principal, Question(action="runs.start", resource=prepared.started.model))
    with listening(request.run, on_event):
        launch(run_config(coordinator, request.run, principal))
    return trained_run(coordinator, request.run)


def run_config(coordinator: Coordinator, run: str, principal: Principal) -> RunConfig:
    """Return what the ServerApp is told: where the log is, which run, and who asked for it."""
    return {
        "home": str(coordinator.home.absolute()),
        "signer-home": str(coordinator.signer_home.absolute()),
        "run": run,
        "principal": principal.id,
    }


def trained_run(coordinator: Coordinator, run: str) -> TrainedRun:
    """Return a completed run; RunFailedError when the log shows no completion."""
    completed = [body for _, body in registry.bodies(coordinator.ledger, RunCompleted, run=run)]
    if not completed:
        raise RunFailedError(run, 0, "coordinator_error", "the log shows no run.completed")
    started = registry.run_started(coordinator.ledger, run)
    return TrainedRun(
        run=run, charter=completed[0].charter, model=started.model, weights=completed[0].weights
    )


def register(
    coordinator: Coordinator, principal: Principal, authorizer: Authorizer, request: RegisterRequest
) -> Version:
    """Judge a completed run's weights by the charter's gates and enter the version as a candidate.

    A run is registered once; asked again, the version is returned as it was judged.
    A version that fails a gate is registered too, so that the failure is on record; it can never be approved.

    Raises:
        NotFoundError: no such completed run.
        PublicSetError: the public set is not here.
    """
    from audit.models import weights_of_file
    from federation.exporting import export
    from federation.gates import epsilons, judge

    ledger = coordinator.ledger
    for _, known in registry.bodies(ledger, VersionRegistered, run=request.run):
        require(authorizer, principal, Question(action="models.register", resource=known.model))
        return registry.find_version(ledger, known.version)
    started, completed = (
        registry.run_started(ledger, request.run),
        registry.run_completed(ledger, request.run),
    )
    require(authorizer, principal, Question(action="models.register", resource=started.model))
    charter = charter_of(coordinator, completed.charter)
    weights = weights_of_file(charter.layers, coordinator.blobs.get(completed.weights))
    plain, packed = pack_costs(epsilons(charter, request.run, registry.statements(ledger)))
    body = VersionRegistered(
        version=completed.weights,
        model=started.model,
        charter=completed.charter,
        run=request.run,
        author=started.author,
        averaged_from=completed.rounds - charter.average_last + 1,
        averaged_to=completed.rounds,
        gates=judge(
            charter, public_data(coordinator, charter), weights, registry.run_evaluated(ledger, request.run)
        ),
        epsilons=plain,
        packed=packed,
    )
    coordinator.append(body, "coordinator", stable_event_id("version.registered", request.run))
    export(coordinator, body, charter, weights)
    return registry.find_version(ledger, completed.weights)


def approve(
    coordinator: Coordinator,
    principal: Principal,
    authorizer: Authorizer,
    request: ApproveRequest,
    officer: SigningKey,
) -> Version:
    """Move a version forward by an officer's own signature; `to_state` live goes through approved.

    Raises:
        OfficerError: the key is no officer's, or the author's own.
        GateNotPassedError: a gate did not pass.
        TransitionError: the version is not in a state from which it may go there.
    """
    from federation.gates import failed_gates

    version = registry.find_version(coordinator.ledger, request.version)
    require(authorizer, principal, Question(action="models.approve", resource=version.model))
    if request.to_state not in (APPROVED, LIVE):
        raise TransitionError(f"approve to {APPROVED} or {LIVE}, not to {request.to_state!r}")
    _check_officer(coordinator, version, officer)
    charter = charter_of(coordinator, version.registered.charter)
    failed = failed_gates(charter, version.registered.gates, version.registered.costs)
    if failed:
        raise GateNotPassedError(version.digest, failed)
    if version.state == CANDIDATE:
        _move(coordinator, version, CANDIDATE, APPROVED, officer, request.reason)
    elif version.state not in (APPROVED, CANARY, SHADOW) or request.to_state == APPROVED:
        raise TransitionError(
            f"version {version.digest[:12]} is {version.state}; it cannot become {request.to_state}"
        )
    if request.to_state == LIVE:
        before = APPROVED if version.state == CANDIDATE else version.state
        _make_live(coordinator, version, before, officer, request.reason)
    return registry.find_version(coordinator.ledger, version.digest)


def trial(
    coordinator: Coordinator,
    principal: Principal,
    authorizer: Authorizer,
    request: TrialRequest,
    officer: SigningKey,
) -> Version:
    """Make an approved version a canary or a shadow, or end its trial, by an officer's own signature.

    Raises:
        OfficerError: the key is no officer's, or the author's own.
        TransitionError: the share or the state does not allow it, or another canary has a share.
    """
    version = registry.find_version(coordinator.ledger, request.version)
    require(authorizer, principal, Question(action="models.approve", resource=version.model))
    if request.to_state not in (CANARY, SHADOW, APPROVED):
        raise TransitionError(f"a trial is {CANARY} or {SHADOW}, and ends as {APPROVED}")
    if request.to_state == CANARY and not 1 <= request.share <= 99:
        raise TransitionError(f"a canary answers 1 to 99 percent of the requests, not {request.share}")
    if request.to_state != CANARY and request.share:
        raise TransitionError(f"a share is a canary's; leave it out for {request.to_state}")
    _check_officer(coordinator, version, officer)
    if request.to_state == CANARY:
        others = [v for v in registry.versions(coordinator.ledger, version.model) if v.state == CANARY]
        if others:
            raise TransitionError(f"version {others[0].digest[:12]} is the canary; end its trial first")
    _move(coordinator, version, version.state, request.to_state, officer, request.reason, request.share)
    return registry.find_version(coordinator.ledger, version.digest)


def rollback(
    coordinator: Coordinator,
    principal: Principal,
    authorizer: Authorizer,
    request: RollbackRequest,
    officer: SigningKey,
) -> Version:
    """Make an earlier version live again by an officer's own signature.

    Raises:
        TransitionError: no earlier version of the model was ever live.
        OfficerError: the key is no officer's, or the author's own.
    """
    require(authorizer, principal, Question(action="models.rollback", resource=request.model))
    earlier = [
        v for v in registry.versions(coordinator.ledger, request.model) if v.state == RETIRED and v.was_live
    ]
    if request.version:
        earlier = [v for v in earlier if len(request.version) >= 8 and v.digest.startswith(request.version)]
    if not earlier:
        raise TransitionError(
            f"model {request.model} has no retired version that was live; nothing to roll back to"
        )
    target = max(earlier, key=lambda v: v.transitions[-1].leaf_index)
    _check_officer(coordinator, target, officer)
    _make_live(coordinator, target, RETIRED, officer, request.reason or "rollback")
    return registry.find_version(coordinator.ledger, target.digest)


def retire(
    coordinator: Coordinator,
    principal: Principal,
    authorizer: Authorizer,
    version: str,
    officer: SigningKey,
    reason: str,
) -> Version:
    """Take a version out of use by an officer's own signature; the model has no live version afterwards."""
    found = registry.find_version(coordinator.ledger, version)
    require(authorizer, principal, Question(action="models.rollback", resource=found.model))
    _check_officer(coordinator, found, officer)
    if found.state == RETIRED:
        raise TransitionError(f"version {found.digest[:12]} is retired already")
    _move(coordinator, found, found.state, RETIRED, officer, reason)
    return registry.find_version(coordinator.ledger, found.digest)


def charter_of(coordinator: Coordinator, digest: str) -> Charter:
    """Return a published charter from the log's own bytes; NotFoundError when it is not there."""
    from federation.charter import Charter

    text, _ = registry.charter_text(coordinator.ledger, digest)
    return Charter.from_canonical(text)


def public_data(coordinator: Coordinator, charter: Charter) -> PublicData | None:
    """Return the charter's public set, when the file is in this home."""
    from federation.evaluation import PublicData

    if charter.public_set is None:
        return None
    data = coordinator.blobs.find(charter.public_set.digest)
    return None if data is None else PublicData.read(charter, data)


def _make_live(
    coordinator: Coordinator, version: Version, from_state: str, officer: SigningKey, reason: str
) -> None:
    """The new one first: at no moment is there none that answers, so no request fails over it."""
    present = registry.live_version(coordinator.ledger, version.model)
    _move(coordinator, version, from_state, LIVE, officer, reason)
    if present is not None:
        _move(coordinator, present, LIVE, RETIRED, officer, f"replaced by {version.digest[:12]}")


def _move(
    coordinator: Coordinator,
    version: Version,
    from_state: str,
    to_state: str,
    officer: SigningKey,
    reason: str,
    share: int = 0,
) -> None:
    if (from_state, to_state) not in registry.ALLOWED:
        raise TransitionError(f"version {version.digest[:12]} cannot go from {from_state} to {to_state}")
    body = VersionTransition(
        version=version.digest,
        model=version.model,
        charter=version.registered.charter,
        from_state=from_state,
        to_state=to_state,
        gate_results=version.leaf_hash,
        previous_transition=registry.last_transition(coordinator.ledger, version.model),
        officer=officer.text,
        reason=reason[:200],
        signature="",
        share=share,
    )
    body = dataclasses.replace(body, signature=_sign(officer, body))
    coordinator.append(body, f"officer:{officer.verify_key.fingerprint}")


def _check_officer(coordinator: Coordinator, version: Version, officer: SigningKey) -> None:
    text, charter_author = registry.charter_text(coordinator.ledger, version.registered.charter)
    if officer.text not in read_charter(text.encode()).officers:  # as the verifier reads it
        raise OfficerError(
            f"{officer.text} is not one of the charter's officers; an officer's own key must sign"
        )
    if officer.text in (version.registered.author, charter_author):
        raise OfficerError(
            "whoever trained the version or drew up its charter cannot approve it; ask another officer"
        )


def _sign(key: SigningKey, body: RunStarted | VersionTransition) -> str:
    domain, payload = signing_payload(body)
    return base64.b64encode(key.sign(domain, payload)).decode()
