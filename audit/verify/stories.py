"""Two stories of one federation: what a site's own log says, beside what the federation's log says of it.

`compare_stories(federation, site, policy_text=...)` reads the site's log file and the federation's (a whole
log, or an evidence file) with the standard library and `cryptography`. A difference names who signed what:
where the federation's log bears another body under the site's valid signature, the site told two stories;
where the signature does not hold, the log was made up. What only the site has may have been lost on the way
or left out; nothing can tell which, so it is named and the comparison stays INCOMPLETE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from audit.checkpoints import open_checkpoint
from audit.entries import (
    CharterSigned,
    LogCreated,
    RunAccepted,
    SiteEnrolled,
    SiteRefused,
    SiteStatement,
    SiteUndelivered,
    body_document,
    decode_entry,
)
from audit.errors import AuditError
from audit.evidence import MAX_BYTES, read_evidence
from audit.log_file import FileEntry, LogFile
from audit.merkle import CompactRange, hash_leaf
from audit.notes import NoteVerifier
from audit.site_bodies import SiteLogOpened
from audit.tlog_policy import NO_QUORUM, Policy
from audit.verify import verify_evidence
from audit.verify.chain import FailError, GapError, Leaf, Outcome, verify_body
from audit.verify.members import check_enrolment
from audit.verify.report import NO_POLICY, Report, Step, Word

SITE_LOG: Final = "The site's own log"
FEDERATION_LOG: Final = "The federation's log"
IDENTITY: Final = "The site's identity"
STATEMENTS: Final = "Statements on both sides"
ACCEPTANCES: Final = "Accepted runs on both sides"
CHARTERS: Final = "Signed charters on both sides"
REFUSALS: Final = "Refusals on both sides"
ANCHORS: Final = "The site's log as it was anchored"
SCOPE: Final = "stories"
_NAMED: Final = 5  # differences spelt out in one step


@dataclass(frozen=True, slots=True)
class Told:
    """One body as one side tells it."""

    index: int
    body: Any


@dataclass(slots=True)
class Side:
    """What one side tells of a site, by what names each thing."""

    statements: dict[tuple[str, int], list[Told]] = field(default_factory=dict)  # (population, sequence)
    acceptances: dict[str, list[Told]] = field(default_factory=dict)  # run
    charters: dict[str, list[Told]] = field(default_factory=dict)  # digest
    refusals: dict[tuple[str, int, str], list[Told]] = field(default_factory=dict)  # run, round, reason
    enrolments: list[Told] = field(default_factory=list)

    def take(self, index: int, body: Any) -> None:
        if isinstance(body, SiteUndelivered):
            body = body.statement
        told = Told(index, body)
        if isinstance(body, SiteStatement):
            self.statements.setdefault((body.population, body.sequence), []).append(told)
        elif isinstance(body, RunAccepted):
            self.acceptances.setdefault(body.run, []).append(told)
        elif isinstance(body, CharterSigned):
            self.charters.setdefault(body.digest, []).append(told)
        elif isinstance(body, SiteRefused):
            self.refusals.setdefault((body.run, body.round, body.reason), []).append(told)
        elif isinstance(body, SiteEnrolled):
            self.enrolments.append(told)


@dataclass(slots=True)
class Stories:
    """The state of one comparison."""

    site: str = ""
    origin: str = ""
    opened: SiteLogOpened | None = None
    ours: Side = field(default_factory=Side)
    theirs: Side = field(default_factory=Side)
    whole: bool = True  # the federation's side is a whole log, not one evidence file
    leaves: list[bytes] = field(default_factory=list)  # leaf hashes of the site's own log

    def keys(self) -> tuple[tuple[str, ...], str]:
        """Return the site's statement keys, as its identity delegated them, and the identity key."""
        if self.opened is None:
            raise GapError("verify.not_reached", "not compared, because the site's log was not established")
        identity = self.opened.identity_key
        found = [
            told.body.statement_key
            for told in (*self.ours.enrolments, *self.theirs.enrolments)
            if told.body.identity_key == identity
        ]
        return tuple(dict.fromkeys(found)), identity


