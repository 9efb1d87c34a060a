"""The coordinator's part in a masked round: carry keys, sealed shares and signatures, and open one sum.

Around the round's own request there are four more. `begin` asks every participant for its keys, shows all of
them to each and carries the sealed shares; whoever stays silent is left out, as long as enough remain. After
the masked updates have come, `open` has the survivors sign the one set that counts and asks them for the
shares that open its sum; of a set that lacks nobody a site gives them with its signature. Nothing here is
secret, and nothing here is trusted by the sites: they check every signature themselves. What comes out is
`audit.secure_round.open_sum` over a transcript that anybody else can open again.

Where another round is to come (`goes_on`), its keys are asked for with the shares that open this one, and its
sealed shares with the cosignatures after it: `following` has them, and asks for whatever is missing then.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np

from audit.canonical import JsonValue
from audit.entries import SiteRefused, body_document, parse_body
from audit.errors import AuditError
from audit.masking import MaskError
from audit.secure_bodies import MaskKeys, SharesOpened, SurvivorsAgreed
from audit.secure_round import (
    RoundName,
    SecureRoundError,
    SecureTerms,
    Transcript,
    check_agreed,
    check_keys,
    keys_digest,
    open_sum,
    roster_digest,
    verify_signed,
)
from federation.errors import StatementError
from federation.exchange import Answer, Exchange, Request
from federation.statements import AcceptedUpdate, RoundTerms, verify_refusal

_logger = logging.getLogger(__name__)
Body = TypeVar("Body", MaskKeys, SurvivorsAgreed, SharesOpened)
MOST_TRIES: Final = 64  # sets of givers, when a share that somebody signed is not one


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSum:
    """The sum of the survivors' integers, and the transcript that proves it."""

    total: tuple[int, ...]
    transcript: Transcript


