"""The step on the access rules that a decision names: whose they are, and whether they were in force."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Final

from audit.entries import ZERO_DIGEST
from audit.serving_bodies import PolicyChanged
from audit.verify.chain import Chain, FailError, Leaf, Outcome, expect, need, verify_body
from audit.verify.history import LINKS
from audit.verify.members import CHARTER
from audit.verify.report import Word

RULES: Final = "The rules that allowed it"
FOLLOW_S: Final = 60  # workers follow a change within 5 s at most; the rest is for clocks that differ
_WORD: Final = re.compile(r'//[^\n]*|"(?:\\.|[^"\\])*"|[A-Za-z_][A-Za-z0-9_]*|\S', re.DOTALL)
_ESCAPES: Final = re.compile(r"\\(.)", re.DOTALL)


def check_rules(chain: Chain) -> Outcome:
    """The decision names rules that were in force, and policies of them that permit.

    That Cedar allowed it by them is the operator's word. So is, where the file holds no change of rules, what
    the rules were.

    Raises:
        FailError: the text is another than the decision names, lacks a policy that it names, was superseded
            or never in force, or its signer is no officer of the charter.
    """
    leaf = need(chain.prediction, LINKS)
    body = leaf.body
    allowed = f"by the log's operator: Cedar allowed it by {', '.join(body.policies)}"
    changes = [change for change in chain.leaves(PolicyChanged) if change.index < leaf.index]
    named = [change for change in changes if change.body.policy_set == body.policy_set]
    if not named:
        for change in changes:
            if change.body.previous_change == ZERO_DIGEST:
                _check_followed(chain, change, "the rules that the decision names were never put in force")
        return Outcome(
            word=Word.ATTESTED,
            detail=f"{allowed}, of rules {body.policy_set[:16]}… that no entry before it holds: those "
            "that the server was started with",
        )
    used = next((change for change in reversed(named) if not _fault(chain, change)), named[-1])
    fault = _fault(chain, used)
    if fault is not None:
        raise fault
    for change in changes:
        if change.index > used.index and change.body.previous_change == used.leaf_hash:
            _check_followed(chain, change, f"the rules of entry {used.index} were no longer in force")
    permits = {name for name, effect in policies_of(used.body.text) if effect == "permit"}
    for name in body.policies:
        if name not in permits:
            raise FailError(
                "rules.no_such_policy", f"the rules hold no policy {name[:60]!r} that permits", leaf.index
            )
    officer = need(chain.charter, CHARTER).officers[used.body.officer]
    return Outcome(
        word=Word.ATTESTED,
        detail=f"{allowed}, of the rules that {officer} put in force in entry {used.index}",
    )


def policies_of(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, effect) of each policy of a Cedar text that has an `@id`, in order.

    Comments and strings are passed over as Cedar's grammar reads them. The text need not be valid.
    """
    words = [word for word in _WORD.findall(text) if not word.startswith("//")]
    name, at_start, place = "", True, 0
    while place < len(words):
        word = words[place]
        if at_start and word == "@":  # @key or @key("value")
            given = words[place + 1 : place + 5]
            has_value = len(given) == 4 and given[1] == "(" and given[3] == ")" and given[2].startswith('"')
            if has_value and given[0] == "id":
                name = _ESCAPES.sub(r"\1", given[2][1:-1])
            place += 5 if has_value else 2
            continue
        if at_start and word in ("permit", "forbid") and name:
            yield name, word
        name, at_start = "", word == ";"
        place += 1


def _check_followed(chain: Chain, change: Leaf[PolicyChanged], what: str) -> None:
    """Fail where a valid change had put others in force, longer ago than a worker may take to follow."""
    leaf = need(chain.prediction, LINKS)
    if _fault(chain, change) is None and _seconds(chain, change.index, leaf.index) > FOLLOW_S:
        raise FailError(
            "rules.not_in_force", f"{what}: entry {change.index} had put others in force", leaf.index
        )


def _seconds(chain: Chain, earlier: int, later: int) -> float:
    """Return how much later an entry says that it was made."""
    times = [datetime.fromisoformat(chain.located[index].entry.time) for index in (earlier, later)]
    return (times[1] - times[0]).total_seconds()


def _fault(chain: Chain, change: Leaf[PolicyChanged]) -> FailError | None:
    """Return why a change is none that an officer of the charter made; None where one did."""
    charter, body = need(chain.charter, CHARTER), change.body
    digest = hashlib.sha256(body.text.encode()).hexdigest()
    try:
        expect(body.policy_set, digest, code="rules.text", field="policy_set", entry=change.index)
        if body.officer not in charter.officers:
            return FailError(
                "rules.not_an_officer", f"{body.officer} is no officer of the charter", change.index
            )
        verify_body(body, body.officer, code="rules.signature", who="the officer", entry=change.index)
    except FailError as error:
        return error
    return None