def compare_stories(
    federation: Path | str, site: Path | str, *, policy_text: str | None, now: datetime | None = None
) -> Report:
    """Compare a site's log file with the federation's log file or an evidence file.

    Damaged or hostile files give a report, never an exception.

    Raises:
        MalformedPolicyError: the policy is not one; names the line.
        OSError: a file cannot be read.
    """
    policy = None if policy_text is None else Policy.parse(policy_text)
    moment = now or datetime.now(UTC)
    stories = Stories()
    steps: list[Step] = []

    def step(title: str, check: Callable[[], Outcome]) -> None:
        steps.append(_take(len(steps) + 1, title, check))

    step(SITE_LOG, lambda: _read_site(stories, Path(site)))
    with Path(federation).open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if data[:2] == b"PK":
        stories.whole = False
        judged = verify_evidence(data, policy_text=policy_text, now=moment)
        step(FEDERATION_LOG, lambda: _read_evidence(stories, data, judged))
    else:
        step(FEDERATION_LOG, lambda: _read_federation(stories, Path(federation), policy, moment))
    step(IDENTITY, lambda: _check_identity(stories, policy))
    for title, compare in (
        (STATEMENTS, _statements),
        (ACCEPTANCES, _acceptances),
        (CHARTERS, _charters),
        (REFUSALS, _refusals),
        (ANCHORS, _anchors),
    ):
        step(title, lambda compare=compare: compare(stories))  # type: ignore[misc]
    return Report(
        steps=tuple(steps), scope=SCOPE, subject=f"site {stories.site or '?'} beside {Path(federation).name}"
    )


def _read_site(stories: Stories, path: Path) -> Outcome:
    log = LogFile(path)
    head: dict[int, Any] = {}
    count, opened = 0, None
    for item in log.entries():
        if item.index < 2:
            head[item.index] = item.entry.body
        stories.ours.take(item.index, item.entry.body)
        stories.leaves.append(bytes.fromhex(item.leaf_hash))
        count = item.index + 1
    created, opened = head.get(0), head.get(1)
    if not isinstance(created, LogCreated) or not isinstance(opened, SiteLogOpened):
        raise FailError("story.no_site_log", f"{path.name} does not begin as a site's own log does", 0)
    if (created.log_key, created.origin) != (opened.log_key, log.origin):
        raise FailError("story.no_site_log", "its first two entries name two logs", 1)
    verify_body(opened, opened.identity_key, code="story.site_key", who=f"site {opened.site}", entry=1)
    key = NoteVerifier.parse(opened.log_key)
    signed = 0
    for note in log.notes:
        checkpoint = open_checkpoint(note, log=key, now=0).checkpoint
        if checkpoint.tree_size > count or log.roots.get(checkpoint.tree_size) != checkpoint.root_hash:
            raise FailError(
                "story.site_rewritten",
                f"the site signed a tree of {checkpoint.tree_size} entries that these are not",
            )
        signed = max(signed, checkpoint.tree_size)
    if not signed:
        raise FailError("story.site_unsigned", "the site never signed a checkpoint of it")
    stories.site, stories.opened = opened.site, opened
    later = f"; {count - signed} entries came after its last checkpoint" if count > signed else ""
    return Outcome(
        word=Word.PROVED,
        detail=f"{count} entries of site {opened.site}, signed up to {signed} by the key that its identity "
        f"vouches for{later}",
    )


def _read_federation(stories: Stories, path: Path, policy: Policy | None, now: datetime) -> Outcome:
    log = LogFile(path)
    stories.origin = log.origin
    count = _collect(stories, log.entries())
    if policy is None:
        return Outcome(
            word=Word.NO_EVIDENCE,
            detail=f"{count} entries; no policy says whose log this is and who watches it",
            code=NO_POLICY,
        )
    for note in log.notes:
        accepted = policy.open(note, now=int(now.timestamp()))
        checkpoint = accepted.opened.checkpoint
        if log.roots.get(checkpoint.tree_size) != checkpoint.root_hash:
            raise FailError(
                "log.root", f"these are not the {checkpoint.tree_size} entries that the log signed"
            )
        if accepted.quorum.satisfied:
            by = "nobody, since the policy asks for no witness"
            if policy.quorum != NO_QUORUM:
                by = ", ".join(accepted.witnesses)
            return Outcome(
                word=Word.ATTESTED if policy.quorum == NO_QUORUM else Word.PROVED,
                detail=f"{count} entries, the first {checkpoint.tree_size} cosigned by {by}",
            )
    raise GapError("verify.unwitnessed", "too few witnesses cosigned any checkpoint in it")