class MaskedRound:
    """One masked round. Call `begin`, send the requests it returns, then `open` with what was accepted."""

    def __init__(
        self,
        exchange: Exchange,
        secure: SecureTerms,
        terms: RoundTerms,
        *,
        timeout_s: float,
        goes_on: bool = False,
    ) -> None:
        """`goes_on`: whether another masked round follows if this one gives a model."""
        self._exchange, self._secure, self._terms = exchange, secure, terms
        self._timeout_s, self._goes_on = timeout_s, goes_on
        self._name = RoundName(
            run=terms.run, round=terms.round, charter=terms.charter, participants=terms.participants
        )
        self._keys: tuple[MaskKeys, ...] = ()
        self._sealed: dict[str, dict[str, str]] = {}
        self._members: tuple[str, ...] = ()
        self.following: MaskedRound | None = None
        self.rejected: dict[str, StatementError] = {}
        self.refusals: dict[str, SiteRefused] = {}
        self.opened: OpenedSum | None = None

    @property
    def terms(self) -> RoundTerms:
        """What the round's statements must say, once `begin` has settled whose masks they carry."""
        return replace(self._terms, roster=roster_digest(keys_digest(self._keys), self._members))

    def begin(self, requests: Mapping[str, Request]) -> dict[str, Request]:
        """Return the requests for the masked updates: to those that gave keys and shares.

        Fewer than the charter's least, and nobody is asked for an update: nothing is released.
        """
        sites = sorted(requests)
        if self._key_sites != sites:  # none were given ahead, or not by all who are here
            self.take_keys(self._ask(dict.fromkeys(sites, self.keys_request())))
        self._deal()
        if len(self._sealed) < self._secure.least and self._is_bound_elsewhere():
            anew = self.keys_request(attempt=time.time_ns() // 1_000_000)
            self.take_keys(self._ask(dict.fromkeys(sites, anew)))
            self._deal()
        self._members = tuple(self._sealed)
        if len(self._members) < self._secure.least:
            return {}
        return {
            site: replace(
                requests[site],
                header={
                    **requests[site].header,
                    "shares": {other: self._sealed[other][site] for other in self._members if other != site},
                },
            )
            for site in self._members
        }

    @property
    def participants(self) -> tuple[str, ...]:
        return self._terms.participants

    def settle(self, terms: RoundTerms, *, goes_on: bool) -> bool:
        """Take the round's terms, which were not known when its keys were made; False if it is another."""
        now, then = terms, self._terms
        same = (now.run, now.round, now.charter, now.participants, now.enrolments) == (
            (then.run, then.round, then.charter, then.participants, then.enrolments)
        )
        if same:
            self._terms, self._goes_on = terms, goes_on
        return same

    def keys_request(self, *, attempt: int = 0) -> Request:
        """Return the question for a site's keys; with a higher `attempt` than before it makes new ones, as
        long as it has released nothing under the old.
        """
        participants = list(self._terms.participants)
        return self._request("masked.keys", {"attempt": attempt, "participants": participants})

    def shares_request(self) -> Request:
        """Return the question for the shares that a site seals for each of those that gave keys."""
        shown: list[JsonValue] = [
            {"enrolment": body_document(self._terms.enrolments[item.site]), "keys": body_document(item)}
            for item in self._keys
        ]
        return self._request("masked.shares", {"keys": shown})

    def take_keys(self, answers: Mapping[str, Answer]) -> None:
        """Keep the keys that hold; what was said before of any site is void."""
        self.rejected, self.refusals, self._sealed = {}, {}, {}
        self._keys = tuple(
            found for site in sorted(answers) if (found := self._read_keys(site, answers[site]))
        )

    def take_shares(self, answers: Mapping[str, Answer]) -> None:
        """Keep the sealed shares of those that gave one for each other site."""
        sites = self._key_sites
        for site in sites:
            self.rejected.pop(site, None)
        self._sealed = {
            site: texts
            for site in sites
            if site in answers and (texts := self._read_shares(site, answers[site], sites))
        }

    @property
    def _key_sites(self) -> list[str]:
        return [item.site for item in self._keys]

    def _deal(self) -> None:
        sites = self._key_sites
        if len(sites) >= self._secure.least and list(self._sealed) != sites:
            self.take_shares(self._ask(dict.fromkeys(sites, self.shares_request())))

    def _is_bound_elsewhere(self) -> bool:
        """Whether a site sealed shares for another set of keys, before the coordinator or a site was lost."""
        return any(refusal.reason == "already_answered" for refusal in self.refusals.values())

    def open(self, accepted: Mapping[str, AcceptedUpdate]) -> Sequence[int]:
        """Have the survivors agree and open their sum.

        Raises:
            SecureRoundError: too few agreed, or too few gave shares that hold; the round is lost.
        """
        survivors = tuple(sorted(accepted))
        updates = {site: accepted[site].statement.update for site in survivors}
        roster = self.terms.roster
        header: dict[str, JsonValue] = {"survivors": list(survivors), "updates": list(updates.values())}
        request = self._request("masked.survivors", header)
        is_whole = survivors == self._members
        answers = (
            self._ask_on(survivors, request) if is_whole else self._ask(dict.fromkeys(survivors, request))
        )
        wanted = {"survivors": survivors, "updates": tuple(updates.values()), "roster": roster}
        agreed = [
            found
            for site in survivors
            if (found := self._read(SurvivorsAgreed, "agreed", "survivors", site, answers[site], wanted))
        ]
        check_agreed(
            self._name,
            agreed,
            self._key_of,
            members=self._members,
            roster=roster,
            least=self._secure.least,
        )
        signers = [item.site for item in agreed]
        given = {site: answers[site] for site in signers if is_whole and "opened" in answers[site].header}
        opened = self._read_opened(given)
        if len(opened) < self._secure.least:
            signed: list[JsonValue] = [body_document(item) for item in agreed]
            request = self._request("masked.open", {"agreed": signed})
            asked_on = (
                self._ask_on(signers, request) if not is_whole else self._ask(dict.fromkeys(signers, request))
            )
            opened = self._read_opened(asked_on)
        self.opened = self._first_that_holds(accepted, tuple(agreed), opened)
        return self.opened.total

    def _read_opened(self, answers: Mapping[str, Answer]) -> list[SharesOpened]:
        same = {"roster": self.terms.roster}
        return [
            given
            for site in sorted(answers)
            if (given := self._read(SharesOpened, "opened", "shares", site, answers[site], same))
        ]

    def _ask_on(self, sites: Sequence[str], request: Request) -> dict[str, Answer]:
        """Ask the question that opens the round at a site, and behind it, in one message, for the keys of the
        round that follows; a site that does not answer the first is not asked the second.
        """
        if not self._goes_on:
            return self._ask(dict.fromkeys(sites, request))
        terms = replace(self._terms, round=self._terms.round + 1, participants=tuple(sites))
        following = MaskedRound(self._exchange, self._secure, terms, timeout_s=self._timeout_s)
        both = dict.fromkeys(sites, (request, following.keys_request()))
        answers = self._exchange.ask_several(both, timeout_s=self._timeout_s, group_id=str(self._terms.round))
        following.take_keys({site: keys for site, (_, keys) in answers.items()})
        if following._key_sites == list(sites):
            self.following = following
        return {site: answer for site, (answer, _) in answers.items()}

    def _first_that_holds(
        self,
        accepted: Mapping[str, AcceptedUpdate],
        agreed: tuple[SurvivorsAgreed, ...],
        opened: Sequence[SharesOpened],
    ) -> OpenedSum:
        """Open with the first set of givers whose shares hold: one liar among enough costs nothing."""
        problem = SecureRoundError(
            "shares", f"{len(opened)} sites gave shares, {self._secure.least} are needed"
        )
        for givers in giver_sets(opened, self._secure.least):
            transcript = Transcript(keys=self._keys, members=self._members, agreed=agreed, opened=givers)
            try:
                total = open_sum(
                    self._name,
                    transcript,
                    {site: update.values for site, update in accepted.items()},
                    {site: update.statement.update for site, update in accepted.items()},
                    self._key_of,
                    least=self._secure.least,
                    add=combined,
                )
            except SecureRoundError as error:
                _logger.warning("round %d: %s", self._terms.round, error)
                problem = error
                continue
            return OpenedSum(total=tuple(total), transcript=transcript)
        raise problem

    def _request(self, kind: str, header: Mapping[str, JsonValue]) -> Request:
        name: dict[str, JsonValue] = {
            "run": self._terms.run,
            "round": self._terms.round,
            "charter": self._terms.charter,
        }
        return Request(kind=kind, header={**name, **header})

    def _ask(self, requests: Mapping[str, Request]) -> dict[str, Answer]:
        found = self._exchange.ask(requests, timeout_s=self._timeout_s, group_id=str(self._terms.round))
        return {site: answer for site, (answer, _) in found.items()}

    def _read_keys(self, site: str, answer: Answer) -> MaskKeys | None:
        found = self._read(MaskKeys, "keys", "keys", site, answer, {"participants": self._terms.participants})
        if found is None:
            return None
        try:
            check_keys(self._name, (found,), self._key_of, least=1)
        except SecureRoundError as error:
            self._reject(site, "keys", str(error))
            return None
        return found

    def _read_shares(self, site: str, answer: Answer, sites: Sequence[str]) -> dict[str, str] | None:
        shares = answer.header.get("shares")
        wanted = set(sites) - {site}
        if not isinstance(shares, dict) or set(shares) != wanted:
            self._note_refusal(site, answer)
            self._reject(site, "shares", answer.failure or "are not one for each other site")
            return None
        if not all(isinstance(text, str) and len(text) < 400 for text in shares.values()):
            self._reject(site, "shares", "are not sealed texts")
            return None
        return dict(shares)

    def _read(
        self,
        kind: type[Body],
        field: str,
        part: str,
        site: str,
        answer: Answer,
        wanted: Mapping[str, object],
    ) -> Body | None:
        """Return a signed piece of an answer, or None after saying why there is none."""
        if answer.failure or field not in answer.header:
            self._note_refusal(site, answer)
            self._reject(site, field, answer.failure or "holds no such field")
            return None
        try:
            body = parse_body(kind, answer.header[field])
            if body.site != site:
                raise SecureRoundError(part, f"is signed for site {body.site}", site)
            for name, value in {
                "run": self._name.run,
                "round": self._name.round,
                "charter": self._name.charter,
                **wanted,
            }.items():
                if getattr(body, name) != value:
                    raise SecureRoundError(part, f"{name} is not the round's", site)
            verify_signed(body, self._key_of(site), part)
        except AuditError as error:
            self._reject(site, field, str(error))
            return None
        return body

    def _note_refusal(self, site: str, answer: Answer) -> None:
        if "refusal" not in answer.header:
            return
        try:
            refusal = verify_refusal(site, self._terms.enrolments[site], answer.header["refusal"])
        except StatementError:
            return
        self.refusals[site] = refusal

    def _reject(self, site: str, field: str, problem: str) -> None:
        said = self.refusals.get(site)
        self.rejected[site] = StatementError(site, field, problem if said is None else said.reason)
        _logger.warning("round %d: %s", self._terms.round, self.rejected[site])

    def _key_of(self, site: str) -> str:
        return self._terms.enrolments[site].statement_key


def giver_sets(opened: Sequence[SharesOpened], least: int) -> Iterator[tuple[SharesOpened, ...]]:
    """Yield sets of `least` givers to try, each in the order given.

    The first leave out one block of givers after the other, as many as are not needed, so that every single
    giver is left out of some; then come at most `MOST_TRIES` others.
    """
    count, spare = len(opened), len(opened) - least
    if spare < 0:
        return
    starts = range(0, count, spare) if spare else range(1)
    blocks = [tuple(sorted((start + step) % count for step in range(least))) for start in starts]
    others = (places for places in itertools.combinations(range(count), least) if places not in blocks)
    for places in itertools.chain(blocks, itertools.islice(others, MOST_TRIES)):
        yield tuple(opened[place] for place in places)


def combined(size: int, parts: Iterable[tuple[int, Sequence[int]]]) -> list[int]:
    """Return what `audit.masking.combined` returns, in one pass of numpy a vector."""
    total = np.zeros(size, dtype=np.uint64)
    for sign, vector in parts:
        if len(vector) != size:
            raise MaskError(f"a vector has {len(vector)} numbers, the others {size}")
        kind = np.uint64 if getattr(vector, "typecode", "q") == "Q" else np.int64
        words = np.array(vector, dtype=kind).view(np.uint64)
        total = total + words if sign > 0 else total - words
    values: list[int] = total.view(np.int64).tolist()
    return values
