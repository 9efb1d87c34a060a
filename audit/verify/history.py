"""Steps on the log: the checkpoint and its witnesses, every entry's place, what the subject leads to."""

from __future__ import annotations

from datetime import UTC, datetime

from audit.checkpoints import Checkpoint, open_checkpoint
from audit.entries import (
    ZERO_DIGEST,
    KeyRotated,
    LogCompromised,
    LogCreated,
    Prediction,
    RunCompleted,
    RunStarted,
    VersionRegistered,
    VersionTransition,
    decode_entry,
)
from audit.errors import AuditError, LogKeyError
from audit.evidence import scope_of
from audit.log_keys import read_log_keys
from audit.merkle import hash_leaf, verify_inclusion
from audit.notes import NoteVerifier
from audit.tlog_policy import NO_QUORUM
from audit.verify.chain import Chain, FailError, GapError, Leaf, Located, Outcome, expect, need, only
from audit.verify.report import NO_POLICY, Word


def check_file(chain: Chain) -> Outcome:
    """The zip was read before this; say what is in it."""
    evidence = chain.evidence
    return Outcome(
        word=Word.PROVED,
        detail=f"{len(evidence.entries)} entries and {len(evidence.artefacts)} artefacts; every digest is "
        f"as stated",
    )


def check_checkpoint(chain: Chain) -> Outcome:
    """The log's signature, and the policy's quorum of witnesses."""
    note = chain.evidence.checkpoint
    if chain.policy is None:
        return _without_policy(chain, note)
    try:
        accepted = chain.policy.open(note, now=chain.now_s)
    except AuditError as error:
        raise FailError(error.code, f"the policy does not accept the checkpoint: {error}") from error
    opened, quorum = accepted.opened, accepted.quorum
    chain.log, chain.log_keys = opened.log_keys[0], opened.log_keys
    chain.believed_keys = chain.policy.keys_of(opened.checkpoint.origin)
    chain.is_witnessed = quorum.satisfied and chain.policy.quorum != NO_QUORUM
    _take(chain, opened.checkpoint)
    times = sorted(cosignature.timestamp for cosignature in opened.cosignatures)
    chain.checkpoint_facts["witnesses"] = list(accepted.witnesses)
    chain.checkpoint_facts["cosigned"] = [_time(stamp) for stamp in times]
    shown = f"{opened.checkpoint.tree_size} entries, signed by log {opened.checkpoint.origin}"
    if not quorum.satisfied:
        late = len(opened.from_the_future)
        code = "verify.cosignature_from_future" if late else "verify.unwitnessed"
        future = f"; {late} cosignatures are dated in the future and do not count" if late else ""
        detail = f"{shown}; {quorum.have} of the {quorum.need} witnesses needed{future}"
        return Outcome(
            word=Word.NO_EVIDENCE, code=code, detail=f"{detail}; missing {', '.join(quorum.missing)}"
        )
    if chain.policy.quorum == NO_QUORUM:
        return Outcome(
            word=Word.ATTESTED, detail=f"{shown}; the policy asks for no witness, so by its operator alone"
        )
    names = ", ".join(accepted.witnesses)
    detail = f"{shown}; cosigned by {names} (needed: {quorum.need}), last at {_time(times[-1])}"
    return Outcome(word=Word.PROVED, detail=detail)


def check_age(chain: Chain) -> Outcome:
    """A quorum of cosignatures is recent enough; only asked for with a maximum age."""
    policy, most = chain.policy, chain.max_age_s
    if policy is None or most is None:
        return Outcome(
            word=Word.NO_EVIDENCE, code=NO_POLICY, detail="nobody we know says when this was current"
        )
    accepted = policy.open(chain.evidence.checkpoint, now=chain.now_s)
    fresh = {c.verifier for c in accepted.opened.cosignatures if c.timestamp >= chain.now_s - most}
    quorum = policy.evaluate(witness.name for witness in policy.witnesses if witness.verifier in fresh)
    if policy.quorum == NO_QUORUM or not quorum.satisfied:
        newest = max((c.timestamp for c in accepted.opened.cosignatures), default=0)
        return Outcome(
            word=Word.NO_EVIDENCE,
            code="verify.stale",
            detail=f"no quorum cosigned within the last {most} s; the newest cosignature is of "
            f"{_time(newest)}",
        )
    return Outcome(word=Word.PROVED, detail=f"a quorum of witnesses cosigned within the last {most} s")