def _read_evidence(stories: Stories, data: bytes, judged: Report) -> Outcome:
    if judged.failures:
        raise FailError("story.evidence", f"the evidence file is INVALID: {judged.failures[0].detail}")
    evidence = read_evidence(data)
    items = (
        FileEntry(index, hash_leaf(body).hex(), decode_entry(body))
        for index, body in sorted(evidence.entries.items())
    )
    count = _collect(stories, items)
    stories.origin = str(judged.checkpoint.get("origin", ""))
    gaps = [step for step in judged.steps if step.word is Word.NO_EVIDENCE]
    if gaps:
        return Outcome(
            word=Word.NO_EVIDENCE,
            detail=f"{count} entries of an evidence file that is {judged.verdict}: {gaps[0].detail}",
            code=gaps[0].code,
        )
    return Outcome(word=Word.PROVED, detail=f"{count} entries of an evidence file that is {judged.verdict}")


def _collect(stories: Stories, items: Iterable[FileEntry]) -> int:
    count = 0
    for item in items:
        count += 1
        body: Any = item.entry.body
        source = body.statement if isinstance(body, SiteUndelivered) else body
        if getattr(source, "site", None) == stories.site:
            stories.theirs.take(item.index, body)
    return count


def _check_identity(stories: Stories, policy: Policy | None) -> Outcome:
    _, identity = stories.keys()
    enrolled = stories.theirs.enrolments
    if not enrolled:
        raise GapError("site.not_enrolled", f"the federation's log enrols no site {stories.site}")
    for told in enrolled:
        if told.body.identity_key != identity:
            raise FailError(
                "story.other_identity",
                f"the federation's log enrols another identity as site {stories.site}",
                told.index,
            )
        witness = check_enrolment(Leaf(told.index, "", told.body), stories.origin)
        if policy is not None and not any(known.verifier == witness for known in policy.witnesses):
            raise GapError("site.unanchored", "its witness key is not one of the policy's", told.index)
    if policy is None:
        raise GapError(NO_POLICY, "both logs name one identity; without a policy nothing says whose it is")
    return Outcome(
        word=Word.PROVED, detail=f"both logs name one identity, {identity}, which the policy anchors"
    )


def _statements(stories: Stories) -> Outcome:
    keys, _ = stories.keys()
    ends: dict[str, int] = {}
    for population, sequence in stories.theirs.statements:
        ends[population] = max(ends.get(population, 0), sequence)

    def expected(key: tuple[str, int]) -> bool:
        return stories.whole or key[1] <= ends.get(key[0], 0)

    return _compare(
        stories.ours.statements,
        stories.theirs.statements,
        what="statement",
        name=lambda body: f"run {body.run} round {body.round} (release {body.sequence})",
        keys=keys,
        expected=expected,
    )


def _acceptances(stories: Stories) -> Outcome:
    keys, _ = stories.keys()
    return _compare(
        stories.ours.acceptances,
        stories.theirs.acceptances,
        what="acceptance",
        name=lambda body: f"run {body.run}",
        keys=keys,
        expected=lambda run: stories.whole or run in stories.theirs.acceptances,
    )


def _charters(stories: Stories) -> Outcome:
    _, identity = stories.keys()
    return _compare(
        stories.ours.charters,
        stories.theirs.charters,
        what="charter",
        name=lambda body: f"charter {body.digest[:16]}… by {body.author}",
        keys=(identity,),
        expected=lambda digest: stories.whole or digest in stories.theirs.charters,
    )


def _refusals(stories: Stories) -> Outcome:
    keys, _ = stories.keys()
    ours, theirs = stories.ours.refusals, stories.theirs.refusals
    for told in (item for group in theirs.values() for item in group):
        _check_signed(told, keys, "refusal", told.index)
    hidden = [group[0].body for key, group in ours.items() if key not in theirs] if stories.whole else []
    if hidden:
        named = _list(f"run {body.run[:60]} round {body.round}: {body.reason}" for body in hidden)
        raise GapError(
            "story.unlogged_refusal", f"the site refused, and the federation's log says nothing: {named}"
        )
    return Outcome(word=Word.PROVED, detail=f"{len(theirs)} refusals, every one on both sides or counted")


