"""Checkpoints between rounds: sign, let every agent cosign, and show agents what witnessed history holds."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from audit.checkpoints import parse_checkpoint_note
from audit.notes import parse_note
from audit.tlog_proof import TlogProof
from federation.coordinator import Coordinator
from federation.exchange import Answer, Exchange, Request
from federation.trust import OPERATOR, asked_to_cosign

COSIGN_TIMEOUT_S = 60.0
_NEAR = 64
_LOOKED_AT = 20  # checkpoints, newest first, for what a site cosigned last
_MEETINGS = 3  # how often to publish again for a site that watched the log meanwhile and is ahead


@dataclass(frozen=True, slots=True)
class Alongside:
    """Questions that travel behind those for cosignatures, and what sites answered to them."""

    requests: Mapping[str, Request]
    answers: dict[str, Answer] = field(default_factory=dict)

    def still(self, site: str) -> tuple[Request, ...]:
        """Return the question that the site has not answered yet, if there is one."""
        known = self.answers.get(site)
        open_ = site in self.requests and (known is None or bool(known.failure))
        return (self.requests[site],) if open_ else ()


class Witnessing:
    """The coordinator's side of `add-checkpoint`, over the same grid as the rounds."""

    def __init__(
        self, coordinator: Coordinator, exchange: Exchange, *, timeout_s: float = COSIGN_TIMEOUT_S
    ) -> None:
        self._coordinator, self._exchange, self._timeout_s = coordinator, exchange, timeout_s
        self._shown: dict[int, dict[str, str]] = {}  # what `logged` said under the present note
        self._bodies: dict[int, bytes] = {}  # read by `prepare` for it
        self._seen: dict[str, int] = {}  # tree size that each site cosigned last
        self._note: bytes | None = None
        self._tree_size = 0
        self._is_behind = False

    def cosign(self, sites: Iterable[str], along: Alongside | None = None) -> int:
        """Sign the log as it is, collect the sites' cosignatures, return how many there are.

        `along`: what else sites are asked in the same messages, whether they are asked to cosign or not.
        """
        wanted, beside = asked_to_cosign(sites, self._operators()), along or Alongside({})
        for _ in range(_MEETINGS):
            self._is_behind = False
            note = self._coordinator.cosign_round(lambda signed: self._collect(signed, wanted, beside))
            self._note, self._shown, self._bodies = note, {}, {}
            self._tree_size = parse_checkpoint_note(note).tree_size
            if not self._is_behind:
                break
        return len(parse_note(note).signatures) - 1

    @property
    def tree_size(self) -> int:
        """Size of the last cosigned tree; 0 before the first."""
        return self._tree_size

    def covers(self, leaf_index: int) -> bool:
        """Whether the last cosigned tree holds the leaf."""
        return leaf_index < self.tree_size

    def logged(self, leaf_index: int) -> dict[str, str]:
        """Return a leaf with its tlog-proof to the last cosigned checkpoint, as agents read it."""
        if self._note is None or not self.covers(leaf_index):
            raise ValueError(f"leaf {leaf_index} is not in a cosigned tree yet")
        if leaf_index in self._shown:
            return self._shown[leaf_index]
        body = self._bodies.pop(leaf_index, None) or self._coordinator.ledger.entry(leaf_index)
        shown = self._shown[leaf_index] = self._show(leaf_index, body)
        return shown

    def prepare(self, leaves: Sequence[int]) -> None:
        """Read what `logged` will be asked for these leaves at once, where they lie close together."""
        if self._note is None or not leaves or max(leaves) - min(leaves) >= 2 * len(leaves) + _NEAR:
            return
        first, ledger = min(leaves), self._coordinator.ledger
        bodies = ledger.entries(first, max(leaves) + 1)
        ledger.warm(self.tree_size)
        self._bodies = {index: bodies[index - first] for index in leaves if self.covers(index)}

    def _show(self, leaf_index: int, body: bytes) -> dict[str, str]:
        if self._note is None:
            raise ValueError("nothing is cosigned yet")
        hashes = self._coordinator.ledger.inclusion_proof(leaf_index, self.tree_size)
        proof = TlogProof(leaf_index=leaf_index, hashes=tuple(hashes), checkpoint_note=self._note)
        return {"entry": base64.b64encode(body).decode(), "proof": proof.format().decode()}

    def _operators(self) -> dict[str, str]:
        """Who runs each enrolled site: several sites of one operator count once, so not all are asked."""
        enrolled = self._coordinator.enrolments()
        return {site: body.operator for site, body in enrolled.items() if OPERATOR.fullmatch(body.operator)}

    def _collect(self, note: bytes, sites: list[str], along: Alongside) -> dict[str, list[bytes]]:
        lines: dict[str, list[bytes]] = {}
        waiting = sites
        self._catch_up(sites)
        request = lru_cache(maxsize=None)(partial(self._request, note))  # most sites saw the same tree last
        for _ in range(2):  # the second time from the sizes that the stale ones named
            questions = {site: (request(self._seen.get(site, 0)), *along.still(site)) for site in waiting}
            questions |= {
                site: more for site in along.requests.keys() - waiting if (more := along.still(site))
            }
            answers = self._exchange.ask_several(questions, timeout_s=self._timeout_s, group_id="cosign")
            along.answers.update({site: answers[site][-1] for site in questions if along.still(site)})
            stale: list[str] = []
            for site in waiting:
                header: Any = answers[site][0].header
                line, size = header.get("cosignature"), header.get("tree_size")
                if isinstance(line, str):
                    lines[site] = [line.encode() if line.endswith("\n") else line.encode() + b"\n"]
                    self._seen[site] = parse_checkpoint_note(note).tree_size
                elif isinstance(size, int) and 0 <= size <= parse_checkpoint_note(note).tree_size:
                    self._seen[site] = size
                    stale.append(site)
                elif isinstance(size, int):
                    self._is_behind = True
            if not stale:
                break
            waiting = stale
        return lines

    def _catch_up(self, sites: list[str]) -> None:
        """Learn from the log's newest checkpoints what each site has cosigned by its own watch since.

        A wrong guess costs one more question; a site that never cosigned is not looked for for ever.
        """
        missing, looked = set(sites), 0

        def is_enough(note: bytes) -> bool:
            nonlocal looked
            looked += 1
            parsed = parse_note(note)
            for name in missing & {signature.name for signature in parsed.signatures}:
                missing.discard(name)
                self._seen[name] = max(self._seen.get(name, 0), parse_checkpoint_note(note).tree_size)
            return not missing or looked >= _LOOKED_AT

        self._coordinator.ledger.latest_checkpoint(is_enough)

    def _request(self, note: bytes, old_size: int) -> Request:
        proof = self._coordinator.ledger.consistency_proof(old_size, parse_checkpoint_note(note).tree_size)
        return Request(
            kind="cosign",
            header={
                "old_size": old_size,
                "proof": [base64.b64encode(item).decode() for item in proof],
                "note": note.decode(),
            },
        )
