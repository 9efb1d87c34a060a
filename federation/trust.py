"""The policy that a federation's readers are given: its log's keys, its sites as witnesses, and their quorum.

What comes out of `log_policy` is a proposal: it says what the log says. A reader compares it with what the
other members hold before believing it, since whoever runs the log wrote it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from audit.entries import SiteEnrolled, decode_entry
from audit.ledger import Ledger
from audit.ledger_keys import keys_of
from audit.log_keys import LogKeys
from audit.tlog_policy import NO_QUORUM, Policy

QUORUM: Final = "members"
ASKED_OF_ONE: Final = 4  # sites of one operator: they count once, and one of them may be silent
MAX_VOICES: Final = 64  # a note holds at most 100 signatures, the log's keys among them
OPERATOR: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def federation_policy(
    log_key: str | Sequence[str],
    witnesses: Mapping[str, str],
    *,
    operators: Mapping[str, str] | None = None,
) -> Policy:
    """Return the policy of a log whose n sites are its witnesses: w of n, 2w > n + f, f = (n - 1) / 3.

    Args:
        log_key: the log's vkey, or several while one takes over from another, the newest first.
        witnesses: each site's witness vkey; with none the quorum is `none`.
        operators: who runs a site's machines, where several sites share an operator. Sites under one
            operator count once, as `group <operator> any`, because whoever runs both can make both sign.

    Every site has its witness line, which is what anchors its identity; of more than `MAX_VOICES` independent
    ones the quorum is over the `MAX_VOICES` that `chosen_voices` gives.
    """
    by_operator = voices_of(witnesses, operators or {})
    shared = {name: by_operator[name] for name in chosen_voices(by_operator)}
    voices: dict[str, list[str]] = {}
    for operator, sites in shared.items():
        name = sites[0] if len(sites) == 1 else operator
        voices[f"operator:{name}" if len(sites) > 1 and name in witnesses else name] = sites
    count = len(voices)
    need = (count + (count - 1) // 3) // 2 + 1
    lines = [f"log {key}" for key in ([log_key] if isinstance(log_key, str) else log_key)]
    for site, key in sorted(witnesses.items()):
        lines.append(f"witness {site} {key}")
    for name, sites in sorted(voices.items()):
        if len(sites) > 1:
            lines.append(f"group {name} any {' '.join(sites)}")
    if not voices:
        return Policy.parse("\n".join([*lines, f"quorum {NO_QUORUM}", ""]))
    quorum = QUORUM if QUORUM not in (*voices, *witnesses) else f"quorum:{QUORUM}"
    lines += [f"group {quorum} {need} {' '.join(sorted(voices))}", f"quorum {quorum}"]
    return Policy.parse("\n".join(lines) + "\n")


def voices_of(sites: Iterable[str], operators: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the sites by who runs them, sorted; one without an operator is its own."""
    shared: dict[str, list[str]] = {}
    for name in sorted(sites):
        shared.setdefault(operators.get(name) or name, []).append(name)
    return shared


def chosen_voices(names: Iterable[str]) -> list[str]:
    """Return at most `MAX_VOICES` of the names, the same for everybody who has the same names.

    They are those whose SHA-256 is smallest, so that a member who joins or leaves moves at most one seat and
    nobody is chosen for how its name sorts.
    """
    found = sorted(set(names))
    if len(found) <= MAX_VOICES:
        return found
    return sorted(sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())[:MAX_VOICES])


def asked_to_cosign(sites: Iterable[str], operators: Mapping[str, str]) -> list[str]:
    """Return whom a coordinator asks for cosignatures: of each chosen voice at most `ASKED_OF_ONE` sites."""
    voices = voices_of(sites, operators)
    chosen = chosen_voices(voices)
    share = max(1, MAX_VOICES // max(1, len(chosen)))
    return sorted(name for voice in chosen for name in voices[voice][: min(share, ASKED_OF_ONE)])


def log_policy(ledger: Ledger) -> Policy:
    """Return the policy that a log's own entries give: keys not known as stolen, and every enrolled site.

    A key that retired in good order stays, because what it signed stays good; trees beyond its end are
    refused by the entry that ended it. Sites that name one operator count once.

    Raises:
        LogKeyError: an entry about a key is not signed as it must be.
    """
    latest: dict[str, SiteEnrolled] = {}
    after: int | None = None
    while rows := ledger.search(type="site.enrolled", after=after, limit=1000):
        for row in rows:
            body = decode_entry(row.body).body
            if isinstance(body, SiteEnrolled):
                latest[body.site] = body
        after = rows[-1].leaf_index
    return federation_policy(
        good_keys(keys_of(ledger)),
        {site: body.witness_key for site, body in latest.items()},
        operators={site: body.operator for site, body in latest.items() if OPERATOR.fullmatch(body.operator)},
    )


def good_keys(keys: LogKeys) -> tuple[str, ...]:
    """Return the vkeys that no entry calls stolen, newest first."""
    good = [vkey for vkey, key in keys.keys.items() if key.compromised_at is None]
    return tuple(reversed(good))