def _anchors(stories: Stories) -> Outcome:
    """Hold the site's log to the roots of it that the site signed into the federation's, run by run.

    Raises:
        FailError: these are not the entries that the log had when a run was accepted.
        GapError: the federation's log holds no anchor of the site.
    """
    keys, _ = stories.keys()
    found = [told for group in stories.theirs.acceptances.values() for told in group]
    anchors = sorted(
        (told for told in found if told.body.site_log_root and _is_signed(told, keys)),
        key=lambda told: told.body.site_log_size,
    )
    if not anchors:
        raise GapError(
            "story.not_anchored", "no acceptance of the site in the federation's log names a root of its log"
        )
    edge = CompactRange()
    for told in anchors:
        size, named = told.body.site_log_size, f"run {told.body.run}"
        if size > len(stories.leaves):
            raise FailError(
                "story.site_truncated",
                f"{named} was accepted on a log of {size} entries; this one has {len(stories.leaves)}",
                told.index,
            )
        for leaf in stories.leaves[edge.size : size]:
            edge.append(leaf)
        if edge.root().hex() != told.body.site_log_root:
            raise FailError(
                "story.site_rewritten",
                f"these are not the {size} entries on which the site accepted {named}: it wrote its log anew",
                told.index,
            )
    last = anchors[-1].body.site_log_size
    return Outcome(
        word=Word.PROVED,
        detail=f"{len(anchors)} anchors in the federation's log; the first {last} of {len(stories.leaves)} "
        "entries are those that it had then",
    )


def _compare(
    ours: dict[Any, list[Told]],
    theirs: dict[Any, list[Told]],
    *,
    what: str,
    name: Callable[[Any], str],
    keys: tuple[str, ...],
    expected: Callable[[Any], bool],
) -> Outcome:
    """Compare bodies of one kind, by what names them.

    Raises:
        FailError: one is told in two ways, or the federation's log has one that the site never entered.
        GapError: the federation's log lacks one of the site's.
    """
    for group in ours.values():
        for told in group:
            _check_signed(told, keys, what, None)
    for key, group in sorted(theirs.items(), key=lambda item: item[1][0].index):
        known = [body_document(told.body) for told in ours.get(key, ())]
        for told in group:
            if body_document(told.body) in known:
                continue
            valid = _is_signed(told, keys)
            who = (
                "the site's own key signed both" if valid else "and the signature there is not the site's own"
            )
            if known:
                raise FailError(
                    f"story.{what}_differs",
                    f"{name(told.body)}: the federation's log tells it otherwise than the site's entry "
                    f"{ours[key][0].index}; {who}",
                    told.index,
                )
            detail = "though the site's key signed it" if valid else "and the site's key did not sign it"
            raise FailError(
                f"story.{what}_unknown",
                f"{name(told.body)}: is in the federation's log and not in the site's, {detail}",
                told.index,
            )
    missing = [group[0].body for key, group in ours.items() if key not in theirs and expected(key)]
    if missing:
        raise GapError(
            f"story.unlogged_{what}",
            f"the site signed, and the federation's log lacks: {_list(name(body) for body in missing)}",
        )
    return Outcome(word=Word.PROVED, detail=f"{len(theirs)}, the same on both sides")


def _check_signed(told: Told, keys: tuple[str, ...], what: str, entry: int | None) -> None:
    if not _is_signed(told, keys):
        where = "the federation's log" if entry is not None else f"the site's log, entry {told.index}"
        raise FailError(f"story.{what}_signature", f"a {what} in {where} is not signed by the site", entry)


def _is_signed(told: Told, keys: tuple[str, ...]) -> bool:
    for key in keys:
        try:
            verify_body(told.body, key, code="", who="", entry=told.index)
        except AuditError:
            continue
        return True
    return False


def _list(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return "; ".join(shown[:_NAMED]) + more


def _take(number: int, title: str, check: Callable[[], Outcome]) -> Step:
    word, code, entry = Word.FAIL, "", None
    try:
        outcome = check()
        word, detail, code, entry = outcome.word, outcome.detail, outcome.code, outcome.entry
    except GapError as error:
        word, detail, code, entry = Word.NO_EVIDENCE, error.detail, error.code, error.entry
    except FailError as error:
        detail, code, entry = error.detail, error.code, error.entry
    except AuditError as error:
        detail, code = str(error), error.code
    return Step(number=number, title=title, word=word, detail=detail, code=code, entry=entry)
