"""C2SP tlog-policy: the reader's own file that says which log and which witnesses to believe.

    log <vkey> [url]
    witness <name> <vkey> [url]
    group <name> (all|any|<k>) <member>...
    quorum <name|none>

Several witnesses under one operator go into a `group <operator> any ...`, which counts once in the quorum.
Two `log` lines of one name are the two keys of a log that changes from one to the other.
Stricter than C2SP where leniency could lend one key two voices: no key occurs in two lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from audit.checkpoints import OpenedCheckpoint, open_checkpoint, parse_checkpoint_note
from audit.errors import KeyFormatError, MalformedPolicyError, NoKnownSignatureError
from audit.notes import KeyType, NoteVerifier

MAX_POLICY_BYTES = 1 << 18
MAX_LINES = 1024
NO_QUORUM = "none"

_BLANKS = re.compile(r"[ \t]+")
_COUNT = re.compile(r"[1-9][0-9]{0,3}")
_NAME = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class PolicyLog:
    verifier: NoteVerifier
    url: str = ""

    @property
    def origin(self) -> str:
        return self.verifier.name


@dataclass(frozen=True, slots=True)
class PolicyWitness:
    name: str  # local to the policy; the key has a name of its own
    verifier: NoteVerifier
    url: str = ""


@dataclass(frozen=True, slots=True)
class PolicyGroup:
    name: str
    rule: Literal["all", "any"] | int
    members: tuple[str, ...]

    @property
    def need(self) -> int:
        """How many members must be satisfied."""
        return {"all": len(self.members), "any": 1}[self.rule] if isinstance(self.rule, str) else self.rule


@dataclass(frozen=True, slots=True)
class QuorumResult:
    satisfied: bool
    have: int  # satisfied members of the quorum's own group
    need: int
    missing: tuple[str, ...]  # its unsatisfied members


@dataclass(frozen=True, slots=True)
class AcceptedCheckpoint:
    """A checkpoint signed by the policy's log, and how far its witnesses reach towards the quorum."""

    opened: OpenedCheckpoint
    witnesses: tuple[str, ...]  # the policy's names of those that cosigned
    quorum: QuorumResult


@dataclass(frozen=True, slots=True)
class Policy:
    logs: tuple[PolicyLog, ...]
    witnesses: tuple[PolicyWitness, ...]
    groups: tuple[PolicyGroup, ...]
    quorum: str

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read a policy; empty lines and lines that begin with '#' are skipped.

        Raises:
            MalformedPolicyError: names the line and what is wrong with it.
        """
        return _Parser().parse(text)

    def format(self) -> str:
        """Return the policy's text, which `parse` reads back to an equal policy."""
        lines = [f"log {log.verifier.vkey} {log.url}".rstrip() for log in self.logs]
        lines += [f"witness {w.name} {w.verifier.vkey} {w.url}".rstrip() for w in self.witnesses]
        lines += [f"group {g.name} {g.rule} {' '.join(g.members)}" for g in self.groups]
        return "\n".join([*lines, f"quorum {self.quorum}", ""])

    def with_urls(self, urls: Mapping[str, str]) -> Policy:
        """Return the policy with these addresses of witnesses, by name; the other ones keep theirs.

        Raises:
            MalformedPolicyError: an address is no single word of printable ASCII.
        """
        changed = tuple(replace(w, url=urls.get(w.name, w.url)) for w in self.witnesses)
        return Policy.parse(replace(self, witnesses=changed).format())

    def log_for(self, origin: str) -> PolicyLog:
        """Return the log of that name.

        Raises:
            NoKnownSignatureError: the policy believes no such log.
        """
        for log in self.logs:
            if log.origin == origin:
                return log
        known = [log.origin for log in self.logs]
        raise NoKnownSignatureError(f"the policy believes logs {known}, not {origin!r}", signers=(origin,))

    def keys_of(self, origin: str) -> tuple[NoteVerifier, ...]:
        """Return every key that the policy believes of that log: two while one takes over from the other.

        Raises:
            NoKnownSignatureError: the policy believes no such log.
        """
        self.log_for(origin)
        return tuple(log.verifier for log in self.logs if log.origin == origin)

    def evaluate(self, verified: Iterable[str]) -> QuorumResult:
        """Say whether the witnesses of these policy names make the quorum; unknown names do not count."""
        satisfied = set(verified) & {witness.name for witness in self.witnesses}
        if self.quorum == NO_QUORUM:
            return QuorumResult(True, 0, 0, ())
        for group in self.groups:  # a member is defined above the group that uses it
            if sum(member in satisfied for member in group.members) >= group.need:
                satisfied.add(group.name)
        members: tuple[str, ...] = (self.quorum,)
        need = 1
        for group in self.groups:
            if group.name == self.quorum:
                members, need = group.members, group.need
        missing = tuple(member for member in members if member not in satisfied)
        return QuorumResult(self.quorum in satisfied, len(members) - len(missing), need, missing)

    def open(self, note: bytes, *, now: int) -> AcceptedCheckpoint:
        """Prove a checkpoint by this policy's keys; the caller decides what an unsatisfied quorum means.

        Raises:
            NoKnownSignatureError: no log of this policy has signed it.
            AuditError: as `audit.checkpoints.open_checkpoint`.
        """
        keys = self.keys_of(parse_checkpoint_note(note).origin)
        opened = open_checkpoint(note, log=keys, witnesses=(w.verifier for w in self.witnesses), now=now)
        cosigners = {cosignature.verifier for cosignature in opened.cosignatures}
        names = tuple(w.name for w in self.witnesses if w.verifier in cosigners)
        return AcceptedCheckpoint(opened, names, self.evaluate(names))