def check_inclusion(chain: Chain) -> Outcome:
    """Every entry is of this release, and is a leaf of the checkpoint's tree."""
    checkpoint = need(chain.checkpoint, CHECKPOINT)
    event_ids: dict[str, int] = {}
    for index, data in chain.evidence.entries.items():
        proof = chain.evidence.proofs.get(index)
        if proof is None:
            raise GapError("verify.proof_missing", f"no inclusion proof of leaf {index}", index)
        leaf_hash = hash_leaf(data)
        try:
            verify_inclusion(
                leaf_index=index,
                tree_size=checkpoint.tree_size,
                leaf_hash=leaf_hash,
                proof=proof,
                root_hash=checkpoint.root_hash,
            )
            entry = decode_entry(data)
        except AuditError as error:
            raise FailError(error.code, f"leaf {index}: {error}", index) from error
        if entry.event_id in event_ids:
            raise FailError(
                "verify.event_id_twice", f"same event id as leaf {event_ids[entry.event_id]}", index
            )
        event_ids[entry.event_id] = index
        located = Located(index, leaf_hash.hex(), entry)
        chain.located[index] = chain.by_hash[located.leaf_hash] = located
    _check_log_created(chain, checkpoint)
    _check_keys(chain, checkpoint)
    return Outcome(
        word=Word.PROVED,
        detail=f"{len(chain.located)} entries decoded strictly and proved to be leaves of the "
        f"checkpoint's tree",
    )


def check_links(chain: Chain) -> Outcome:
    """From the subject by hashes to its transition, version, run and charter."""
    subject = need(chain.located.get(chain.evidence.leaf_index), INCLUSION)
    body, scope = subject.body, scope_of(subject.entry.type)
    expect(chain.evidence.scope, scope, code="verify.scope", field="scope of the file", entry=subject.index)
    if isinstance(body, Prediction):
        _take_prediction(chain, Leaf(subject.index, subject.leaf_hash, body))
    elif isinstance(body, VersionTransition):
        _take_transition(chain, Leaf(subject.index, subject.leaf_hash, body))
    elif isinstance(body, VersionRegistered):
        chain.registered = Leaf(subject.index, subject.leaf_hash, body)
    if scope == "entry":
        return Outcome(
            word=Word.PROVED, detail=f"leaf {subject.index}, a {subject.entry.type} entry, on its own"
        )
    _take_run(chain, chain.registered.body.run if chain.registered else body.run)
    completed, started = need(chain.completed, LINKS), need(chain.started, LINKS)
    names = [
        f"prediction {chain.prediction.index}" if chain.prediction else "",
        f"transition {chain.transition.index}" if chain.transition else "",
        f"version {chain.registered.index}" if chain.registered else "",
        f"run {started.index} to {completed.index}",
        f"charter {chain.charter_digest[:16]}…",
    ]
    return Outcome(word=Word.PROVED, detail="leaf by leaf: " + " <- ".join(name for name in names if name))


FILE, CHECKPOINT, AGE = "The evidence file", "The log's checkpoint", "How recent it is"
INCLUSION, LINKS = "Every entry is in the log", "The chain of references"


def _without_policy(chain: Chain, note: bytes) -> Outcome:
    first = chain.evidence.entries.get(0)
    if first is None:
        raise GapError("verify.entry_missing", "the log's first entry is not in the file")
    try:
        created = decode_entry(first).body
        if not isinstance(created, LogCreated):
            raise FailError("verify.log_created", "leaf 0 does not create the log", 0)
        keys = _keys_in_file(chain, created)
        opened = open_checkpoint(note, log=keys, now=chain.now_s)
    except FailError:
        raise
    except AuditError as error:
        raise FailError(error.code, f"the checkpoint is not signed by the log's own key: {error}") from error
    chain.log, chain.log_keys, chain.believed_keys = opened.log_keys[0], opened.log_keys, keys
    _take(chain, opened.checkpoint)
    return Outcome(
        word=Word.NO_EVIDENCE,
        code=NO_POLICY,
        detail=f"{opened.checkpoint.tree_size} entries, signed by the key that the file itself names; "
        f"without a "
        "policy nothing says whose key it is, or that any witness saw this history",
    )


def _take(chain: Chain, checkpoint: Checkpoint) -> None:
    chain.checkpoint = checkpoint
    chain.checkpoint_facts.update(
        {
            "origin": checkpoint.origin,
            "tree_size": checkpoint.tree_size,
            "root_hash": checkpoint.root_hash.hex(),
        }
    )


