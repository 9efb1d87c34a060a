"""What a verification says: numbered steps, one word each, and a verdict that follows from them alone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


class Word(StrEnum):
    """How much a step knows."""

    PROVED = "PROVED"
    ATTESTED = "ATTESTED"
    NO_EVIDENCE = "NO EVIDENCE"
    FAIL = "FAIL"


class Verdict(StrEnum):
    """The whole file's verdict."""

    VALID = "VALID"
    INVALID = "INVALID"
    SELF_CONSISTENT_ONLY = "SELF-CONSISTENT ONLY"
    INCOMPLETE = "INCOMPLETE"
    STALE = "STALE"
    UNWITNESSED = "UNWITNESSED"


USAGE_EXIT: Final = 2
EXIT_CODES: Final[Mapping[Verdict, int]] = {
    Verdict.VALID: 0,
    Verdict.INVALID: 1,
    Verdict.SELF_CONSISTENT_ONLY: 3,
    Verdict.INCOMPLETE: 4,
    Verdict.STALE: 5,
    Verdict.UNWITNESSED: 6,
}

NO_POLICY: Final = "verify.no_policy"
STALE: Final = "verify.stale"
UNWITNESSED: Final = frozenset({"verify.unwitnessed", "verify.cosignature_from_future"})

_MEANING: Final[Mapping[Verdict, str]] = {
    Verdict.VALID: "every step that this file's subject needs is proved, or attested by a key the policy "
    "anchors.",
    Verdict.INVALID: "at least one step is contradicted. Do not rely on this file.",
    Verdict.SELF_CONSISTENT_ONLY: "the file agrees with itself, but no policy was given, so nothing says "
    "whose "
    "keys these are. Anybody can make such a file. Give --policy with a policy obtained elsewhere.",
    Verdict.INCOMPLETE: "nothing is contradicted, but a step that is needed has no evidence in this file, or "
    "was not carried out.",
    Verdict.STALE: "everything is in order, but the checkpoint is older than you allow.",
    Verdict.UNWITNESSED: "too few of the policy's witnesses cosigned this history; its operator could still "
    "show others another one.",
}
_OF_SCOPE: Final[Mapping[str, str]] = {
    "entry": "this entry is in the witnessed log. Nothing is said of what it claims.",
    "misbehaviour": "the accusation holds: this log's key signed both sides of a contradiction. Believe "
    "nothing of it that your own witnesses did not see before.",
    "stories": "the site and the federation tell the same of what the site signed. Nothing more is said of "
    "what was signed.",
    "log": "the file is whole, is the witnessed log, and counts every release once. Nothing more is said of "
    "what its entries claim.",
}
_WORDS: Final = (
    "PROVED: recomputed from the bytes in this file.  ATTESTED: a key signed it, and nobody can know more "
    "from "
    "here (that noise was drawn, that rows were clipped, what the data was)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that was looked at."""

    number: int
    title: str
    word: Word
    detail: str
    code: str  # "ok", or the stable code of what is missing or wrong
    entry: int | None = None  # leaf index of the entry at fault

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "title": self.title,
            "word": self.word.value,
            "detail": self.detail,
            "code": self.code,
            "entry": self.entry,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EpsilonLine:
    """What a site's population spent; every number with all that it means nothing without."""

    site: str
    run_epsilon: str
    lifetime_epsilon: str
    events: int
    delta: str
    unit: str
    relation: str
    method: str
    claimed: str  # "" when nothing is claimed

    def text(self) -> str:
        claim = f", claimed {self.claimed}" if self.claimed else ""
        return (
            f"{self.site}: epsilon {self.run_epsilon} for the run{claim}; {self.lifetime_epsilon} over "
            f"the first {self.events} releases of its population in this log "
            f"(one {self.unit}, {self.relation.replace('_', '/')}, delta {self.delta}, {self.method})"
        )

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a verification found."""

    steps: tuple[Step, ...]
    scope: str = ""
    subject: str = ""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    epsilons: tuple[EpsilonLine, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.steps)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def failures(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.word is Word.FAIL)

    def step(self, title: str) -> Step:
        """Return the step of that title; KeyError when this file's scope has none."""
        for step in self.steps:
            if step.title == title:
                return step
        raise KeyError(title)

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict.value,
            "exit_code": self.exit_code,
            "scope": self.scope,
            "subject": self.subject,
            "checkpoint": dict(self.checkpoint),
            "steps": [step.to_json() for step in self.steps],
            "epsilon": [line.to_json() for line in self.epsilons],
        }

    def json_text(self) -> str:
        return json.dumps(self.to_json(), indent=2) + "\n"

    def text(self) -> str:
        """Return the report as plain text for a person."""
        lines = [f"affidavit verify: {self.subject or 'not an evidence file'}", ""]
        for step in self.steps:
            where = f" [entry {step.entry}]" if step.entry is not None else ""
            code = "" if step.code == "ok" else f" ({step.code})"
            lines.append(f"{step.number:>2}. {step.word.value:<12} {step.title}{where}")
            lines += _wrapped(f"{step.detail}{code}")
        if self.epsilons:
            lines += ["", "Epsilon, recomputed from the attested events:"]
            for line in self.epsilons:
                lines += _wrapped(line.text(), indent=4)
        lines += ["", *_wrapped(_WORDS, indent=0)]
        meaning = _MEANING[self.verdict]
        if self.verdict is Verdict.VALID:
            meaning = _OF_SCOPE.get(self.scope, meaning)
        lines += ["", *_wrapped(f"{self.verdict.value}: {meaning}", indent=0)]
        return "\n".join(_printable(line) for line in lines) + "\n"


def verdict_of(steps: Sequence[Step]) -> Verdict:
    """Return the verdict that the steps' words and codes give; VALID only when nothing is missing."""
    gaps = {step.code for step in steps if step.word is Word.NO_EVIDENCE}
    if not steps or any(step.word is Word.FAIL for step in steps):
        return Verdict.INVALID
    if gaps & UNWITNESSED:
        return Verdict.UNWITNESSED
    if gaps - {NO_POLICY, STALE}:
        return Verdict.INCOMPLETE
    if NO_POLICY in gaps:
        return Verdict.SELF_CONSISTENT_ONLY
    return Verdict.STALE if STALE in gaps else Verdict.VALID


def _wrapped(text: str, *, indent: int = 17) -> list[str]:
    pad = " " * indent
    return textwrap.wrap(text, 100, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False)


def _printable(line: str) -> str:
    """Escape what a hostile file could use to rewrite a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