class _Parser:
    def __init__(self) -> None:
        self.number = 0
        self.logs: list[PolicyLog] = []
        self.witnesses: list[PolicyWitness] = []
        self.groups: list[PolicyGroup] = []
        self.quorum: str | None = None
        self.grouped: set[str] = set()
        self.keys: set[bytes] = set()

    def parse(self, text: str) -> Policy:
        lines = text.split("\n")
        if len(text) > MAX_POLICY_BYTES or len(lines) > MAX_LINES:
            raise self.error("the policy is over the cap on bytes or lines")
        for self.number, line in enumerate(lines, start=1):
            words = _BLANKS.split(line.removesuffix("\r").strip(" \t"))
            if words == [""] or line.startswith("#"):
                continue
            if not all(_NAME.fullmatch(word) for word in words):
                raise self.error("holds characters outside printable ASCII")
            self.line(words[0], words[1:])
        if not self.logs:
            raise self.error("the policy names no log; add a line 'log <vkey>'")
        if self.quorum is None:
            raise self.error("the policy has no quorum; add a line 'quorum <name>' or 'quorum none'")
        return Policy(tuple(self.logs), tuple(self.witnesses), tuple(self.groups), self.quorum)

    def line(self, keyword: str, words: list[str]) -> None:
        if keyword == "log" and len(words) in (1, 2):
            verifier = self.vkey(words[0], KeyType.ED25519)
            self.logs.append(PolicyLog(verifier, *words[1:]))
        elif keyword == "witness" and len(words) in (2, 3):
            self.new_name(words[0])
            self.witnesses.append(
                PolicyWitness(words[0], self.vkey(words[1], KeyType.COSIGNATURE), *words[2:])
            )
        elif keyword == "group" and len(words) >= 3:
            self.new_name(words[0])
            self.groups.append(self.group(words[0], words[1], words[2:]))
        elif keyword == "quorum" and len(words) == 1:
            if self.quorum is not None:
                raise self.error("the quorum is defined twice")
            if words[0] != NO_QUORUM and words[0] not in self.names():
                raise self.error(f"quorum {words[0]!r} is no witness or group defined above")
            self.quorum = words[0]
        else:
            raise self.error(
                f"{' '.join([keyword, *words])[:80]!r} is none of 'log <vkey> [url]', "
                "'witness <name> <vkey> [url]', 'group <name> (all|any|<k>) <member>...', "
                "'quorum <name|none>'"
            )

    def group(self, name: str, rule: str, members: list[str]) -> PolicyGroup:
        for member in members:
            if member not in self.names():
                raise self.error(f"member {member!r} is no witness or group defined above")
            if member in self.grouped:
                raise self.error(f"member {member!r} is in a group already")
            self.grouped.add(member)
        if rule == "all":
            return PolicyGroup(name, "all", tuple(members))
        if rule == "any":
            return PolicyGroup(name, "any", tuple(members))
        if not _COUNT.fullmatch(rule) or int(rule) > len(members):
            raise self.error(f"group rule {rule[:20]!r} is not all, any or a number from 1 to {len(members)}")
        return PolicyGroup(name, int(rule), tuple(members))

    def vkey(self, text: str, kind: KeyType) -> NoteVerifier:
        try:
            verifier = NoteVerifier.parse(text)
        except KeyFormatError as error:
            raise self.error(str(error)) from error
        if verifier.kind is not kind:
            raise self.error(
                f"{verifier.name!r} has key type 0x{verifier.kind:02x}, this line takes 0x{kind:02x}"
            )
        if verifier.key.public_bytes in self.keys:
            raise self.error(f"the key of {verifier.name!r} occurs in another line")
        self.keys.add(verifier.key.public_bytes)
        return verifier

    def new_name(self, name: str) -> None:
        if name == NO_QUORUM or name in self.names():
            raise self.error(f"name {name!r} is taken")

    def names(self) -> set[str]:
        return {witness.name for witness in self.witnesses} | {group.name for group in self.groups}

    def error(self, message: str) -> MalformedPolicyError:
        return MalformedPolicyError(message, line=self.number)