def _check_log_created(chain: Chain, checkpoint: Checkpoint) -> None:
    first = chain.located.get(0)
    if first is None:
        raise GapError("verify.entry_missing", "the log's first entry is not in the file")
    if not isinstance(first.body, LogCreated):
        raise FailError("verify.log_created", "leaf 0 does not create the log", 0)
    log = need(chain.log, CHECKPOINT)
    expect(first.body.origin, checkpoint.origin, code="verify.log_created", field="origin", entry=0)
    if not any(isinstance(found.body, (KeyRotated, LogCompromised)) for found in chain.located.values()):
        expect(first.body.log_key, log.vkey, code="verify.log_created", field="log_key", entry=0)


def _check_keys(chain: Chain, checkpoint: Checkpoint) -> None:
    """At least one key of the policy that signed the checkpoint was valid for a tree of its size."""
    try:
        chain.keys = read_log_keys((index, chain.located[index].body) for index in sorted(chain.located))
    except LogKeyError as error:
        raise FailError(error.code, str(error), error.leaf_index) from error
    refused: LogKeyError | None = None
    for verifier in chain.log_keys:
        try:
            chain.keys.check(verifier.vkey, checkpoint.tree_size, witnessed=chain.is_witnessed)
        except LogKeyError as error:
            refused = refused or error
        else:
            return
    if refused is not None:
        raise FailError(refused.code, f"{CHECKPOINT}: {refused}", refused.leaf_index) from refused


def _keys_in_file(chain: Chain, created: LogCreated) -> tuple[NoteVerifier, ...]:
    """Return every key of the log that the file itself names."""
    named = [created.log_key]
    for data in chain.evidence.entries.values():
        try:
            body = decode_entry(data).body
        except AuditError:
            continue  # the next step says so
        if isinstance(body, KeyRotated):
            named.append(body.new_key)
        elif isinstance(body, LogCompromised):
            named.append(body.successor)
    return tuple(dict.fromkeys(NoteVerifier.parse(vkey) for vkey in named))


def _take_prediction(chain: Chain, leaf: Leaf[Prediction]) -> None:
    body = leaf.body
    if body.transition == ZERO_DIGEST and body.role == "tester":
        raise GapError(
            "prediction.test_only",
            "a tester's answer by a version that nobody approved: nothing may rest on it",
            leaf.index,
        )
    transition = chain.linked(
        body.transition, VersionTransition, "the transition that made the version live", entry=leaf.index
    )
    for field in ("model", "version", "charter"):
        expect(
            getattr(body, field),
            getattr(transition.body, field),
            code="prediction.other_version",
            field=field,
            entry=leaf.index,
        )
    chain.prediction = leaf
    _take_transition(chain, transition)


def _take_transition(chain: Chain, leaf: Leaf[VersionTransition]) -> None:
    registered = chain.linked(
        leaf.body.gate_results, VersionRegistered, "the version's registration", entry=leaf.index
    )
    for field in ("model", "version", "charter"):
        expect(
            getattr(leaf.body, field),
            getattr(registered.body, field),
            code="approval.other_version",
            field=field,
            entry=leaf.index,
        )
    chain.transition, chain.registered = leaf, registered


def _take_run(chain: Chain, run: str) -> None:
    completed = only(
        [leaf for leaf in chain.leaves(RunCompleted) if leaf.body.run == run],
        f"the end of run {run}",
        missing=f"the entry that completes run {run} is not in the file",
    )
    started = only(
        [leaf for leaf in chain.leaves(RunStarted) if leaf.body.run == run],
        f"the start of run {run}",
        missing=f"the entry that starts run {run} is not in the file",
    )
    expect(
        completed.body.charter,
        started.body.charter,
        code="run.charter",
        field="charter",
        entry=completed.index,
    )
    if not started.index < completed.index:
        raise FailError("verify.order", f"run {run} ends before it starts", completed.index)
    registered = chain.registered
    if registered is not None:
        body = registered.body
        expect(
            body.charter,
            started.body.charter,
            code="version.charter",
            field="charter",
            entry=registered.index,
        )
        expect(body.model, started.body.model, code="version.model", field="model", entry=registered.index)
        expect(
            body.version,
            completed.body.weights,
            code="version.weights",
            field="version",
            entry=registered.index,
        )
        if completed.index >= registered.index:
            raise FailError(
                "verify.order", "the version was registered before its run ended", registered.index
            )
    chain.started, chain.completed, chain.charter_digest = started, completed, started.body.charter


def _time(stamp: int) -> str:
    if not 0 <= stamp < 253402300800:
        return f"POSIX second {stamp}"
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
